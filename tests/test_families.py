"""Every family: transformers' stored numbers, documents in a row are alone, and ways to run that
change nothing. The small models of families.py; golden/make.py made the numbers."""

import functools
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from families import CASES, write
from safetensors.numpy import load_file

import sftjax
from sftjax import params as params_lib
from sftjax import sharding
from sftjax.generate import generate
from sftjax.models import decoder
from sftjax.ops.attention import BACKENDS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "families.json").read_text())
ROWS, LENGTH = 4, 96  # one shape, so that a model is compiled once; over one block of blockwise

# Between them every feature of the decoder: alternation, softcaps, sinks, experts, parallel halves,
# learned positions, loops, frequencies by length. The others are `slow` where they add little.
SOME = ("gemma2", "phi3-longrope", "gpt_neox", "gpt_oss", "gpt2", "iquest-loop")


def marked(name, *values):
    return pytest.param(name, *values, marks=[] if name in SOME else [pytest.mark.slow])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name): (model, params), each loaded once."""
    return functools.cache(
        lambda name: sftjax.load_pretrained(write(name, tmp_path_factory.mktemp(name)))
    )


@pytest.fixture(scope="module")
def plain(load):
    """plain(name): (logits, loss sum, gradients) of the golden batch, on one device."""
    return functools.cache(lambda name: run(*load(name), golden_batch()))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    """(logits, loss sum, its gradients), of one forward pass."""

    def objective(params):
        outputs = model.outputs(params, batch)
        once = types.SimpleNamespace(
            outputs=lambda *_: outputs, head=model.head, logit_options=model.logit_options
        )
        loss = sftjax.losses.causal_lm(once)(params, batch, None)
        return loss.sum, model.logits(params, outputs[0])

    (total, logits), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return logits, total, grads


def rows(documents, weights):
    """A Batch: each row a list of documents, one after another; weights alike."""
    out = {k: np.zeros((ROWS, LENGTH), np.int32) for k in ("tokens", "positions", "segments")}
    out |= {"targets": np.zeros((ROWS, LENGTH), np.int32)}
    out |= {"weights": np.zeros((ROWS, LENGTH), np.float32)}
    for row, (docs, ws) in enumerate(zip(documents, weights, strict=True)):
        at = 0
        for segment, (d, w) in enumerate(zip(docs, ws, strict=True), 1):
            here = (row, slice(at, at + len(d)))
            out["tokens"][here], out["weights"][here] = d, w
            out["targets"][here] = [*d[1:], 0]
            out["positions"][here], out["segments"][here] = np.arange(len(d)), segment
            at += len(d)
    return out


def golden_batch():
    return rows([[d] for d in GOLDEN["documents"]], [[w] for w in GOLDEN["weights"]])


def error(ours, expected, least=0.0):
    """max |difference| / max |expected|."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    return np.abs(ours - expected).max() / max(np.abs(expected).max(), least)


def grads_error(ours, expected):
    """The largest of all leaves. Without rotation a key's bias has gradient 0: rounding alone."""
    ours, expected = params_lib.flatten(ours), params_lib.flatten(expected)
    assert ours.keys() == expected.keys()
    least = 1e-2 * max(np.abs(x).max() for x in expected.values())
    return max(error(x, expected[name], least) for name, x in ours.items())


each = pytest.mark.parametrize("name", CASES)
some = pytest.mark.parametrize("name", [marked(name) for name in CASES])


# ---- the numbers of transformers -----------------------------------------------------------


@each
def test_golden_numbers(load, plain, tmp_path, name):
    (model, _), (logits, total, grads), golden = load(name), plain(name), GOLDEN["cases"][name]
    places = np.array([logits[place] for place in map(tuple, GOLDEN["places"])])
    assert error(places, np.array(golden["logits"])) <= 1e-5
    trained = golden_batch()["weights"].sum()
    np.testing.assert_allclose(total / trained, golden["loss"], rtol=1e-5)
    sftjax.save_pretrained(tmp_path, model, grads)  # as if they were weights
    tensors = load_file(tmp_path / "model.safetensors")
    norms = {name: np.linalg.norm(x) / trained for name, x in tensors.items()}
    assert norms == pytest.approx(golden["gradients"], rel=1e-4)


@each
def test_golden_text(load, name):
    text = generate(*load(name), [GOLDEN["prompt"]], max_new_tokens=16)[0]
    assert text == GOLDEN["cases"][name]["continuation"]


# ---- documents in a row --------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents():
    """(documents, weights, where each is in a row of all): on either side of every window and
    trained length of the cases, and the row ends in padding."""
    rng, lengths = np.random.default_rng(2), (45, 17, 5, 22)
    docs = [rng.integers(1, 64, n) for n in lengths]
    weights = [np.append(rng.integers(0, 2, n - 1), 0) for n in lengths]
    stops = np.cumsum(lengths)
    return docs, weights, [slice(b - n, b) for b, n in zip(stops, lengths, strict=True)]


def backends():
    """(case, backend): every case with the default one."""
    for name in CASES:
        for backend in BACKENDS:
            default = backend == decoder.Config.attention
            yield (name, backend) if default else marked(name, backend)


@pytest.mark.parametrize("name, backend", list(backends()))
def test_c10_documents_of_one_row_are_as_each_in_a_row_of_its_own(load, documents, name, backend):
    docs, weights, places = documents
    model, params = load(name)
    model = model.replace(attention=backend)
    packed = rows([docs, [], [], []], [weights, [], [], []])
    logits, total, grads = run(model, params, packed)
    alone = run(model, params, rows([[d] for d in docs], [[w] for w in weights]))
    for row, place in enumerate(places):
        assert error(logits[0, place], alone[0][row, : len(docs[row])]) <= 1e-5
    np.testing.assert_allclose(total, alone[1], rtol=1e-5)
    assert grads_error(grads, alone[2]) <= 1e-5

    # C12: changing the first document leaves the others bit-equal.
    other = rows([[(docs[0] + 7) % 64, *docs[1:]], [], [], []], [weights, [], [], []])
    changed = np.asarray(run(model, params, other)[0][0])
    logits = np.asarray(logits[0])
    np.testing.assert_array_equal(logits[places[1].start :], changed[places[1].start :])
    assert np.abs(logits - changed)[places[0]].max() > 1


# ---- ways to run ---------------------------------------------------------------------------


def same(ours, expected):
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert error(a, b) <= 1e-5
    assert grads_error(ours[2], expected[2]) <= 1e-5


@pytest.mark.parametrize("how", [{"scan": False}, {"remat": "full"}], ids=str)
@some
def test_scan_and_remat_change_nothing(load, plain, name, how):
    model, params = load(name)
    same(run(model.replace(**how), params, golden_batch()), plain(name))


MESH = {"fsdp": 4, "tensor": 2}


def meshes():
    """(case, mesh) of every case whose sizes divide; experts are sharded too."""
    for name in CASES:
        experts = any("experts" in field for field in CASES[name])
        if "odd" not in name:
            yield marked(name, dict(fsdp=2, tensor=2, expert=2) if experts else MESH)


@pytest.mark.parametrize("name, sizes", list(meshes()), ids=str)
def test_eight_devices_are_as_one(load, plain, name, sizes):
    model, params = load(name)
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.param_shardings(mesh, model.abstract))
        ours = run(model, params, sharding.put_batch(mesh, golden_batch(), ROWS))
    same(ours, plain(name))


def test_a_stack_may_be_split_inside_a_period(load, plain):
    """gemma3's period is two local layers and a global one; after the split it begins elsewhere."""

    def joined(layers):
        return jax.tree.map(lambda *x: np.concatenate(x), *layers.values())

    model, _ = load("gemma3")
    split, params = sftjax.load_pretrained(model.source.directory, split=(1,))
    assert list(decoder.stacks(model.config)) == ["0-5", "6-6"]
    assert list(decoder.stacks(split.config)) == ["0-0", "1-6"]
    outs = [plain("gemma3"), run(split, params, golden_batch())]
    same(*((*out[:2], out[2] | {"layers": joined(out[2]["layers"])}) for out in outs))


def test_a_model_without_a_source_cannot_be_saved(load, tmp_path):
    model, params = load("llama")
    with pytest.raises(ValueError, match="this Model has no source, the config.json to write"):
        sftjax.save_pretrained(tmp_path / "new", decoder.Model(model.config), params)
    assert not (tmp_path / "new").exists()
