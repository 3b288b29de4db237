"""The decoder: cache, scan and remat change nothing, generation, FLOPs, real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sftjax
from sftjax import params as params_lib
from sftjax.evaluation.generation import generate
from sftjax.models import decoder, flops
from sftjax.ops import rope
from sftjax.ops.attention import attention, check


@pytest.fixture(scope="module")
def setup():
    model = tiny.model(qkv_bias=True)
    return model, tiny.params(model), tiny.batch()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"scan": False}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        {"remat": "dots"},
        pytest.param({"remat": "dots_saveable"}, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_scan_and_remat_change_no_gradient(setup, how):
    model, params, batch = setup

    def grads(m):
        loss_fn = sftjax.losses.causal_lm(m)
        return jax.jit(jax.grad(lambda p: loss_fn(p, batch, None).sum))(params)

    for a, b in zip(jax.tree.leaves(grads(model)), jax.tree.leaves(grads(model.replace(**how))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_a_split_stack_is_the_same_model(setup):
    model, params, batch = setup
    split = model.replace(split=(1, 3))
    stack = params["layers"]["0-3"]
    cut = {
        name: jax.tree.map(lambda x, a=a, b=b: x[a:b], stack)
        for name, (a, b) in {"0-0": (0, 1), "1-2": (1, 3), "3-3": (3, 4)}.items()
    }
    np.testing.assert_allclose(model.apply(params, batch), split.apply(params | {"layers": cut}, batch), atol=1e-5)
    with pytest.raises(ValueError, match=r"model.split=\(3, 1\) must rise"):
        decoder.stacks(model.replace(split=(3, 1)).config)


def test_remat_and_attention_names_are_checked(setup):
    model, params, batch = setup
    with pytest.raises(ValueError, match="model.remat='ful' is none of"):
        model.replace(remat="ful").apply(params, batch)
    with pytest.raises(ValueError, match="model.attention='flash' is unknown; the backends are"):
        check("flash")


def test_blockwise_scores_are_float32_in_bfloat16_too():
    """Its error against float32 is the reference backend's, not a bf16 softmax's."""
    rng, S = np.random.default_rng(0), 256
    q, k, v = (jnp.bfloat16(3 * rng.normal(size=(1, S, 2, 128))) for _ in range(3))
    where = dict(segments=jnp.ones((1, S), jnp.int32), positions=jnp.arange(S)[None])
    exact = attention(*map(jnp.float32, (q, k, v)), **where, backend="xla")
    error = {
        name: float(jnp.linalg.norm(attention(q, k, v, **where, backend=name) - exact)) for name in ("xla", "blockwise")
    }
    assert error["blockwise"] < 1.2 * error["xla"]


def test_rope_variants():
    def frequencies(**scaling):
        freqs, factor = rope.frequencies(rope.Rope(10_000.0, 0, tuple(scaling.items())), 8)
        assert factor == 1
        return freqs

    base = frequencies()
    np.testing.assert_allclose(base, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(frequencies(rope_type="linear", factor=4.0), base / 4, rtol=1e-6)
    llama3 = frequencies(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=128,
    )  # fmt: skip
    # Wavelengths 6.3 (kept), 63 (between: 128/63 = 2.04 turns), 628 and 6283 (divided by 8).
    ramp = (128 * 0.1 / (2 * np.pi) - 1) / 3
    expected = [1, (1 - ramp) * 0.1 / 8 + ramp * 0.1, 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(llama3, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="rope type 'twisted' is not supported; known: default"):
        frequencies(rope_type="twisted")


@pytest.mark.slow  # a compile for each length
def test_greedy_generation_with_a_cache_equals_recomputing_everything(setup):
    model, params, _ = setup
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 64, n).tolist() for n in (3, 17, 1, 9, 70)]
    answers = generate(model, params, prompts, max_new_tokens=12, batch_size=2)
    apply = jax.jit(lambda tokens: model.apply(params, {"tokens": tokens}))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in range(12):  # what stands behind a token changes nothing: one width, one program
            logits = apply(jnp.array([tokens + [0] * (96 - len(tokens))]))
            tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
        assert answer == tokens[len(prompt) :]
    stop = answers[1][4]
    cut = generate(model, params, prompts[1:2], max_new_tokens=12, stop_ids=[stop])[0]
    assert cut == answers[1][: answers[1].index(stop)]
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model, params, [[]])


def test_sampling_follows_temperature_top_k_and_top_p(setup):
    model, params, _ = setup
    from sftjax.evaluation.generation import sample

    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4000))

    def share(temperature, top_k=0, top_p=1.0):
        ids = sample(logits, jax.random.key(0), temperature, top_k, top_p)
        return np.bincount(ids, minlength=4) / len(ids)

    np.testing.assert_allclose(share(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(share(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    assert share(temperature=0)[0] == 1
    twice = [generate(model, params, [[1, 2]], temperature=1.0, seed=3, max_new_tokens=8) for _ in range(2)]
    assert twice[0] == twice[1]


def test_flops_formula_counts_what_xla_counts():
    model = tiny.model(scan=False, layers=2)
    params, batch = tiny.params(model), tiny.batch()
    batch = batch | {"weights": np.zeros_like(batch["weights"])}  # without the head
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(jax.grad(lambda p: loss_fn(p, batch, None).sum))
    counted = step.lower(params).compile().cost_analysis()["flops"]
    cells = batch["tokens"].size
    everything = jax.tree.map(lambda _: True, model.abstract, is_leaf=params_lib.is_param)
    mine = flops.train_flops(model.config, everything)(cells, 0, lambda _: cells * 32)
    assert 0.8 < mine / counted < 1.05  # XLA counts norms, softmax and the like too


@pytest.mark.fixtures
def test_stories260k_reproduces_the_reference_facts(fixtures):
    from transformers import AutoTokenizer

    path = fixtures / "stories260K-hf"
    model, params = sftjax.load_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("Once upon a time").input_ids
    logits = model.apply(params, {"tokens": jnp.array([prompt])})[0, -1]
    top = {tokenizer.convert_ids_to_tokens(int(i)): float(logits[i]) for i in jnp.argsort(-logits)[:3]}
    assert list(top) == [",", "▁there", "▁in"]
    np.testing.assert_allclose(list(top.values()), [17.7994, 14.2813, 9.7097], atol=1e-3)
    out = generate(model, params, [[tokenizer.bos_token_id]], max_new_tokens=60)[0]
    story = "Once upon a time, there was a little girl named Lily. "
    story += "She loved to play outside in the park."
    assert tokenizer.decode(out).strip().startswith(story)


@pytest.mark.fixtures
@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama105-hf"])
def test_import_and_export_reproduce_every_tensor_bit_for_bit(fixtures, name, tmp_path):
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fixtures / name)
    model, params = sftjax.load_pretrained(fixtures / name)
    sftjax.save_pretrained(tmp_path, model, params, tokenizer)
    before = load_file(fixtures / name / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        np.testing.assert_array_equal(value, after[key])
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids


def test_noise_on_the_embeddings_is_neftune_s():
    """Uniform, up to alpha over the root of a document's numbers, by a key only; a row has documents of 20 and 12."""
    model = tiny.model().replace(embed_noise=5.0)
    params, rows = tiny.params(model), tiny.batch(rows=2, length=32)
    rows |= {"segments": np.repeat([[1, 2]], [20, 12], 1).repeat(2, 0).astype(np.int32)}
    embedded = lambda rng: decoder.embed(model.config, params, rows, rng)[0]  # noqa: E731
    plain = embedded(None)
    noise = np.asarray(embedded(jax.random.key(0)) - plain)
    most = 5 / np.sqrt(model.config.width * np.repeat([20, 12], [20, 12]))
    share = np.abs(noise) / most[:, None]
    assert share.max() <= 1.001 and share[:, :20].max() > 0.99 and share[:, 20:].max() > 0.98
    assert abs(share.mean() - 0.5) < 0.02 and abs(noise.mean() / most.mean()) < 0.02
    assert not np.array_equal(noise, embedded(jax.random.key(1)) - plain)
