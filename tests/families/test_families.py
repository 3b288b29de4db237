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
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.evaluation.generation import generate
from sftjax.models import decoder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "families.json").read_text())
ROWS, LENGTH = 4, 96  # one shape, so that a model is compiled once; over one block of blockwise

# Between them the features of the decoder that its ways to run could break: alternation, sinks,
# experts, parallel halves, learned positions, loops, frequencies by length.
SOME = ("phi3-longrope", "gpt_neox", "gpt_oss", "gpt2", "iquest-loop")
FEW = ("iquest-loop",)


class Case:
    def __init__(self, name, directory):
        self.name, self.golden = name, GOLDEN["cases"][name]
        self.model, self.params = sftjax.load_pretrained(write(name, directory))

    @functools.cached_property
    def plain(self):
        """`run` of the golden batch."""
        return run(self.model, self.params, golden_batch())


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """pytest runs all tests of one case before the next one's, so that it is compiled once."""
    yield Case(request.param, tmp_path_factory.mktemp(request.param))
    # A compiled model is hundreds of memory maps, of which Linux gives a process 65530 in all.
    jax.clear_caches()


def cases(fast, slow=CASES):
    """Parametrize `case`: `fast`, then those of `slow`, the others `long`. Always in one order."""
    marks = [[] if name in fast else pytest.mark.slow if name in slow else pytest.mark.long for name in CASES]
    params = [pytest.param(name, marks=m) for name, m in zip(CASES, marks, strict=True)]
    return pytest.mark.parametrize("case", params, indirect=True)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    """(logits, loss sum, its gradients), of one forward pass."""

    def objective(params):
        outputs = model.outputs(params, batch)  # traced once, for the loss and the logits
        once = types.SimpleNamespace(outputs=lambda *_: outputs, head=model.head, logit_options=model.logit_options)
        loss = sftjax.losses.causal_lm(once)(params, batch, None)
        return loss.sum, model.logits(params, outputs[0])

    (total, logits), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return logits, total, grads


def rows(documents, weights):
    """A Batch: each row a list of documents, one after another; weights alike."""
    keys = ("tokens", "targets", "positions", "segments")
    out = {k: np.zeros((ROWS, LENGTH), np.int32) for k in keys}
    out["weights"] = np.zeros((ROWS, LENGTH), np.float32)
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


# ---- the numbers of transformers -----------------------------------------------------------


# Llama's form; biases and learned positions; two kinds of layers and more norms; experts.
@cases(("llama", "gpt2", "gemma3", "qwen3_moe"))
def test_golden_numbers(case, tmp_path):
    logits, total, grads = case.plain
    places = np.array([logits[row, at] for row, at in GOLDEN["places"]])
    assert error(places, np.array(case.golden["logits"])) <= 1e-5
    trained = golden_batch()["weights"].sum()
    np.testing.assert_allclose(total / trained, case.golden["loss"], rtol=1e-5)
    sftjax.save_pretrained(tmp_path, case.model, grads)  # as if they were weights
    tensors = load_file(tmp_path / "model.safetensors")
    norms = {name: np.linalg.norm(x) / trained for name, x in tensors.items()}
    assert norms == pytest.approx(case.golden["gradients"], rel=1e-4)


@cases(("gpt2", "iquest-loop"))
def test_golden_text(case):
    text = generate(case.model, case.params, [GOLDEN["prompt"]], max_new_tokens=16)[0]
    assert text == case.golden["continuation"]


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


def check_documents(model, params, documents):
    docs, weights, places = documents
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


@cases(SOME)
def test_c10_documents_of_one_row_are_as_each_in_a_row_of_its_own(case, documents):
    check_documents(case.model, case.params, documents)


@cases(FEW, SOME)
def test_c10_with_the_other_backend_of_all_platforms(case, documents):
    assert case.model.config.attention == "blockwise"
    check_documents(case.model.replace(attention="xla"), case.params, documents)


# ---- ways to run ---------------------------------------------------------------------------


def same(ours, expected):
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert error(a, b) <= 1e-5
    assert grads_error(ours[2], expected[2]) <= 1e-5


@pytest.mark.parametrize("how", [{"scan": False}, {"remat": "full"}], ids=str)
@cases((), SOME)
def test_scan_and_remat_change_nothing(case, how):
    same(run(case.model.replace(**how), case.params, golden_batch()), case.plain)


@cases((), SOME)
def test_eight_devices_are_as_one(case):
    if case.model.config.experts:
        sizes = {"fsdp": 2, "tensor": 2, "expert": 2}
    else:  # odd sizes do not divide
        sizes = {"data": 4, "context": 2} if "odd" in case.name else {"fsdp": 4, "tensor": 2}
    mesh = parallel.make_mesh(sizes)
    with jax.set_mesh(mesh):
        shardings = parallel.param_shardings(mesh, case.model.abstract)
        params = jax.device_put(case.params, shardings)
        ours = run(case.model, params, parallel.put_batch(mesh, golden_batch(), ROWS))
    same(ours, case.plain)


@pytest.mark.slow
def test_a_stack_may_be_split_inside_a_period(tmp_path):
    """gemma3's period is two local layers and a global one; after the split it begins elsewhere."""
    write("gemma3", tmp_path)

    def out(stacks, **how):
        model, params = sftjax.load_pretrained(tmp_path, **how)
        assert list(decoder.stacks(model.config)) == stacks
        logits, total, grads = run(model, params, golden_batch())
        layers = jax.tree.map(lambda *x: np.concatenate(x), *grads["layers"].values())
        return logits, total, grads | {"layers": layers}

    same(out(["0-0", "1-6"], split=(1,)), out(["0-5", "6-6"]))


def test_a_model_without_a_source_cannot_be_saved(tmp_path):
    model, params = sftjax.load_pretrained(write("llama", tmp_path))
    with pytest.raises(ValueError, match="this Model has no source, the config.json to write"):
        sftjax.save_pretrained(tmp_path / "new", decoder.Model(model.config), params)
    assert not (tmp_path / "new").exists()
