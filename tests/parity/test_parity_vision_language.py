"""Decoders that read images against transformers, live: logits, gradients, steps, files, generation."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vision_language
from reference import close, close_norms, torch, transformers
from vision_language import CASES, SIZES, TOKEN, doc, docs, loaded, packed, patches_of, renamed, stored, write
from vision_language_reference import gradients, loss, theirs

import sftjax
from sftjax import hf
from sftjax import params as params_lib
from sftjax.evaluation.generation import generate
from sftjax.params import match_rules

pytestmark = pytest.mark.parity
each = pytest.mark.parametrize("name", CASES)
WHOLE = [name for name in CASES if name != "phi4-siglip"]  # a class of transformers has all of it
WIDTH = 96


def batch_of(model, texts):
    """A batch in which each text has a row of its own."""
    return packed(model, [[d] for d in texts], WIDTH)


def their_logits(reference, model, texts):
    with torch.no_grad():
        return [reference.logits(model, d).float().numpy() for d in texts]


@each
def test_logits(name, tmp_path):
    model, params = loaded(name, tmp_path / "in")
    texts = docs(model)
    ours = jax.jit(model.apply)(params, batch_of(model, texts))
    wanted = their_logits(theirs(tmp_path / "in"), model, texts)
    for row, d, logits in zip(ours, texts, wanted, strict=True):
        close(row[: len(d.tokens)], logits, 1e-5)


@each
def test_gradients_of_every_tensor(name, tmp_path):
    model, params = loaded(name, tmp_path / "in")
    texts = docs(model)
    value = gradients(theirs(tmp_path / "in"), model, texts, tmp_path / "theirs")
    loss_fn = sftjax.losses.causal_lm(model)

    def mean(p):
        found = loss_fn(p, batch_of(model, texts), None)
        return found.sum / found.weight

    ours, grads = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    _, expected = hf.load_pretrained(tmp_path / "theirs", image_token=TOKEN)
    given, expected = map(params_lib.flatten, (grads, expected))
    unused = {k for k in given if re.fullmatch(model.config.unused, k)}
    assert bool(unused) == bool(model.config.left) and unused == {k for k, x in expected.items() if not x.any()}
    assert not any(given[k].any() for k in unused)
    used = [{k: x for k, x in tree.items() if k not in unused} for tree in (given, expected)]
    # Without a rotation a bias on the keys moves all scores of a query alike.
    zero = tuple(k for k in used[0] if re.fullmatch(r"tower/layers/.*/attn/k/b", k))
    close_norms(*used, 1e-4, zero)


@each
def test_bfloat16_is_as_near_to_float64_as_torch_s(name, tmp_path):
    model, params = loaded(name, tmp_path)
    texts = docs(model)
    exact = np.concatenate([theirs(tmp_path, torch.float64).logits(model, d).detach().numpy() for d in texts])
    low = np.concatenate(their_logits(theirs(tmp_path, torch.bfloat16), model, texts))
    ours = jax.jit(model.replace(dtype="bfloat16").apply)(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), batch_of(model, texts)
    )
    ours = np.concatenate([row[: len(d.tokens)] for row, d in zip(ours, texts, strict=True)])
    errors = [np.linalg.norm(np.float64(x) - exact) / np.linalg.norm(exact) for x in (ours, low)]
    assert errors[0] <= 1.2 * errors[1] + 1e-3, errors


# ---- files ---------------------------------------------------------------------------------


def same(a, b):
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def saved_by_transformers(name, where):
    """(the case's directory, the same as transformers 5 writes it)."""
    read = theirs(write(name, where / "in")).module
    new = type(read)(read.config)  # one that was read keeps the names that it was read by
    new.load_state_dict(read.state_dict())
    new.save_pretrained(where / "five")
    (where / "five" / "preprocessor_config.json").write_text(json.dumps(vision_language.PIXELS))
    return where / "in", where / "five"


@pytest.mark.parametrize("name", WHOLE)
def test_files_of_transformers_5_are_read_and_keep_their_names(name, tmp_path):
    source, five = saved_by_transformers(name, tmp_path)
    assert not any("vision_model" in k for k in stored(five)) and any("vision_model" in k for k in stored(source))
    (_, a), (model, b) = (hf.load_pretrained(path) for path in (source, five))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    hf.save_pretrained(tmp_path / "out", model, b)
    pooling = re.compile(r"vision_tower\.head\..*")  # SigLIP's, which no decoder reads
    same(stored(tmp_path / "out"), {k: x for k, x in stored(five).items() if not pooling.match(k)})
    assert any(map(pooling.match, stored(five))) == (name == "llava-siglip")
    texts = docs(model)
    for d, x, y in zip(texts, *(their_logits(theirs(tmp_path / p), model, texts) for p in ("in", "out")), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(len(d.tokens)))


@each
def test_transformers_reads_what_a_step_made(name, tmp_path):
    model, params = loaded(name, tmp_path / "in")
    hf.save_pretrained(tmp_path / "same", model, params)
    same(stored(tmp_path / "in"), stored(tmp_path / "same"))
    texts = docs(model)
    moved = jax.tree.map(lambda x: x * np.float32(1.25), params)
    hf.save_pretrained(tmp_path / "out", model, moved)
    ours = jax.jit(model.apply)(moved, batch_of(model, texts))
    for row, d, logits in zip(ours, texts, their_logits(theirs(tmp_path / "out"), model, texts), strict=True):
        close(row[: len(d.tokens)], logits, 1e-5)


def test_pixels_are_those_of_transformers_5_processor(tmp_path):
    """Its one file has the image processor inside; without it images would be normalised otherwise."""
    write("llava-clip", tmp_path / "in")
    (tmp_path / "in" / "preprocessor_config.json").unlink()
    kind = transformers.CLIPImageProcessor
    images = kind(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **vision_language.PIXELS)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of_words())
    processor = transformers.LlavaProcessor(images, tokenizer, patch_size=4)
    processor.save_pretrained(tmp_path / "in")
    assert not (tmp_path / "in" / "preprocessor_config.json").exists()
    model, params = hf.load_pretrained(tmp_path / "in")
    assert (model.config.vision.mean, model.config.vision.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    hf.save_pretrained(tmp_path / "out", model, params)
    again = kind.from_pretrained(tmp_path / "out")
    assert (list(again.image_mean), list(again.image_std)) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert hf.load_model(tmp_path / "out").config == model.config


def tokenizer_of_words():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "<image>": 1}, unk_token="a"))


# ---- training ------------------------------------------------------------------------------


@each
def test_ten_steps_with_the_tower_frozen_are_torch_s(name, tmp_path):
    model, params = loaded(name, tmp_path / "in")
    texts, reference, rate = docs(model), theirs(tmp_path / "in"), 1e-3
    trained = match_rules(((r"tower/.*", False), (".*", True)), model.abstract, "trainable")
    how = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    tx = optax.adamw(rate, **how)
    named = params_lib.flatten(trained)
    assert any(named.values()) and not all(named.values())
    state = sftjax.TrainState.create(params=params, tx=tx, trainable=trained)
    loss_fn, batch = sftjax.losses.causal_lm(model), batch_of(model, texts)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx))
    parts = reference.module.model.vision_tower if name in WHOLE else reference.tower
    for p in parts.parameters():
        p.requires_grad_(False)
    own = [p for p in reference.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(own, rate, (0.9, 0.999), 1e-8, 0.01), []
    for _ in range(10):
        state, metrics = step(state, batch)
        optimizer.zero_grad()
        value = loss(reference, model, texts)
        value.backward()
        optimizer.step()
        losses.append((float(metrics["loss"]), value.item()))
    ours, wanted = np.array(losses).T
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)
    assert wanted[-1] < wanted[0]
    before, after = (params_lib.flatten(x) for x in (params, state.all_params))
    assert all(np.array_equal(before[k], after[k]) != on for k, on in named.items())
    reference.save(tmp_path / "theirs")
    _, expected = hf.load_pretrained(tmp_path / "theirs", image_token=TOKEN)
    for key, x in params_lib.flatten(expected).items():
        assert np.abs(after[key] - x).max() <= 0.05 * 10 * rate, key


# ---- generation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_greedy_answers_are_transformers(name, tmp_path):
    model, params = loaded(name, tmp_path)
    reference, v = theirs(tmp_path), model.config.vision
    a, b, c, d = SIZES
    texts = [doc(model, 3, a, 4), doc(model, 9), doc(model, 1, b, 2, c, 5), doc(model, d, 30)]
    texts.append(doc(model, 2, a, 1, b, 1))
    cut = patches_of(model)
    side = [sum(len(cut.of(f)) ** 2 for f in d.files) for d in texts]
    beside = lambda rows: cut.batch([texts[i].files for i in rows], -(-max(side) // cut.most) * cut.most)  # noqa: E731
    ours = generate(model, params, [d.tokens for d in texts], max_new_tokens=12, beside=beside, batch_size=3)
    config = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    reference.module.generation_config.eos_token_id = None
    for answer, d in zip(ours, texts, strict=True):
        more = {}
        if d.files:
            whole = [np.swapaxes(cut.of(f), 1, 2).reshape(v.image_size, v.image_size, 3) for f in d.files]
            x = (np.stack(whole) / 255 - v.mean) / v.std
            more["pixel_values"] = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
        tokens = torch.tensor(d.tokens[None], dtype=torch.long)
        if model.config.whole or model.config.prefix:
            more["token_type_ids"] = (tokens == TOKEN).long() if model.config.whole else 0 * tokens
        with torch.no_grad():
            out = reference.module.generate(tokens, generation_config=config, **more)
        assert answer == out[0, len(d.tokens) :].tolist()
    assert len({tuple(x) for x in ours}) > 1  # not one answer to all


# ---- sizes ---------------------------------------------------------------------------------


def test_images_of_any_size_have_transformers_sizes():
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    rng = np.random.default_rng(0)
    sizes = [(1, 5000), (5000, 1), (1, 1), (16, 16), (15, 17), (4000, 3000), *rng.integers(1, 1500, (200, 2)).tolist()]
    for p, limits in ((16, (256, 3600)), (4, (6, 20)), (14, (1, 256))):
        own = vision_language.Patches(256, p, 3, limits)
        for height, width in sizes:
            most = min(max((height // p) * (width // p), limits[0], 1), limits[1])
            wanted = get_image_size_for_max_num_patches(height, width, p, most)
            assert own._size(height, width) == wanted, (height, width, p)


def test_names_without_vision_model_are_read_of_phi_too(tmp_path):
    source = write("phi4-siglip", tmp_path / "in")
    short = renamed(source, tmp_path / "five", lambda k: k.replace("vision_tower.vision_model.", "vision_tower."))
    (_, a), (model, b) = (hf.load_pretrained(path, image_token=TOKEN) for path in (source, short))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    hf.save_pretrained(tmp_path / "out", model, b)
    same(stored(tmp_path / "out"), stored(short))
