"""What is done to images on the device: normalised, and in training varied.

Letters of shapes: B images, H and W their sides, C channels. Images are numbers from 0 to 255.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sftjax.errors import ConfigError

PAD = 1 / 8  # of its side, that a crop may be off by


def normalised(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """float32 [B, H, W, C]; mean, std: of each channel, of values from 0 to 1."""
    x = images.astype(jnp.float32) / 255
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


# ---- variants: each a function (key, image float32 [H, W, C]) -> image ----------------------


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirrored left to right, half of the time."""
    return jnp.where(jax.random.bernoulli(key), x[:, ::-1], x)


def crop(key: jax.Array, x: jax.Array) -> jax.Array:
    """Moved by up to an eighth of its side each way; black comes in."""
    h, w, c = x.shape
    pads = [(round(n * PAD), round(n * PAD)) for n in (h, w)]
    at = [jax.random.randint(k, (), 0, 2 * p + 1) for k, (p, _) in zip(jax.random.split(key), pads, strict=True)]
    return jax.lax.dynamic_slice(jnp.pad(x, [*pads, (0, 0)]), (*at, 0), (h, w, c))


def zoom(key: jax.Array, x: jax.Array) -> jax.Array:
    """A part of 25% to 100% of its area, of 3:4 to 4:3, at its full size (Szegedy et al. 2014)."""
    keys = jax.random.split(key, 4)
    area = jax.random.uniform(keys[0], minval=0.25)
    ratio = jnp.exp(jax.random.uniform(keys[1], minval=-1.0) * jnp.log(4 / 3))
    ratio = jnp.where(jax.random.bernoulli(keys[3]), ratio, 1 / ratio)
    share = jnp.minimum(jnp.sqrt(area * jnp.array([ratio, 1 / ratio])), 1.0)
    size = jnp.array(x.shape[:2], jnp.float32)
    start = jax.random.uniform(keys[2], (2,)) * (1 - share) * size
    return jax.image.scale_and_translate(x, x.shape, (0, 1), 1 / share, -start / share, "linear")


def rotate(key: jax.Array, x: jax.Array) -> jax.Array:
    """Turned by up to 15 degrees; black comes in."""
    angle = jnp.deg2rad(jax.random.uniform(key, minval=-15.0, maxval=15.0))
    return _moved(x, jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]))


def _moved(x, matrix):
    """The image whose pixel p is the one of x at matrix @ p, seen from the middle."""
    h, w, _ = x.shape
    middle = jnp.array([h - 1, w - 1], jnp.float32)[:, None, None] / 2
    places = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"))
    at = list(jnp.einsum("ij,jhw->ihw", matrix, places - middle) + middle)
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=at, order=1)
    return jax.vmap(sample, -1, -1)(x)


def color(key: jax.Array, x: jax.Array) -> jax.Array:
    """Brightness, contrast and saturation, each times 0.6 to 1.4."""
    bright, contrast, strong = jax.random.uniform(key, (3,), minval=0.6, maxval=1.4)
    x = x * bright
    x = (x - jnp.mean(x)) * contrast + jnp.mean(x)
    gray = jnp.mean(x, -1, keepdims=True)
    return jnp.clip((x - gray) * strong + gray, 0, 255)


def noise(key: jax.Array, x: jax.Array) -> jax.Array:
    """Plus normal noise, of a deviation of up to a tenth of the range."""
    strength, each = jax.random.split(key)
    deviation = jax.random.uniform(strength, maxval=25.5)
    return jnp.clip(x + deviation * jax.random.normal(each, x.shape), 0, 255)


def randaugment(key: jax.Array, x: jax.Array) -> jax.Array:
    """Two of the others, drawn for each image (after Cubuk et al. 2019)."""
    several = (rotate, crop, zoom, color, noise)
    for one in jax.random.split(key):
        which, own = jax.random.split(one)
        x = jax.lax.switch(jax.random.randint(which, (), 0, len(several)), several, own, x)
    return x


VARIANTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    fn.__name__: fn for fn in (flip, crop, zoom, rotate, color, noise, randaugment)
}
MIXES = ("mixup", "cutmix")


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is neither of VARIANTS nor of MIXES."""
    known = [*VARIANTS, *MIXES]
    if unknown := [n for n in names if n not in known]:
        raise ConfigError(f"data.augment: {unknown[0]!r} is no variant of images; known: {', '.join(known)}")


def vary(rng: jax.Array, batch: dict, names: Sequence[str]) -> dict[str, jax.Array]:
    """What replaces arrays of a batch: image float32 [B, H, W, C]; of mixes partner, share [B, 1].

    names: of VARIANTS, one after the other, each image with a key of its own; and of MIXES: then an image is mixed with
    another of the batch, whose target is `partner`, and its own target counts for `share` (Zhang et al. 2017, Yun et
    al. 2019, both with alpha 1).
    """
    x, B = batch["image"].astype(jnp.float32), batch["image"].shape[0]
    for i, name in enumerate(names):
        if name in VARIANTS:
            x = jax.vmap(VARIANTS[name])(jax.random.split(jax.random.fold_in(rng, i), B), x)
    mixes = [name for name in names if name in MIXES]
    if not mixes:
        return {"image": x}
    order, which, shares, boxes = jax.random.split(jax.random.fold_in(rng, len(names)), 4)
    other = jax.random.permutation(order, B)
    there = batch["weights"][:, 0] > 0
    other = jnp.where(there[other], other, jnp.arange(B))  # no blank row
    share = jax.random.uniform(shares, (B,))
    blend = jnp.einsum("b,bhwc->bhwc", share, x) + jnp.einsum("b,bhwc->bhwc", 1 - share, x[other])
    box = jax.vmap(_box, (0, None, 0))(jax.random.split(boxes, B), x.shape[1:3], 1 - share)
    boxed = jnp.array([name == "cutmix" for name in mixes])[jax.random.randint(which, (B,), 0, len(mixes))]
    pasted = jnp.where(box[..., None], x[other], x)
    share = jnp.where(boxed, 1 - jnp.mean(box, (1, 2)), share)
    x = jnp.where(boxed[:, None, None, None], pasted, blend)
    return {"image": x, "partner": batch["targets"][other], "share": share[:, None]}


def _box(key, size, area):
    """A rectangle of the image's shape and of this share of its area in it, as bool [H, W]."""
    inside = []
    for n, own in zip(size, jax.random.split(key), strict=True):
        side = jnp.round(jnp.sqrt(area) * n)
        start = jnp.floor(jax.random.uniform(own) * (n - side + 1))
        inside.append((jnp.arange(n) >= start) & (jnp.arange(n) < start + side))
    return inside[0][:, None] & inside[1]
