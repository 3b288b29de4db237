"""Variants of images: each its own, none in evaluation, and none that leaves the range."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.errors import ConfigError
from sftjax.ops import pixels

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3)).astype(np.uint8)
BATCH = dict(image=IMAGES, targets=np.arange(6)[:, None], weights=np.ones((6, 1), np.float32))


@functools.cache
def compiled(names):
    return jax.jit(lambda key, batch: pixels.vary(key, batch, names))


def varied(*names, seed=0, **change):
    return compiled(names)(jax.random.key(seed), BATCH | change)


@pytest.mark.parametrize("name", pixels.VARIANTS)
def test_a_variant_is_seeded_of_the_same_shape_and_in_range(name):
    one = varied(name)["image"]
    assert one.shape == IMAGES.shape and one.dtype == jnp.float32
    np.testing.assert_array_equal(one, varied(name)["image"])
    assert (one >= -1e-3).all() and (one <= 255.01).all()
    others = [varied(name, seed=s)["image"] for s in range(1, 5)]
    assert any(not np.array_equal(one, x) for x in others)
    same = varied(name, image=np.repeat(IMAGES[:1], 6, 0))["image"]
    assert any(not np.array_equal(same[0], x) for x in same[1:])  # each has a key of its own


def test_flip_and_crop_move_pixels_and_make_none():
    flipped = np.asarray(varied("flip")["image"])
    for a, b in zip(flipped, IMAGES, strict=True):
        assert np.array_equal(a, b) or np.array_equal(a, b[:, ::-1])
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for a, b in zip(np.asarray(varied("crop")["image"]), padded, strict=True):
        places = [(y, x) for y in range(5) for x in range(5)]
        assert any(np.array_equal(a, b[y : y + 12, x : x + 12]) for y, x in places)


def test_a_turn_of_nothing_is_the_image():
    same = pixels._moved(jnp.float32(IMAGES[0]), jnp.eye(2))
    np.testing.assert_allclose(same, IMAGES[0], atol=1e-3)
    quarter = pixels._moved(jnp.float32(IMAGES[0]), jnp.float32([[0, -1], [1, 0]]))
    np.testing.assert_allclose(quarter, np.rot90(IMAGES[0], -1), atol=1e-2)


def test_mixup_blends_and_cutmix_pastes_by_the_share_that_it_says():
    found = varied("mixup")
    other, share = np.asarray(found["partner"])[:, 0], np.asarray(found["share"])[:, :, None, None]
    wanted = share * IMAGES + (1 - share) * IMAGES[other]
    np.testing.assert_allclose(found["image"], wanted, atol=1e-2)
    assert sorted(other) == list(range(6))
    found = varied("cutmix")
    other = np.asarray(found["partner"])[:, 0]
    own = (np.asarray(found["image"]) == IMAGES).all(-1)
    pasted = (np.asarray(found["image"]) == IMAGES[other]).all(-1)
    assert (own | pasted).all()
    moved = other != np.arange(6)
    np.testing.assert_allclose(own.mean((1, 2))[moved], np.asarray(found["share"])[moved, 0], atol=1e-6)


def test_no_image_is_mixed_with_a_blank_row():
    weights = np.float32([[1], [1], [1], [0], [0], [0]])
    for seed in range(5):
        found = varied("mixup", seed=seed, weights=weights)
        assert (np.asarray(found["partner"])[:3] < 3).all()


def test_names_and_normalisation():
    with pytest.raises(ConfigError, match="'turn' is no variant of images"):
        pixels.check_names(("flip", "turn"))
    assert set(varied("flip", "crop")) == {"image"}
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    wanted = (IMAGES / 255.0 - mean) / std
    np.testing.assert_allclose(pixels.normalised(IMAGES, mean, std), wanted, rtol=1e-5, atol=1e-6)
