"""BERT and heads of classes: transformers' stored numbers, packing, dropout, meshes, errors.

golden/make_encoder.py made the numbers; test_parity_encoder.py compares with transformers itself.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import BERT, BODIES, HEADS, case, headed, said, write
from safetensors.numpy import load_file, save_file

import sftjax
from sftjax import hf as hf_lib
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.evaluation.generation import generate
from sftjax.hf.safetensors_io import WeightsError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "encoder.json").read_text())
SMALL = GOLDEN["small"]
LENGTH, LABELS = 56, np.array([0, 2, 1, 2])
NAMES = ("no", "maybe", "yes")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return sftjax.load_pretrained(write("bert-classes", tmp_path_factory.mktemp("bert")))


def rows(documents, length=LENGTH):
    """A Batch: each row a list of documents, one after another; the second half of each is of the
    other token type."""
    keys = ("tokens", "positions", "segments", "token_types")
    out = {k: np.zeros((len(documents), length), np.int32) for k in keys}
    for row, docs in enumerate(documents):
        at = 0
        for segment, d in enumerate(docs, 1):
            here, n = (row, slice(at, at + len(d))), len(d)
            out["tokens"][here], out["segments"][here] = d, segment
            out["positions"][here], out["token_types"][here] = np.arange(n), np.arange(n) >= n // 2
            at += n
    return out


PADDED = rows([[d] for d in SMALL["documents"]])


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch, rng=None):
    """float32 [B, S, C]."""
    return model.class_logits(params, model.outputs(params, batch, rng)[0], rng)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, labels, rng=None):
    def loss(params):
        out = jax.nn.log_softmax(logits(model, params, batch, rng)[:, 0])
        return -jnp.mean(jnp.take_along_axis(out, labels[:, None], 1))

    return jax.value_and_grad(loss)(params)


def close(ours, expected, tolerance=1e-5):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def close_grads(ours, expected):
    ours, expected = params_lib.flatten(ours), params_lib.flatten(expected)
    assert ours.keys() == expected.keys()
    least = 1e-2 * max(np.abs(x).max() for x in expected.values())
    for name, b in expected.items():
        error = np.abs(np.asarray(ours[name]) - np.asarray(b)).max() / max(np.abs(b).max(), least)
        assert error <= 1e-5, (name, error)


# ---- the numbers of transformers -----------------------------------------------------------


def test_golden_logits_loss_and_gradients(bert, tmp_path):
    model, params = bert
    assert model.reads == "first" and model.source.labels == NAMES
    close(logits(model, params, PADDED)[:, 0], SMALL["logits"])
    loss, grads = loss_and_grads(model, params, PADDED, LABELS)
    close(loss, SMALL["loss"])
    sftjax.save_pretrained(tmp_path, model, grads)  # as if they were weights
    norms = {k: np.linalg.norm(x) for k, x in load_file(tmp_path / "model.safetensors").items()}
    expected = SMALL["gradients"]
    # A bias on the keys moves all scores of a query alike: its gradient is rounding.
    assert norms == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in expected.items()}


@pytest.mark.fixtures
def test_golden_numbers_of_real_weights_whose_files_come_back_bit_equal(fixtures, tmp_path):
    path, golden = fixtures / "minilm-l6", GOLDEN["minilm-l6"]
    model, params = sftjax.load_pretrained(path)
    docs = golden["documents"]
    hidden = jax.jit(model.hidden)(params, rows([[d] for d in docs], 64))
    last = np.stack([hidden[i, len(d) - 1, :8] for i, d in enumerate(docs)])
    close(last, golden["hidden"])
    close(model.pooled(params, hidden)[:, 0, :8], golden["pooled"])
    sftjax.save_pretrained(tmp_path, model, params)
    old, new = (load_file(d / "model.safetensors") for d in (path, tmp_path))
    old.pop("embeddings.position_ids")  # follows from the config
    assert old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("head", [h if h == "vocabulary" else pytest.param(h, marks=pytest.mark.slow) for h in HEADS])
@pytest.mark.parametrize("name", BODIES)
def test_golden_logits_of_every_head_on_every_encoder(name, head, tmp_path):
    model, params = headed(name, head, tmp_path)
    given, at = rows([[GOLDEN["heads"]["document"]]]), 0 if head == "document" else 16
    del given["token_types"]
    found = jax.jit(lambda p: said(model, p, given))(params)[0, at, :8]
    close(found, GOLDEN["heads"]["logits"][f"{name} {head}"])


@pytest.mark.parametrize("name", ["roberta", "modernbert-biases"])
def test_packed_documents_are_as_alone_in_windows_and_in_means(name, tmp_path):
    model, params = headed(name, "document", tmp_path)
    docs = [[(7 * i + j) % 60 + 2 for j in range(n)] for i, n in enumerate((23, 5, 17))]
    packed, alone = rows([docs]), rows([[d] for d in docs])
    for batch in (packed, alone):
        del batch["token_types"]
    run = jax.jit(lambda p, b: said(model, p, b))
    found, starts = np.asarray(run(params, packed))[0], np.cumsum([0, 23, 5])
    close(found[starts], np.asarray(run(params, alone))[:, 0])


# ---- documents in a row --------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["blockwise", "xla"])
def test_documents_of_one_row_are_as_each_in_a_row_of_its_own(bert, backend):
    model, params = bert[0].replace(attention=backend), bert[1]
    docs = SMALL["documents"]
    packed = np.asarray(logits(model, params, rows([docs, [], [], []])))[0]
    starts = np.cumsum([0, *map(len, docs)])[:-1]
    alone = np.asarray(logits(model, params, PADDED))
    close(packed[starts], alone[:, 0])
    other = [[(t + 7) % 63 + 1 for t in docs[0]], *docs[1:]]
    changed = np.asarray(logits(model, params, rows([other, [], [], []])))[0]
    np.testing.assert_array_equal(packed[starts[1:]], changed[starts[1:]])
    # Both directions: the first token depends on the last.
    last = [[*docs[0][:-1], docs[0][-1] % 63 + 1], *docs[1:]]
    assert not np.allclose(logits(model, params, rows([last, [], [], []]))[0, 0], packed[0])


# ---- dropout -------------------------------------------------------------------------------


def test_dropout_acts_with_a_key_only_and_follows_the_key(bert):
    model, params = bert
    off = np.asarray(logits(model, params, PADDED))
    without = model.replace(dropout=0.0, head_dropout=0.0)
    np.testing.assert_array_equal(off, logits(without, params, PADDED, jax.random.key(0)))
    one, again, two = (logits(model, params, PADDED, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(np.asarray(one - two))[:, 0].max() > 0.1
    assert np.abs(np.asarray(one - off))[:, 0].max() > 0.1


def test_dropout_drops_its_share_and_keeps_the_mean():
    from sftjax.ops import dropout

    x = jnp.ones((8, 64, 33))
    [seed] = dropout.seeds(jax.random.key(0), 1)
    y = np.asarray(dropout.dropout(x, 0.1, seed, dropout.ids((8, 64))))
    assert abs((y == 0).mean() - 0.1) < 0.01 and abs(y.mean() - 1) < 0.01
    assert np.unique(y).size == 2
    # No two tokens, and no two elements of a token, share their bits.
    masks = y.reshape(-1, 33) == 0
    assert len(np.unique(masks, axis=0)) > 450
    assert np.abs(np.corrcoef(masks.T) - np.eye(33)).max() < 0.2


def test_masks_differ_between_layers_and_do_not_depend_on_how_a_stack_is_cut(bert):
    model, params = bert
    key, stack = jax.random.key(3), params["layers"]["0-2"]
    cut = {"0-0": jax.tree.map(lambda x: x[:1], stack), "1-2": jax.tree.map(lambda x: x[1:], stack)}
    expected = logits(model, params, PADDED, key)
    close(logits(model.replace(split=(1,)), params | {"layers": cut}, PADDED, key), expected)


# ---- ways to run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(bert):
    """(loss, gradients) of eight rows with dropout on one device."""
    return loss_and_grads(*bert, *eight(), jax.random.key(5))


def eight():
    docs = SMALL["documents"]
    batch = rows([[d] for d in docs + docs[::-1]])
    return batch, np.concatenate([LABELS, LABELS[::-1]])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "none"])
def test_activation_checkpoints_change_nothing(bert, plain, remat):
    loss, grads = loss_and_grads(bert[0].replace(remat=remat), bert[1], *eight(), jax.random.key(5))
    close(loss, plain[0])
    close_grads(grads, plain[1])


MESHES = [
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"context": 2, "fsdp": 4}, marks=pytest.mark.slow),
    pytest.param({"context": 2, "data": 4}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_meshes_drop_and_compute_what_one_device_does(bert, plain, sizes):
    (model, params), (batch, labels) = bert, eight()
    mesh = parallel.make_mesh(sizes)
    with jax.set_mesh(mesh):
        layout = parallel.param_shardings(mesh, model.abstract)
        params = jax.device_put(params, layout)
        batch = parallel.put_batch(mesh, batch | {"labels": labels}, len(labels))
        labels = batch.pop("labels")
        loss, grads = loss_and_grads(model, params, batch, labels, jax.random.key(5))
    close(loss, plain[0])
    close_grads(grads, plain[1])


def test_a_decoder_drops_too_and_without_a_key_is_bit_equal():
    model = tiny.model()
    params, batch = tiny.params(model), tiny.batch()
    apply = jax.jit(lambda m, key: m.outputs(params, batch, key)[0], static_argnums=0)
    off, key = apply(model, None), jax.random.key(0)
    np.testing.assert_array_equal(off, apply(model, key))
    np.testing.assert_array_equal(off, apply(model.replace(dropout=0.1), None))
    assert np.abs(np.asarray(off - apply(model.replace(dropout=0.1), key))).max() > 0.1


def test_flops_count_pairs_in_both_directions_and_a_head_that_reads_labels(bert):
    model, n = bert[0], 10
    c, on = model.config, jax.tree.map(lambda p: True, model.abstract, is_leaf=params_lib.is_param)
    flops = model.train_flops(on)
    pairs = lambda _: n * (n + 1) / 2  # noqa: E731
    assert flops(n, 0, pairs) - flops(n, 0, lambda _: n / 2) == 3 * 4 * 32 * n * n * c.layers
    assert flops(0, 1, lambda _: 0) == 6 * (c.width * c.width + c.classes * c.width)


# ---- heads ---------------------------------------------------------------------------------


def test_a_bare_model_gets_a_head_and_is_saved_as_a_classifier(tmp_path, caplog):
    path = write("bert", tmp_path / "in")
    tensors = load_file(path / "model.safetensors")
    bare = {k.removeprefix("bert."): v for k, v in tensors.items()}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    model, params = sftjax.load_pretrained(path, labels=["a", "b"], seed=3)
    assert caplog.messages == [f"{path}: 2 are made anew from seed 3 (score/w, score/b)"]
    expected = params_lib.init(model.abstract, jax.random.key(3))["score"]
    jax.tree.map(np.testing.assert_array_equal, params["score"], expected)
    assert model.attention_features == {"bidirectional"} and model.state is None

    sftjax.save_pretrained(tmp_path / "out", model, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "a", "1": "b"} and config["label2id"] == {"a": 0, "b": 1}
    assert "problem_type" not in config
    assert not (tmp_path / "out" / "generation_config.json").exists()
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == tensors.keys() | {"classifier.weight", "classifier.bias"}
    caplog.clear()
    again, weights = sftjax.load_pretrained(tmp_path / "out")
    assert again.source.labels == ("a", "b") and not caplog.messages
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    body, _ = sftjax.load_pretrained(tmp_path / "out", classes=0)
    assert body.config.classes == 0 and "2 tensors of another head are left out" in caplog.text


def test_a_head_made_on_a_mesh_is_that_of_one_device(tmp_path):
    path = write("bert", tmp_path)
    _, expected = sftjax.load_pretrained(path, labels=NAMES)
    mesh = parallel.make_mesh({"fsdp": 8})
    _, params = sftjax.load_pretrained(path, labels=NAMES, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_decoder_takes_a_head_of_classes_instead_of_its_vocabulary(tmp_path, caplog):
    path = write("llama", tmp_path / "in")
    model, params = sftjax.load_pretrained(path, labels=NAMES)
    assert caplog.messages == [
        f"{path}: 1 tensors of another head are left out (lm_head.weight); 1 are made anew from seed 0 (score/w)"
    ]
    assert model.reads == "last" and params["score"]["w"].shape == (3, 32) and "head" not in params
    batch = {"tokens": np.arange(12).reshape(2, 6)}
    out = logits(model, params, batch)
    assert out.shape == (2, 6, 3) and out.dtype == jnp.float32
    sftjax.save_pretrained(tmp_path / "out", model, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again, weights = sftjax.load_pretrained(tmp_path / "out", labels=NAMES)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    for wrong in (lambda: model.apply(params, batch), lambda: generate(model, params, [[1]])):
        with pytest.raises(ValueError, match="vocabulary.* the directory of a causal language mo"):
            wrong()


# ---- what is refused -----------------------------------------------------------------------


def config(tmp_path, **fields):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(case("bert", BERT) | fields))
    return file


TWO = dict(architectures=["BertForSequenceClassification"], id2label={"0": "negative", "1": "positive"})


@pytest.mark.parametrize(
    ("fields", "how", "message"),
    [
        (TWO, dict(labels=["a", "b", "c"]),
         r"3 labels \(a, b, c\) asked for, but the files \(id2label\) have a head of 2 labels"
         r" \(negative, positive\); give 2 labels, or take a directory without"),
        (TWO, dict(labels=["positive", "negative"]), "another order, which is .'negative', 'posit"),
        (TWO, dict(classes=3), r"classes=3, but the files have a head of 2 labels \(negative, po"),
        ({}, dict(labels="ab"), "labels='ab', expected names in a row: "),
        ({}, dict(labels=[]), r"labels=\(\), expected one or more names"),
        ({}, dict(labels=["a", "a"]), r"labels=\('a', 'a'\), expected .* all of them different"),
        ({}, dict(labels=["a"], classes=2), "classes=2, but there are 1 labels"),
        (TWO | {"id2label": {"0": "a", "2": "b"}}, {}, "id2label has the keys .* expected 0, 1, "),
        (TWO | {"id2label": ["a"]}, {}, r"id2label is \['a'\], expected an object"),
        (dict(position_embedding_type="relative_key"), {},
         "position_embedding_type='relative_key' is not supported, only 'absolute'"),
        (dict(is_decoder=True), {}, "is_decoder=True is not supported, only False"),
        (dict(add_cross_attention=True), {}, "add_cross_attention=True is not supported, only Fal"),
        (dict(hidden_act="mish"), {}, "hidden_act 'mish' is not supported; known: silu, relu, gel"),
        (dict(hidden_dropout_prob=1.0), {},
         "hidden_dropout_prob is 1.0, expected a number from 0 to below 1"),
        (dict(num_attention_heads=5), {}, "hidden_size=32 does not divide over num_attention_head"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_cannot_be(tmp_path, fields, how, message):
    file = config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as e:
        hf_lib.load_model(file, **how)
    assert str(e.value).startswith(f"{file}: ")


def test_labels_that_a_directory_does_not_name(tmp_path):
    bare = dict(architectures=TWO["architectures"])
    assert hf_lib.load_model(config(tmp_path, **bare)).source.labels == ("LABEL_0", "LABEL_1")
    named = hf_lib.load_model(config(tmp_path, **TWO), labels=["bad", "good"])
    assert named.source.labels == ("bad", "good") and named.config.classes == 2
    assert hf_lib.load_model(config(tmp_path, **TWO), classes=0).config.classes == 0
    assert hf_lib.load_model(config(tmp_path), classes=1).source.labels == ("LABEL_0",)


def test_a_classifiers_files_must_hold_its_head_and_nothing_strange(tmp_path):
    path = write("bert-classes", tmp_path)
    tensors = load_file(path / "model.safetensors")

    def refused(change, message):
        save_file(tensors | change, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=message):
            sftjax.load_pretrained(path)

    extra = np.zeros((3, 32), np.float32)
    refused({"bert.strange": extra}, r"unexpected bert.strange \[3, 32\]")
    refused({"classifier.weight": extra[:2]}, r"classifier.weight has shape \[2, 32\], .* \[3, 32\]")
    del tensors["classifier.weight"]
    refused({}, r"missing classifier.weight \[3, 32\]")


def test_lengths_and_vocabularies_are_refused_with_the_fix(bert):
    model, params = bert
    with pytest.raises(ValueError, match="data.max_length=129: the model has 128 positions, all"):
        model.check_length(129, "data.max_length=129")
    with pytest.raises(ValueError, match="3 classes and no vocabulary head; load it with"):
        sftjax.losses.causal_lm(model)(params, tiny.batch(), None)
    with pytest.raises(ValueError, match="generate: this model has no vocabulary head"):
        generate(model, params, [[1, 2]])
