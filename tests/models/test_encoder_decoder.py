"""T5 and BART: transformers' stored numbers and texts, packed pairs, dropout, meshes, errors.

golden/make_encoder.py made the numbers; test_parity_seq2seq.py compares with transformers itself.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import PAIRED, write

import sftjax
from sftjax import losses, parallel
from sftjax import params as params_lib
from sftjax.data.packing.pack import PairRows
from sftjax.errors import ConfigError
from sftjax.evaluation.generation import generate
from sftjax.ops.attention import attention

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "encoder.json").read_text())["pairs"]
STOP = 47
LAYOUT = PairRows(32, 16)


@pytest.fixture(scope="module", params=PAIRED)
def loaded(request, tmp_path_factory):
    """(name, model, params)."""
    path = write(request.param, tmp_path_factory.mktemp("model"))
    return request.param, *sftjax.load_pretrained(path)


def examples(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [LAYOUT.example(*(rng.integers(3, 64, n) for n in size)) for size in sizes]


def batch(rows, pairs):
    """The arrays of rows, each a list of the pairs that it holds."""
    fields = LAYOUT.spec(len(rows), 32)
    out = {k: np.zeros(f.shape, f.dtype) for k, f in fields.items()}
    for r, row in enumerate(rows):
        LAYOUT.fill({k: v[r] for k, v in out.items()}, pairs, [(i, 0, 0) for i in row])
    return out


def test_logits_are_those_of_transformers(loaded):
    name, model, params = loaded
    given = {"tokens": jnp.array([GOLDEN["source"]]), "targets": jnp.array([GOLDEN["target"]])}
    logits = model.logits(params, model.hidden(params, given))[0, -1]
    expected = np.array(GOLDEN["models"][name]["logits"])
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_transformers(loaded, beams):
    name, model, params = loaded
    # A shorter one beside it, so that padding is there.
    prompts = [GOLDEN["source"], GOLDEN["source"][:5]]
    found = generate(model, params, prompts, stop_ids=[STOP], max_new_tokens=9, beams=beams)
    assert found[0] == GOLDEN["models"][name]["texts"][str(beams)]


def test_packed_pairs_are_as_each_alone(loaded):
    _, model, params = loaded
    pairs = examples([(9, 5), (14, 6), (3, 4)])
    alone, together = batch([[0], [1], [2]], pairs), batch([[0, 1, 2]], pairs)
    hidden = [np.asarray(model.hidden(params, b)) for b in (alone, together)]
    np.testing.assert_allclose(
        hidden[1][together["target_segments"] > 0], hidden[0][alone["target_segments"] > 0],
        atol=2e-5,
    )  # fmt: skip
    loss = [losses.causal_lm(model)(params, b, None) for b in (alone, together)]
    assert float(loss[0].sum) == pytest.approx(float(loss[1].sum), rel=1e-5)
    assert float(loss[0].weight) == float(loss[1].weight) == 15


@pytest.mark.slow
def test_eight_devices_give_the_gradients_of_one(loaded):
    _, model, params = loaded
    pairs = examples([(9, 5), (14, 6), (3, 4), (20, 2)] * 2)
    b = batch([[0, 2], [1], [3], [4], [5], [6], [7], [0, 1]], pairs)

    def grads(mesh):
        with jax.set_mesh(mesh):
            shardings = parallel.param_shardings(mesh, model.abstract)
            placed = jax.tree.map(jax.device_put, params, shardings)
            fn = jax.grad(lambda p, b: losses.causal_lm(model)(p, b, None).sum)
            return jax.device_get(jax.jit(fn)(placed, b))

    one = grads(parallel.make_mesh({"data": 1}, jax.devices()[:1]))
    for axes in ({"fsdp": 4, "data": 2}, {"fsdp": 2, "context": 2, "tensor": 2}):
        many = grads(parallel.make_mesh(axes))
        for name, a in params_lib.flatten(one).items():
            size = np.abs(a).max() + 1e-3
            assert np.abs(a - params_lib.flatten(many)[name]).max() < 2e-4 * size, (axes, name)


def test_dropout_changes_training_alone(loaded):
    _, model, params = loaded
    b = batch([[0]], examples([(9, 5)]))
    plain = model.hidden(params, b)
    dropped = [model.hidden(params, b, jax.random.key(i)) for i in (0, 0, 1)]
    assert (dropped[0] == dropped[1]).all() and not jnp.allclose(dropped[0], dropped[2])
    assert not jnp.allclose(dropped[0], plain)


@pytest.mark.slow
def test_a_beam_search_finds_what_greedy_misses(loaded):
    """Of all texts of two tokens the likeliest, with as many beams as there are tokens."""
    _, model, params = loaded
    source, vocab = GOLDEN["source"], model.config.vocab
    beams = dict(beams=vocab, length_penalty=0.0)
    [found] = generate(model, params, [source], max_new_tokens=2, **beams)

    def likelihood(targets):
        n = len(targets)
        given = {"tokens": jnp.tile(jnp.array([source]), (n, 1)), "targets": jnp.array(targets)}
        logs = jax.nn.log_softmax(model.logits(params, model.hidden(params, given)))
        return jnp.take_along_axis(logs, given["targets"][..., None], -1).sum((1, 2))

    every = [[a, b] for a in range(vocab) for b in range(vocab)]
    best = every[int(jnp.argmax(likelihood(every)))]
    assert found == best


def test_refused(loaded, tmp_path):
    name, model, params = loaded
    with pytest.raises(ConfigError, match="generate.beams=2 and generate.temperature=1.0"):
        generate(model, params, [[5]], beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="no head of classes here.*task='seq2seq'"):
        _ = sftjax.hf.load_model(write(name, tmp_path), labels=("a", "b")).abstract
    if name == "bart":
        with pytest.raises(ConfigError, match="128 positions"):
            generate(model, params, [[5] * 129])


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("t5", dict(relative_attention_num_buckets=1), "num_buckets=1 do not fit"),
        ("t5", dict(relative_attention_max_distance=4), "num_buckets=8 do not fit"),
        ("t5", dict(feed_forward_proj="gated-tanh"), "feed_forward_proj 'gated-tanh'"),
        ("bart", dict(decoder_attention_heads=5), "d_model=32 does not divide over"),
    ],
)
def test_configs_that_are_refused(tmp_path, name, fields, message):
    path = write(name, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        sftjax.hf.load_model(tmp_path)


def test_a_kernel_without_attention_to_a_source_is_refused():
    x, row = jnp.ones((1, 128, 2, 8)), jnp.ones((1, 128), int)
    where = dict(segments=row, positions=row, kv_segments=row, kv_positions=row)
    with pytest.raises(ConfigError, match=r"'splash' does not support \['cross'\]; set"):
        attention(x, x, x, **where, causal=False, backend="splash")
    with pytest.raises(ValueError, match="distances and a softcap"):
        attention(x, x, x, segments=row, positions=row, softcap=2.0, distances=jnp.ones((2, 8)))


def test_a_start_that_is_null_is_the_familys_own(tmp_path):
    for name, start in {"t5": 0, "bart": 2}.items():
        path = write(name, tmp_path / name) / "config.json"
        hf = json.loads(path.read_text()) | {"decoder_start_token_id": None}
        path.write_text(json.dumps(hf))
        assert sftjax.hf.load_model(path).config.start_id == start
