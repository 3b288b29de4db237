"""transformers and torch as the reference: logits, gradients, text, files, optimizers, training.

Random weights from transformers' own classes, at sizes that exercise every feature, fp32 on a CPU.
SFTJAX_REQUIRE_PARITY=1 makes a missing torch a failure instead of a skip.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sftjax
from sftjax import config as config_lib
from sftjax import optim
from sftjax import params as params_lib
from sftjax.generate import generate
from sftjax.models import hf as hf_lib
from sftjax.params import Param

if os.environ.get("SFTJAX_REQUIRE_PARITY") == "1":
    import torch
else:
    torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.parity

BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=False, attn_implementation="eager",
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=24,
)  # fmt: skip
CASES = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "odd": dict(
        hidden_size=27, head_dim=10, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=45, vocab_size=67, attention_bias=True,
    ),
    "llama3": dict(rope_parameters=LLAMA3),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """case -> (transformers' model, directory, sftjax model, params), each made once."""

    @functools.cache
    def case(name):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**(BASE | CASES[name]))
        reference = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():  # as large as trained ones, and no parameter at its neutral value
            for key, p in reference.named_parameters():
                one = 1.0 if "norm" in key else 0.0
                std = 0.1 if p.ndim == 1 else 0.7 * p.shape[1] ** -0.5
                p.copy_(one + std * torch.randn_like(p))
        reference.generation_config.eos_token_id = None  # generate() would take it from there
        path = tmp_path_factory.mktemp(name)
        reference.save_pretrained(path, safe_serialization=True)
        return reference, path, *sftjax.load_pretrained(path)

    return case


def logits_of(model, params, tokens):
    return jax.jit(model.apply)(params, {"tokens": tokens})


def random_tokens(vocab, rows=4, length=48, seed=0):
    return np.random.default_rng(seed).integers(1, vocab, (rows, length)).astype(np.int32)


def reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def close(ours, reference, tolerance):
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()
    assert error <= tolerance, error


def close_norms(ours, reference, tolerance):
    ours, reference = params_lib.flatten(ours), params_lib.flatten(reference)
    assert ours.keys() == reference.keys()
    for name, x in ours.items():
        ref = np.asarray(reference[name])
        assert np.linalg.norm(ref) > 0, name
        error = np.linalg.norm(np.asarray(x) - ref) / np.linalg.norm(ref)
        assert error <= tolerance, f"{name}: {error}"


def padded(rng, vocab, lengths, width=40):
    """A Batch of one right-padded document a row, a prompt of a third of it masked."""
    tokens = rng.integers(1, vocab, (len(lengths), width)).astype(np.int32)
    at, lengths = np.arange(width), np.array(lengths)[:, None]
    segments = (at < lengths).astype(np.int32)
    weights = ((at >= lengths // 3) & (at < lengths - 1)).astype(np.float32)
    return {
        "tokens": tokens * segments,
        "targets": np.roll(tokens, -1, 1) * (at < lengths - 1),
        "weights": weights,
        "positions": at * segments,
        "segments": segments,
    }


def reference_loss(reference, batch, **how):
    """Mean cross-entropy over the trained targets; the rest is torch's ignore_index."""
    mask = torch.tensor(batch["segments"], dtype=torch.long)
    logits = reference(torch.tensor(batch["tokens"], dtype=torch.long), attention_mask=mask).logits
    labels = torch.tensor(np.where(batch["weights"] > 0, batch["targets"], -100), dtype=torch.long)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, **how)


# ---- one forward and backward pass ---------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits(make, name):
    reference, _, model, params = make(name)
    tokens = random_tokens(model.config.vocab)
    close(logits_of(model, params, tokens), reference_logits(reference, tokens), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_logits_in_bfloat16(make, name):
    """The first choices agree wherever fp32 has one: where its two best logits are not a tie.

    transformers' own bf16 and fp32 first choices agree at only 98% of all positions here.
    """
    _, path, *_ = make(name)
    rounded = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model, params = sftjax.load_pretrained(path, dtype=jnp.bfloat16)
    tokens = random_tokens(model.config.vocab, rows=8, length=64)
    ours = np.asarray(logits_of(model.replace(dtype="bfloat16"), params, tokens))
    theirs = reference_logits(rounded, tokens)
    close(ours, theirs, 2e-2)
    exact = np.sort(reference_logits(rounded.float(), tokens), -1)
    clear = exact[..., -1] - exact[..., -2] > 5e-3 * np.abs(exact).max()
    agree = (ours.argmax(-1) == theirs.argmax(-1))[clear].mean()
    assert clear.mean() > 0.9 and agree >= 0.99


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_parameter(make, name, tmp_path):
    reference, path, model, params = make(name)
    batch = padded(np.random.default_rng(1), model.config.vocab, [40, 7, 23, 31])
    reference.zero_grad()
    loss = reference_loss(reference, batch)
    loss.backward()
    reference.config.save_pretrained(tmp_path)
    grads = {k: p.grad for k, p in reference.named_parameters()}
    save_file(grads, tmp_path / "model.safetensors")
    expected = hf_lib.load_params(model, tmp_path)[1]

    def mean(params):
        out = sftjax.losses.causal_lm(model)(params, batch, None)
        return out.sum / out.weight

    value, ours = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    close_norms(ours, expected, 1e-4)


def test_label_smoothing(make):
    reference, _, model, params = make("gqa")
    batch = padded(np.random.default_rng(2), 64, [40, 12, 33])
    for smoothing in (0.1, 0.5):
        loss_fn = jax.jit(sftjax.losses.causal_lm(model, label_smoothing=smoothing))
        out = loss_fn(params, batch, None)
        expected = reference_loss(reference, batch, label_smoothing=smoothing).item()
        np.testing.assert_allclose(out.sum / out.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_in_an_uneven_batch(make, name):
    reference, _, model, params = make(name)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 64, n).tolist() for n in (3, 70, 1, 17)]
    ours = generate(model, params, prompts, max_new_tokens=64)
    settings = dict(max_new_tokens=64, do_sample=False, pad_token_id=0)
    for prompt, answer in zip(prompts, ours, strict=True):
        tokens = torch.tensor([prompt])
        config = transformers.GenerationConfig(**settings)
        expected = reference.generate(tokens, generation_config=config)[0, len(prompt) :].tolist()
        assert len(answer) == 64 and answer == expected
    stop = ours[0][5]  # and it stops where transformers does
    config = transformers.GenerationConfig(**settings, eos_token_id=[stop])
    expected = reference.generate(torch.tensor(prompts[:1]), generation_config=config)[0, 3:]
    cut = generate(model, params, prompts[:1], max_new_tokens=64, stop_ids=[stop])
    assert [*cut[0], stop] == expected.tolist()


# ---- files ---------------------------------------------------------------------------------


def reload(path):
    reference, info = transformers.LlamaForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return reference.eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_reads_back_every_tensor_bit_for_bit(make, name, dtype, tmp_path):
    reference, path, *_ = make(name)
    if dtype != torch.float32:
        path = tmp_path / "in"
        transformers.LlamaForCausalLM.from_pretrained(make(name)[1], dtype=dtype).save_pretrained(
            path
        )
    model, params = sftjax.load_pretrained(path)
    out = tmp_path / "out"
    sftjax.save_pretrained(out, model, params, max_shard_bytes=20_000)
    again = reload(out)
    before, after = load_file(path / "model.safetensors"), again.state_dict()
    assert again.config.to_dict() == reload(path).config.to_dict() | {"_name_or_path": str(out)}
    assert after.keys() - before.keys() == ({"lm_head.weight"} if name == "tied" else set())
    for key, value in before.items():
        assert after[key].dtype == value.dtype == dtype
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("name", ["gqa", "tied", "odd", "llama3"])
def test_transformers_reads_what_a_train_step_made(make, name, tmp_path):
    reference, _, model, params = make(name)
    vocab = model.config.vocab
    tx = optax.adamw(1e-2)
    state = sftjax.TrainState.create(params=params, tx=tx)
    batch = padded(np.random.default_rng(4), vocab, [40, 22])
    step = functools.partial(sftjax.train_step, loss_fn=sftjax.losses.causal_lm(model), tx=tx)
    state, _ = jax.jit(step)(state, batch)
    sftjax.save_pretrained(tmp_path, model, state.all_params)
    tokens = random_tokens(vocab)
    ours = logits_of(model, state.all_params, tokens)
    close(ours, reference_logits(reload(tmp_path), tokens), 1e-5)
    assert np.abs(ours - reference_logits(reference, tokens)).max() > 0.1


# ---- training ------------------------------------------------------------------------------


def settings(**changes):
    c = config_lib.get_default().optim
    c.update(changes)
    return c


OPTIMIZERS = {
    "adamw": (dict(weight_decay=0.1), torch.optim.AdamW, dict(weight_decay=0.1)),
    "adam": ({}, torch.optim.Adam, {}),
    "sgd": (dict(momentum=0.9), torch.optim.SGD, dict(momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps(name):
    changes, kind, theirs = OPTIMIZERS[name]
    normal = jax.nn.initializers.normal(1.0)
    abstract = {"a": Param((5, 3), (None, None), normal), "b": Param((7,), (None,), normal)}
    c = settings(name=name, clip=0.0, decay=((".*", 1.0),), **changes)
    everything = params_lib.map_named(lambda *_: True, abstract)
    tx = optim.make(c, lambda _: 0.01, abstract, everything)
    params = params_lib.init(abstract, jax.random.key(0))
    copies = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in params.items()}
    optimizer, state = kind(copies.values(), lr=0.01, **theirs), tx.init(params)
    rng = np.random.default_rng(5)
    for _ in range(10):
        grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k, p in copies.items():
            p.grad = torch.tensor(grads[k])
        optimizer.step()
        for k, p in copies.items():
            close(params[k], p.detach().numpy(), 1e-6)


def unpack(batch):
    """Every document of a packed Batch in a right-padded row of its own."""
    rows = []
    for r, segments in enumerate(batch["segments"]):
        for s in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == s)
            rows.append({k: np.pad(v[r, here], (0, 16 - len(here))) for k, v in batch.items()})
            rows[-1]["segments"] = (rows[-1]["segments"] > 0).astype(np.int32)
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def torch_curve(path, batches, c, warmup):
    """A plain loop: AdamW without decay on norms and biases, clipping, warm-up and cosine."""
    model = reload(path)
    flat = {k: p.ndim == 1 for k, p in model.named_parameters()}
    groups = [
        dict(
            params=[p for k, p in model.named_parameters() if flat[k] is plain], weight_decay=decay
        )
        for plain, decay in [(False, c.weight_decay), (True, 0.0)]
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.b1, c.b2), eps=c.eps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    losses = []
    for batch in batches:
        loss = reference_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("name", ["biases", "tied"])
def test_ten_training_steps(make, name):
    _, path, model, params = make(name)
    steps, warmup = 10, 3
    c = settings(lr=3e-3, weight_decay=0.1, clip=1.0)
    packed = [tiny.batch(rows=8, seed=i) for i in range(steps)]
    unpacked = [unpack(b) for b in packed]
    expected = torch_curve(path, unpacked, c, warmup)
    lr = optim.schedule("cosine", c.lr, steps, warmup)
    everything = params_lib.map_named(lambda *_: True, model.abstract)
    for batches, micro in [(packed, 1), (packed, 4), (unpacked, 1)]:
        tx = optim.make(c, lr, model.abstract, everything)
        loss_fn = sftjax.losses.causal_lm(model)
        step = jax.jit(
            functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=micro)
        )
        state, losses = sftjax.TrainState.create(params=params, tx=tx), []
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
