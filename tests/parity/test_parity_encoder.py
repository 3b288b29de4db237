"""BERT and heads of classes against transformers: hidden states, logits, gradients, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import BODIES, CASES, headed, said, write
from reference import close, close_norms, torch, transformers
from safetensors.numpy import load_file, save_file

import sftjax
from sftjax import params as params_lib

pytestmark = pytest.mark.parity
F = torch.nn.functional
LABELS = ("negative", "neutral", "positive")
OTHERS = ["BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification"]
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def theirs(path, kind):
    """transformers' model of a directory, every tensor of it used and none missing."""
    model, info = kind.from_pretrained(path, output_loading_info=True, attn_implementation="eager", dtype="auto")
    assert not any(info[k] for k in KEYS), info
    return model.eval()


def batch(vocab, lengths, width=24, seed=0):
    """Right-padded rows; the second half of each is of the other token type."""
    tokens = np.random.default_rng(seed).integers(1, vocab, (len(lengths), width))
    segments = np.arange(width) < np.array(lengths)[:, None]
    types = (np.arange(width) >= np.array(lengths)[:, None] // 2) & segments
    out = {"tokens": tokens * segments, "segments": segments, "token_types": types}
    return {k: v.astype(np.int32) for k, v in out.items()}


def inputs(batch, **more):
    long = lambda x: torch.tensor(x, dtype=torch.long)  # noqa: E731
    types = {"token_type_ids": long(batch["token_types"])} if "token_types" in batch else {}
    mask = long(batch["segments"])
    return dict(input_ids=long(batch["tokens"]), attention_mask=mask, **types, **more)


def logits(model, params, batch):
    """[B, C] of our model, at the token that it reads."""

    @jax.jit
    def run(params, batch):
        return model.class_logits(params, model.hidden(params, batch))

    at = np.zeros(len(batch["tokens"]), int)
    if model.reads == "last":
        at = batch["segments"].sum(1) - 1
    return np.asarray(run(params, batch))[np.arange(len(at)), at]


@pytest.fixture(scope="module")
def minilm(fixtures):
    return fixtures / "minilm-l6"


@pytest.mark.fixtures
def test_real_weights_give_transformers_hidden_states_and_pooled_vector(minilm):
    model, params = sftjax.load_pretrained(minilm)
    given = batch(30522, [200, 77, 3, 150], 200)
    with torch.no_grad():
        out = theirs(minilm, transformers.BertModel)(**inputs(given))
    hidden = jax.jit(model.hidden)(params, given)
    real = given["segments"][..., None]
    close(hidden * real, out.last_hidden_state.numpy() * real, 1e-5)
    close(model.pooled(params, hidden)[:, 0], out.pooler_output.numpy(), 1e-5)


@pytest.mark.fixtures
def test_real_files_are_bit_equal_and_with_labels_are_a_classifiers(minilm, tmp_path):
    sftjax.save_pretrained(tmp_path / "bare", *sftjax.load_pretrained(minilm))
    old, new = (load_file(d / "model.safetensors") for d in (minilm, tmp_path / "bare"))
    old.pop("embeddings.position_ids")  # follows from the config
    assert old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)
    theirs(tmp_path / "bare", transformers.BertModel)

    model, params = sftjax.load_pretrained(minilm, labels=LABELS)
    sftjax.save_pretrained(tmp_path / "classes", model, params)
    other = theirs(tmp_path / "classes", transformers.AutoModelForSequenceClassification)
    assert type(other).__name__ == "BertForSequenceClassification"
    assert other.config.id2label == dict(enumerate(LABELS)) and other.config.num_labels == 3
    given = batch(30522, [40, 7, 33], 40)
    with torch.no_grad():
        expected = other(**inputs(given)).logits.numpy()
    close(logits(model, params, given), expected, 1e-5)

    other.save_pretrained(tmp_path / "again")
    again, weights = sftjax.load_pretrained(tmp_path / "again")
    assert again.source.labels == LABELS and again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def gradients(model, params, given, labels):
    def loss(params):
        out = model.class_logits(params, model.hidden(params, given))[:, 0]
        return -jnp.mean(jax.nn.log_softmax(out)[jnp.arange(len(labels)), labels])

    return jax.jit(jax.value_and_grad(loss))(params)


def test_gradients_of_every_parameter(tmp_path):
    path = write("bert-classes", tmp_path / "in")
    model, params = sftjax.load_pretrained(path)
    given, labels = batch(64, [24, 9, 17, 5]), np.array([0, 2, 1, 2])
    value, ours = gradients(model, params, given, labels)
    other = theirs(path, transformers.BertForSequenceClassification)
    loss = F.cross_entropy(other(**inputs(given)).logits, torch.tensor(labels))
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.grad)
    other.save_pretrained(tmp_path / "grads")
    _, expected = sftjax.load_pretrained(tmp_path / "grads")
    # A bias on the keys moves all scores of a query alike, and so no weight.
    close_norms(ours, expected, 1e-4, zero=("layers/0-2/attn/k/b",))


AUTO = {
    "document": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
    "vocabulary": transformers.AutoModelForMaskedLM,
}


@pytest.mark.parametrize("head", AUTO)
@pytest.mark.parametrize("name", BODIES)
def test_every_head_on_every_encoder(name, head, tmp_path):
    model, params = headed(name, head, tmp_path / "in")
    sftjax.save_pretrained(tmp_path / "out", model, params)
    other = theirs(tmp_path / "out", AUTO[head])
    given = batch(64, [40, 9, 17, 5], 40)
    if name != "bert":
        del given["token_types"]
    given["tokens"][given["tokens"] == 1] = 2  # RoBERTa's padding, which it does not count
    with torch.no_grad():
        out = other(**inputs(given))
    ours = np.asarray(jax.jit(lambda p: said(model, p, given))(params))
    real = given["segments"][..., None]
    if head == "document":
        close(ours[:, 0], out.logits.numpy(), 1e-5)
    elif head == "span":
        expected = np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
        close(ours * real, expected * real, 1e-5)
    else:
        close(ours * real, out.logits.numpy() * real, 1e-5)
    other.save_pretrained(tmp_path / "again")
    again, weights = sftjax.load_pretrained(tmp_path / "again")
    assert (again.config.head, again.source.labels) == (head, model.source.labels)
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert all(np.array_equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "modernbert"])
def test_gradients_of_a_masked_language_model(name, tmp_path):
    path = write(name, tmp_path / "in")
    model, params = sftjax.load_pretrained(path, head="vocabulary")
    sftjax.save_pretrained(tmp_path / "mlm", model, params)
    other = theirs(tmp_path / "mlm", transformers.AutoModelForMaskedLM)
    given = batch(64, [24, 9, 17, 5])
    del given["token_types"]
    given["tokens"][given["tokens"] == 1] = 2  # RoBERTa's padding, which it does not count
    rng = np.random.default_rng(1)
    masked = (rng.random(given["tokens"].shape) < 0.3) & (given["segments"] > 0)
    targets = rng.integers(0, 64, masked.shape)
    positions = np.broadcast_to(np.arange(24), masked.shape)
    more = dict(targets=targets, weights=masked.astype(np.float32), positions=positions)

    def loss(params):
        out = sftjax.losses.causal_lm(model)(params, given | more, None)
        return out.sum / out.weight

    value, ours = jax.jit(jax.value_and_grad(loss))(params)
    labels = torch.tensor(np.where(masked, targets, -100))
    expected = other(**inputs(given), labels=labels).loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.grad)
    other.save_pretrained(tmp_path / "grads")
    _, theirs_ = sftjax.load_pretrained(tmp_path / "grads")
    zero = [f"layers/{name}/attn/k/b" for name in ours["layers"]]
    close_norms(ours, theirs_, 1e-4, zero=tuple(zero))


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification"])
def test_other_heads_are_left_out_and_said(kind, tmp_path, caplog):
    torch.manual_seed(0)
    other = getattr(transformers, kind)(transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, num_labels=3,
    )).eval()  # fmt: skip
    other.save_pretrained(tmp_path / "in")
    model, params = sftjax.load_pretrained(tmp_path / "in", labels=LABELS)
    assert len(caplog.messages) == 1 and "made anew from seed 0" in caplog.text
    head = "classifier." if "Token" in kind else "cls."
    assert f"({head}" in caplog.text and "score/w" in caplog.text
    assert ("pooler/w" in caplog.text) is (kind != "BertForPreTraining")
    given = batch(64, [24, 9])
    with torch.no_grad():
        expected = other.bert(**inputs(given)).last_hidden_state.numpy()
    real = given["segments"][..., None]
    close(model.hidden(params, given) * real, expected * real, 1e-5)
    sftjax.save_pretrained(tmp_path / "out", model, params)
    theirs(tmp_path / "out", transformers.BertForSequenceClassification)
    sftjax.save_pretrained(tmp_path / "body", *sftjax.load_pretrained(tmp_path / "in", classes=0))
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]


def test_files_with_gamma_and_beta(tmp_path):
    path = write("bert", tmp_path / "in")
    tensors = load_file(path / "model.safetensors")
    old = {
        "bert." + k.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }  # fmt: skip
    _, expected = sftjax.load_pretrained(path)
    save_file(old, path / "model.safetensors", metadata={"format": "pt"})
    model, params = sftjax.load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    sftjax.save_pretrained(tmp_path / "out", model, params)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == old.keys()
    theirs(tmp_path / "out", transformers.BertModel)


FEW = ["llama", "llama-tied", "gpt2", "gpt_neox", "gemma2", "gemma3", "qwen3_moe"]


@pytest.mark.parametrize("name", FEW)
def test_a_decoder_with_a_head_of_classes(name, tmp_path, caplog):
    path = write(name, tmp_path / "in")
    config = json.loads((path / "config.json").read_text()) | {"pad_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    model, params = sftjax.load_pretrained(path, labels=LABELS)
    assert model.reads == "last" and "head" not in params
    assert len(caplog.messages) == 1 and "score/w" in caplog.text
    sftjax.save_pretrained(tmp_path / "out", model, params)
    other = theirs(tmp_path / "out", transformers.AutoModelForSequenceClassification)
    assert other.config.id2label == dict(enumerate(LABELS))
    given = batch(CASES[name]["vocab_size"], [24, 9, 17])
    del given["token_types"]
    with torch.no_grad():
        expected = other(**inputs(given)).logits.numpy()
    close(logits(model, params, given), expected, 1e-5)
    other.save_pretrained(tmp_path / "again")
    again, weights = sftjax.load_pretrained(tmp_path / "again")
    assert again.source.labels == LABELS
    jax.tree.map(np.testing.assert_array_equal, weights, params)


def test_a_decoder_classifiers_gradients(tmp_path):
    _, body = sftjax.load_pretrained(write("llama", tmp_path / "in"))
    model, params = sftjax.load_pretrained(tmp_path / "in", labels=LABELS)
    sftjax.save_pretrained(tmp_path / "out", model, params)
    other = theirs(tmp_path / "out", transformers.LlamaForSequenceClassification)
    given, labels = batch(64, [24, 24]), np.array([0, 2])
    del given["token_types"]

    def loss(params):
        out = model.class_logits(params, model.hidden(params, given))[:, -1]
        return -jnp.mean(jax.nn.log_softmax(out)[jnp.arange(2), labels])

    ours = jax.jit(jax.grad(loss))(params)
    F.cross_entropy(other(**inputs(given)).logits, torch.tensor(labels)).backward()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.grad)
    other.save_pretrained(tmp_path / "grads")
    close_norms(ours, sftjax.load_pretrained(tmp_path / "grads")[1], 1e-4)
    assert params_lib.count(params["layers"]) == params_lib.count(body["layers"])
