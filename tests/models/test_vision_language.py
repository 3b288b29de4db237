"""Decoders that read images: golden numbers of transformers, packing, two-sided images, meshes."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import vision_language
from vision_language import CASES, TEXT, doc, docs, loaded, packed, patches_of, write

import sftjax
from sftjax import hf, parallel
from sftjax import params as params_lib
from sftjax.data.packing.images import ImageTextRows
from sftjax.errors import ModelError
from sftjax.evaluation import generation

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vision_language.json").read_text())
WIDTH = 96


def mean_loss(model):
    """(mean loss, logits) and gradients, of parameters and a batch."""
    loss_fn = sftjax.losses.causal_lm(model)

    def mean(params, batch):
        found = loss_fn(params, batch, None)
        return found.sum / found.weight, model.apply(params, batch)

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def slow(*args):
    return pytest.param(*args, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["llava-clip", slow("llava-siglip"), slow("phi4-siglip")])
def test_values_gradients_and_files_are_transformers_and_packing_changes_nothing(name, tmp_path):
    model, params = loaded(name, tmp_path / "in")
    golden, run, texts = GOLDEN[name], mean_loss(model), docs(model)
    (loss, logits), grads = run(params, packed(model, [[d] for d in texts], WIDTH))
    for row, d, wanted in zip(logits, texts, golden["logits"], strict=True):
        np.testing.assert_allclose(row[len(d.tokens) - 1], wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    hf.save_pretrained(tmp_path / "same", model, params)
    before, after = (vision_language.stored(tmp_path / d) for d in ("in", "same"))
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == CASES[name]
    hf.save_pretrained(tmp_path / "gradients", model, grads)
    found = vision_language.stored(tmp_path / "gradients")
    assert found.keys() == golden["gradients"].keys()
    for file, norm in golden["gradients"].items():
        np.testing.assert_allclose(np.linalg.norm(found[file]), norm, rtol=1e-4, atol=2e-6)
    unused = {k for k, x in params_lib.flatten(grads).items() if not np.any(x)}
    assert unused == {k for k in params_lib.flatten(params) if re.fullmatch(model.config.unused, k)} != set()
    # Rows with several texts, of which some have images, beside a row without and one that is empty.
    rows = [[texts[3], texts[0]], [texts[2], texts[1], texts[2]], [texts[2]], []]
    (_, logits), _ = run(params, packed(model, rows, WIDTH))
    for row, own in zip(logits, rows, strict=True):
        at = 0
        for d in own:
            at += len(d.tokens)
            [wanted] = [g for t, g in zip(texts, golden["logits"], strict=True) if t is d]
            np.testing.assert_allclose(row[at - 1], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_gradients_of_packed_texts_are_those_of_each_alone(tmp_path):
    model, params = loaded("phi4-siglip", tmp_path)
    run, texts = mean_loss(model), docs(model)
    rows = [[texts[3], texts[0]], [texts[2]], [texts[1]], []]
    (a, _), one = run(params, packed(model, [[d] for d in texts], WIDTH))
    (b, _), two = run(params, packed(model, rows, WIDTH))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 + 1e-5 * np.abs(x).max())


# ---- a plain reference ---------------------------------------------------------------------


def plain(model, params, d, values, whole):
    """float64 logits [S, V] of a text alone, by its image tokens' values [F, D] and a mask that is written out."""
    p = jax.tree.map(np.float64, {k: v for k, v in params.items() if k not in ("tower", "projector")})
    c, S = model.config, len(d.tokens)
    own = d.tokens == c.image_token
    x = p["embed"]["w"][d.tokens]
    x[own] = np.float64(values)[: own.sum()]
    at = np.arange(S)
    mask = at[:, None] >= at
    if whole:
        image, counts = np.zeros(S, int), [int(np.prod(patches_of(model).of(f).shape[:2])) for f in d.files]
        image[own] = np.repeat(1 + np.arange(len(counts)), counts)
        mask |= own[:, None] & (image[:, None] == image)
    norm = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_eps) * scale  # noqa: E731
    angle = at[:, None] * 1e4 ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
    sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]

    def turned(x):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for i in range(c.layers):
        own_layer = jax.tree.map(lambda a, i=i: a[i], p["layers"][f"0-{c.layers - 1}"])
        attn, mlp = own_layer["attn"], own_layer["mlp"]
        h = norm(x, own_layer["attn_norm"]["scale"])
        q, k, v = (np.einsum("sd,dnh->snh", h, attn[n]["w"]) for n in "qkv")
        k, v = (np.repeat(y, c.heads // c.kv_heads, 1) for y in (turned(k), v))
        scores = np.einsum("snh,tnh->nst", turned(q), k) / np.sqrt(c.head_dim)
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nst,tnh,nhd->sd", weights, v, attn["o"]["w"])
        h = norm(x, own_layer["mlp_norm"]["scale"])
        gate, up = (h @ mlp[n]["w"] for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["w"]
    return norm(x, p["norm"]["scale"]) @ p["head"]["w"].T


def values_of(model, params, texts):
    """What stands for the image tokens of each text; test_parity_vision_language.py compares it with transformers'."""
    return jax.jit(model.image_features)(params, packed(model, [[d] for d in texts], WIDTH))


@pytest.mark.parametrize("name", [slow("llava-clip"), "phi4-siglip"])
def test_an_image_whose_tokens_see_all_of_it(name, tmp_path):
    model, params = loaded(name, tmp_path)
    texts, by_whole = docs(model), []
    values = values_of(model, params, texts)
    for whole in (False, True):
        net = model.replace(whole=whole)
        run = jax.jit(net.apply)
        wanted = [plain(net, params, d, v, whole) for d, v in zip(texts, values, strict=True)]
        by_whole.append(wanted)
        for rows in ([[d] for d in texts], [[texts[3], texts[0]], [texts[2], texts[1], texts[2]], [texts[2]], []]):
            logits = run(params, packed(net, rows, WIDTH))
            for row, own in zip(logits, rows, strict=True):
                at = 0
                for d in own:
                    [right] = [x for t, x in zip(texts, wanted, strict=True) if t is d]
                    given = row[at : at + len(d.tokens)]
                    np.testing.assert_allclose(given, right, atol=2e-5 * np.abs(right).max())
                    at += len(d.tokens)
    moved = [np.abs(a - b).max() > 0.01 for a, b in zip(*by_whole, strict=True)]
    assert moved == [bool(d.files) for d in texts]


@pytest.mark.parametrize("name, whole", [("llava-clip", False), slow("phi4-siglip", False), slow("phi4-siglip", True)])
def test_generation_reads_images_as_training_does(name, whole, tmp_path):
    """The prompts are read in parts of sixteen tokens, and images lie across the borders of these."""
    model, params = loaded(name, tmp_path)
    model, texts = model.replace(whole=whole), docs(model)
    values, cut, new = values_of(model, params, texts), patches_of(model), 3
    wanted = []
    for d, v in zip(texts, values, strict=True):
        ids = list(d.tokens)
        for _ in range(new):
            logits = plain(model, params, d._replace(tokens=np.array(ids)), v, whole)[-1]
            ids.append(int(logits.argmax()))
        assert np.diff(np.sort(logits)[-2:]) > 1e-3  # no tie, which rounding would decide
        wanted.append(ids[len(d.tokens) :])
    beside = lambda rows: cut.batch([texts[i].files for i in rows], 3 * cut.most)  # noqa: E731
    how = dict(max_new_tokens=new, beside=beside)
    assert generation.generate(model, params, [d.tokens for d in texts], **how) == wanted
    assert generation.generate(model, params, [d.tokens for d in texts], batch_size=3, **how) == wanted


# ---- meshes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(fsdp=2, context=2, tensor=2), dict(data=2, fsdp=4)], ids=str)
@pytest.mark.parametrize(
    "name, whole", [("llava-clip", False), ("phi4-siglip", True), ("gemma3", True), ("paligemma", False)]
)
def test_eight_devices_give_what_one_gives(name, whole, sizes, tmp_path):
    model, params = loaded(name, tmp_path)
    model, texts = model.replace(whole=whole), docs(model)
    rows = [[texts[3], texts[0]], [texts[2]], [texts[1]], [], [texts[0]], [texts[2], texts[1]], [texts[3]], [texts[2]]]
    batch = packed(model, rows, WIDTH)
    loss_fn, found = sftjax.losses.causal_lm(model), []

    def mean(params, batch):
        out = loss_fn(params, batch, None)
        return out.sum / out.weight

    for mesh in (parallel.make_mesh({}, jax.devices()[:1]), parallel.make_mesh(sizes)):
        with jax.set_mesh(mesh):
            fields = ImageTextRows(patches=patches_of(model)).spec(len(rows), WIDTH)
            axes = {k: field.axes for k, field in fields.items()}
            put = parallel.put_batch(mesh, batch, len(rows), axes)
            own = jax.device_put(params, parallel.param_shardings(mesh, model.abstract))
            found.append(jax.device_get(jax.jit(jax.value_and_grad(mean))(own, put)))
    (a, one), (b, many) = found
    np.testing.assert_allclose(a, b, rtol=1e-5)
    one, many = params_lib.flatten(one), params_lib.flatten(many)
    for key, x in one.items():
        np.testing.assert_allclose(many[key], x, atol=1e-6 + 2e-5 * np.abs(x).max(), err_msg=key)


# ---- configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llava-clip", {"vision_feature_layer": -1}, "only one from -2 to -3"),
        ("llava-clip", {"vision_feature_layer": -4}, "only one from -2 to -3"),
        ("llava-clip", {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\]"),
        ("llava-clip", {"vision_feature_select_strategy": "full"}, "'full' is not supported, only 'default'"),
        # What transformers takes where it is not said: it would leave out the first patch.
        ("llava-siglip", {"vision_feature_select_strategy": None}, "'default' is not supported, only 'full'"),
        ("llava-clip", {"vision_config": {"model_type": "dinov2"}}, "'dinov2' is not supported; known: clip_vis"),
        ("llava-clip", {"vision_config": {"model_type": "siglip2_vision_model"}}, "'siglip2_vision_model' is not"),
        ("phi4-siglip", {"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' is not"),
        ("llava-clip", {"text_config": TEXT | {"model_type": "vit"}}, "text_config.model_type 'vit' is no decoder"),
        ("llava-clip", {"text_config": TEXT | {"model_type": "bert"}}, "text_config.model_type 'bert' is no decoder"),
        ("llava-clip", {"text_config": TEXT | {"model_type": "odd"}}, "model_type 'odd' is not supported"),
        ("llava-clip", {"text_config": [1]}, "text_config is .*expected an object"),
        ("llava-clip", {"text_config": TEXT | {"model_type": "llava"}}, "text_config.model_type 'llava' is no dec"),
        ("llava-clip", {"image_token_index": "<image>"}, "image_token_index is '<image>', expected a whole number"),
        ("llava-clip", {"projector_hidden_act": "odd"}, "projector_hidden_act 'odd' is not supported; known"),
        ("llava-clip", {"vision_config": {"hidden_act": "odd"}}, "hidden_act 'odd' is not supported; known"),
        ("llava-clip", {"text_config": TEXT | {"model_type": "granite", "embedding_multiplier": 2.0}}, "embedding_mul"),
        ("phi4-siglip", {"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' is not supported"),
        ("phi4-siglip", {"use_s2": True}, "use_s2=True is not supported"),
        ("phi4-siglip", {"mm_projector_type": "linear"}, "mm_projector_type='linear' is not supported"),
    ],
)
def test_a_config_that_is_not_supported(name, change, message, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in (CASES[name] | change).items() if v is not None})
    )
    with pytest.raises(ModelError, match=message):
        hf.load_model(tmp_path)


def test_pixels_of_the_file_that_transformers_5_writes(tmp_path):
    path = write("llava-clip", tmp_path)
    known = hf.load_model(path).config.vision
    (path / "preprocessor_config.json").rename(path / "aside.json")
    plain = hf.load_model(path).config.vision
    assert (known.mean, plain.mean) == ((0.4, 0.5, 0.6), (0.48145466, 0.4578275, 0.40821073))  # CLIP's own
    inside = {"processor_class": "LlavaProcessor", "image_processor": vision_language.PIXELS}
    (path / "processor_config.json").write_text(json.dumps(inside))
    assert hf.load_model(path).config.vision == known
    # Of transformers 4 it says nothing of pixels.
    (path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert hf.load_model(path).config.vision == plain
    (path / "aside.json").rename(path / "preprocessor_config.json")
    assert hf.load_model(path).config.vision == known


@pytest.mark.parametrize("limits", [(0, 9), (4, -1), (4, 9.5), ("a", 9), (10, 9)])
def test_numbers_of_patches_that_are_none(limits, tmp_path):
    path = write("phi4-siglip", tmp_path)
    said = dict(zip(("min_num_patches", "max_num_patches"), limits, strict=True))
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="patches, expected whole numbers|is .*expected a positive whole number"):
        hf.load_model(path)
    (path / "preprocessor_config.json").write_text(json.dumps(dict.fromkeys(said)))  # null: as config.json says
    assert hf.load_model(path).config.vision.patches == (6, 20)


def test_an_export_says_what_is_done_with_an_image(tmp_path):
    """Not what the processor of its source does, which may crop or interpolate otherwise."""
    path = write("llava-clip", tmp_path / "in")
    theirs = vision_language.PIXELS | dict(resample=3, do_pad=True, image_processor_type="OddImageProcessor", odd=1)
    (path / "preprocessor_config.json").write_text(json.dumps(theirs))
    inside = {"processor_class": "LlavaProcessor", "patch_size": 4, "image_processor": theirs}
    (path / "processor_config.json").write_text(json.dumps(inside))
    model, params = hf.load_pretrained(path)
    hf.save_pretrained(tmp_path / "out", model, params)
    files = ("preprocessor_config.json", "processor_config.json")
    said, whole = (json.loads((tmp_path / "out" / name).read_text()) for name in files)
    for found in (said, whole["image_processor"]):
        assert (found["resample"], found["do_pad"], found["do_center_crop"], found["odd"]) == (2, False, True, 1)
        assert (found["image_processor_type"], found["crop_size"]) == ("CLIPImageProcessor", dict(height=16, width=16))
        assert found["image_mean"] == vision_language.PIXELS["image_mean"]
    assert (whole["processor_class"], whole["patch_size"]) == ("LlavaProcessor", 4)


def test_what_is_trained_before_the_decoder_costs_its_backward_pass(tmp_path):
    model, _ = hf.load_pretrained(write("llava-clip", tmp_path))
    on = lambda names: params_lib.match_rules(((names, True), (".*", False)), model.abstract, "x")  # noqa: E731
    rows = (("projector/.*", 4), (".*", 6), ("norm/scale", 2))
    whole = model.train_flops(on(".*"))(1000, 0, lambda window: 0)
    for names, each in rows:
        assert model.train_flops(on(names))(1000, 0, lambda window: 0) == whole * each / 6


def test_phi_s_image_token_is_its_first_dummy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["phi4-siglip"] | {"vocab_size": 100352}))
    config = hf.load_model(tmp_path).config
    assert (config.image_token, config.vision.patches, config.left) == (100256, (6, 20), 1)


@pytest.mark.slow
def test_a_batch_of_texts_alone_needs_no_patches(tmp_path):
    model, params = loaded("llava-clip", tmp_path)
    d = doc(model, 9)
    batch = packed(model, [[d]], WIDTH)
    run = jax.jit(model.apply)
    alone = run(params, {k: v for k, v in batch.items() if "patch" not in k})
    np.testing.assert_allclose(run(params, batch), alone, atol=1e-6)
