"""Models of images against golden numbers of transformers (tests/golden/make_vision.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vision
from safetensors.numpy import load_file
from vision import CASES, WANTED, images, write

import sftjax
from sftjax import hf
from sftjax import params as params_lib
from sftjax.errors import ModelError, WeightsError
from sftjax.models import resnet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vision.json").read_text())


def loaded(name, where, **changes):
    """(model, params, model_state) of a case."""
    model, params = hf.load_pretrained(write(name, where), **changes)
    return model, params, params.pop("stats", None)


def logits(model, params, state, batch, rng=None):
    own = () if state is None else (state,)
    hidden, new = model.outputs(params, batch, rng, *own)
    return model.class_logits(params, hidden)[:, 0], new


def loss_of(model, state, batch, rng=None):
    def loss(params):
        given, new = logits(model, params, state, batch, rng)
        each = optax.softmax_cross_entropy_with_integer_labels(given, jnp.asarray(WANTED))
        return jnp.mean(each), (given, new)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_files_are_transformers(name, tmp_path):
    model, params, state = loaded(name, tmp_path / "in")
    golden, batch = GOLDEN[name]["eval"], {"image": images()}
    (loss, (given, _)), grads = loss_of(model, state, batch)(params)
    scale = np.abs(golden["logits"]).max()
    np.testing.assert_allclose(np.ravel(given), golden["logits"], atol=1e-5 * max(scale, 1))
    np.testing.assert_allclose(loss, golden["loss"][0], rtol=1e-5)
    stats = {} if state is None else {"stats": state}
    hf.save_pretrained(tmp_path / "out", model, params | stats)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    same = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("in", "out")]
    assert same[1].pop("label2id") and same[0] == same[1] and (tmp_path / "out" / "preprocessor_config.json").exists()
    hf.save_pretrained(tmp_path / "out", model, grads | stats)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for file, norm in golden["gradients"].items():
        np.testing.assert_allclose(np.linalg.norm(found[file]), norm, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in CASES if "resnet" in n])
def test_batch_statistics_in_training_are_torch_s(name, tmp_path):
    model, params, state = loaded(name, tmp_path / "in")
    golden, rng = GOLDEN[name]["train"], jax.random.key(0)
    (loss, (given, new)), _ = loss_of(model, state, {"image": images()}, rng)(params)
    np.testing.assert_allclose(np.ravel(given), golden["logits"], atol=3e-5)
    np.testing.assert_allclose(loss, golden["loss"][0], rtol=1e-5)
    hf.save_pretrained(tmp_path / "out", model, params | {"stats": new})
    found = load_file(tmp_path / "out" / "model.safetensors")
    for file, norm in golden["statistics"].items():
        np.testing.assert_allclose(np.linalg.norm(found[file]), norm, rtol=1e-5)


def test_blank_images_change_no_statistics_and_frozen_norms_keep_theirs(tmp_path):
    model, params, state = loaded("resnet-basic", tmp_path / "in")
    rng, some = jax.random.key(0), images()
    weights = np.float32([[1], [1], [1], [1], [0], [0]])
    blank = {"image": np.concatenate([some, np.zeros_like(some[:2])]), "weights": weights}
    alone = logits(model, params, state, {"image": some}, rng)
    beside = logits(model, params, state, blank, rng)
    np.testing.assert_allclose(beside[0][:4], alone[0], atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(x[1]) for x in (alone, beside)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    rules = ((r"(stages/2/|score/).*", True), (".*", False))
    part = model.with_trained(params_lib.match_rules(rules, model.abstract, "trainable"))
    new = params_lib.flatten(logits(part, params, state, {"image": some}, rng)[1])
    changed = {k for k, v in params_lib.flatten(state).items() if not np.array_equal(v, new[k])}
    assert changed == {k for k in new if k.startswith("stages/2/")}


def test_bfloat16_is_near_float32(tmp_path):
    for name in ("vit", "resnet-bottleneck"):
        model, params, state = loaded(name, tmp_path / name)
        low = model.replace(dtype="bfloat16")
        (a, _), (b, _) = (logits(m, params, state, {"image": images()}) for m in (model, low))
        np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(a).max()) + 0.02)


def test_a_training_step_moves_parameters_and_statistics(tmp_path):
    model, params, state = loaded("resnet-basic", tmp_path / "in")
    tx = optax.sgd(0.1)
    start = sftjax.TrainState.create(params=params, tx=tx, model_state=state)
    batch = {"image": images(), "weights": np.ones((4, 1), np.float32)}
    batch["targets"] = np.array(WANTED)[:, None]
    loss_fn = sftjax.losses.classification(model)
    first = jax.jit(lambda s: sftjax.train_step(s, batch, loss_fn=loss_fn, tx=tx))
    after, metrics = first(start)
    assert float(metrics["images"]) == 4 and float(metrics["skipped"]) == 0
    for name in ("params", "model_state"):
        trees = (jax.tree.leaves(getattr(s, name)) for s in (start, after))
        assert all(not np.array_equal(a, b) for a, b in zip(*trees, strict=True))


def test_without_statistics_a_resnet_refuses(tmp_path):
    model, params, _ = loaded("resnet-basic", tmp_path / "in")
    with pytest.raises(ModelError, match="needs model_state"):
        model.outputs(params, {"image": images()})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(architecture="resnet51"),
            "architecture='resnet51' is not supported; known: resnet18",
        ),
        (dict(architecture="resnet21_cifar"), r"a ResNet of this form has 6 n \+ 2 layers"),
        (CASES["vit"] | {"patch_size": 7}, "image_size=24, of patches of 7"),
        (CASES["resnet-basic"] | {"layer_type": "odd"}, "layer_type='odd', expected"),
        (CASES["resnet-basic"] | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (CASES["resnet-basic"] | {"num_channels": 4}, "images of 4 channels"),
        (CASES["resnet-basic"] | {"num_channels": 1}, "expected 1 numbers each"),
        (dict(architecture="resnet18", model_args={"in_chans": 1}), "model_args="),
    ],
)
def test_a_config_that_is_none(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(ModelError, match=message):
        hf.load_model(tmp_path)


def test_pixels_that_are_not_supported(tmp_path):
    path = write("vit", tmp_path)
    for change, message in {
        '{"size": {"height": 24, "width": 20}}': "expected that of a square",
        '{"rescale_factor": 0.5}': "rescale_factor=0.5",
        '{"size": 32}': "image_size=24",
        '{"size": ': "is not valid JSON",
        '{"size": [24, 24]}': "expected that of a square",
        '{"image_mean": 0.5}': "expected a list of numbers",
        '{"image_mean": [0.5]}': "expected 3 numbers each",
        '{"image_std": [1, 1, 0]}': "deviations above 0",
    }.items():
        (path / "preprocessor_config.json").write_text(change)
        with pytest.raises(ModelError, match=message):
            hf.load_model(path)


def heads(path, **how):
    """(a model's labels, the rows of its head) with labels asked for, and without."""
    model, params = hf.load_pretrained(path, **how)
    return model.source.labels, np.asarray(params["score"]["w"])


@pytest.mark.parametrize("name", ["vit", "resnet-basic", "timm"])
def test_a_head_for_other_classes_is_made_anew_and_said(name, tmp_path, caplog):
    path = write("resnet-basic" if name == "timm" else name, tmp_path / "in")
    if name == "timm":  # the same numbers, under torch's names and timm's config
        source, params = hf.load_pretrained(path)
        (tmp_path / "config.json").write_text(json.dumps(vision.TIMM))
        source = hf.load_model(tmp_path)
        params = params_lib.init(source.abstract, jax.random.key(1))
        params |= {"stats": params_lib.init(source.state, jax.random.key(0))}
        path = tmp_path / "timm"
        hf.save_pretrained(path, source, params)
    labels, stored = heads(path)
    assert labels == ("cat", "dog", "owl") and stored.shape[0] == 3
    _, rows = heads(path, labels=("cat", "dog", "owl"))
    np.testing.assert_array_equal(rows, stored)
    assert not caplog.records
    for other in (("0", "1", "2"), ("a", "b")):
        caplog.clear()
        found, rows = heads(path, labels=other)
        assert found == other and rows.shape[0] == len(other)
        assert not np.array_equal(rows, stored[: len(other)])
        assert "score/w" in caplog.text and "made anew" in caplog.text
    bare = hf.load_pretrained(path, classes=0)
    assert "score" not in bare[1]
    hf.save_pretrained(tmp_path / "bare", *bare)
    assert "score" not in hf.load_pretrained(tmp_path / "bare")[1]
    assert heads(tmp_path / "bare", labels=("0", "1", "2"))[1].shape[0] == 3


def test_statistics_stay_in_float32_and_are_asked_for(tmp_path):
    path = write("resnet-basic", tmp_path / "in")
    model, params = hf.load_pretrained(path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params["stats"])} == {jnp.dtype("float32")}
    assert params["stem"]["w"].dtype == jnp.bfloat16
    params.pop("stats")
    with pytest.raises(ModelError, match="under 'stats'"):
        hf.save_pretrained(tmp_path / "out", model, params)


def test_files_of_another_depth_are_refused(tmp_path):
    path = write("resnet-basic", tmp_path)
    (path / "config.json").write_text(json.dumps(CASES["resnet-basic"] | {"depths": [1, 1, 2]}))
    with pytest.raises(WeightsError, match=r"unexpected resnet\.encoder"):
        hf.load_pretrained(path)


def test_timm_s_older_form_says_its_pixels_at_the_top(tmp_path):
    flat = dict(architecture="resnet18", num_classes=2, input_size=[3, 32, 32], mean=[0.5] * 3)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    c = hf.load_model(tmp_path).config
    assert (c.image_size, c.mean) == (32, (0.5,) * 3)


def test_torchvision_s_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 7}))
    model = hf.load_model(tmp_path)
    files = {file for file, *_ in model.names()}
    assert len(files) == 53 + 53 * 4 + 2 and params_lib.count(model.abstract) == 23_522_375
    some = "conv1.weight layer1.0.downsample.0.weight layer4.2.bn3.running_var fc.bias".split()
    assert files.issuperset(some)
    assert isinstance(model.config, resnet.Config) and model.config.depths == (3, 4, 6, 3)


@pytest.mark.fixtures
@pytest.mark.parametrize("name, right", [("resnet20", 804), pytest.param("resnet56", 825, marks=pytest.mark.long)])
def test_real_weights_have_their_accuracy_on_the_fixture(name, right, fixtures, tmp_path):
    """How many of 1,000 test images the weights get right, as the fixture's config.json has it."""
    from sftjax.data import open_source
    from sftjax.data.records.images import pixels

    known = json.loads((fixtures / "resnet-cifar10" / "config.json").read_text())
    cfg = {"input_size": [3, 32, 32], "classifier": "linear", **known["normalize"]}
    cfg = {"architecture": f"{name}_cifar", "num_classes": 10, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    weights = fixtures / "resnet-cifar10" / f"{name}.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    model, params = hf.load_pretrained(tmp_path)
    state = params.pop("stats")
    source = open_source(str(fixtures / "cifar10-jpg" / "test1000.tar"))
    run, hits = jax.jit(lambda x: logits(model, params, state, {"image": x})[0].argmax(-1)), 0
    for at in range(0, 1000, 250):
        rows = source[at : at + 250]
        given = run(np.stack([pixels(r["image"], 32, 3) for r in rows]))
        hits += sum(known["classes"][i] == r["label"] for i, r in zip(given, rows, strict=True))
    assert hits == right == round(1000 * known["models"][name]["acc_on_1000_jpeg_test"])
