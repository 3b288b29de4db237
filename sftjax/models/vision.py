"""Vision transformers: an image is cut into patches, which are the tokens of an encoder.

Letters of shapes: B images, H and W their sides, C channels, N tokens of an image, D width. A batch has `image` [B, H,
W, C] from 0 to 255.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sftjax.models import base, decoder, encoder, flops, layer
from sftjax.ops import dropout, weight
from sftjax.ops.pixels import normalised
from sftjax.parallel import RULES
from sftjax.params import Param


@dataclasses.dataclass(frozen=True)
class Config(encoder.Config):
    """encoder.Config with what images need; its defaults are those of ViT."""

    norms: str = "pre"
    final_norm: bool = True
    embed_norm: bool = False
    tied: bool = False
    token_types: int = 0
    poolers: tuple[tuple[str, encoder.Pooler], ...] = ()
    channels: int = 3
    image_size: int = 224  # height and width
    patch: int = 16  # of a patch
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of each channel, from 0 to 1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    class_token: bool = True  # a token of its own before the patches, which a head reads
    patch_bias: bool = True
    # The least and the most patches of an image, where images keep their shapes: then the positions' table, of
    # image_size, is stretched to each. () = all are squares of image_size.
    patches: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch) ** 2 + self.class_token


def abstract(c: Config) -> dict:
    """The tree of Params."""
    c, normal = dataclasses.replace(c, max_positions=c.tokens), jax.nn.initializers.normal(0.02)
    tree = encoder.abstract(c)
    tree.pop("embed")
    axes = (None, None, "channels", "embed")
    w = Param((c.patch, c.patch, c.channels, c.width), axes, normal, ("channels",))
    tree["patches"] = {"w": w}
    if c.patch_bias:
        tree["patches"]["b"] = Param((c.width,), ("norm",), jax.nn.initializers.zeros)
    if c.class_token:
        tree["class_token"] = {"w": Param((c.width,), ("norm",), normal)}
    return tree


@dataclasses.dataclass(frozen=True)
class Model(base.Model):
    """A vision transformer with a head of classes, or with none; see base.Model."""

    config: Config
    reads: ClassVar[str] = "first"
    tree = staticmethod(abstract)

    def features(self, params: dict[str, Any], images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """[B, N, D] of images [B, H, W, C], after the last norm; rng: of dropout, None for none."""
        c, side = self.config, self.config.image_size // self.config.patch
        x = images.reshape(-1, side, c.patch, side, c.patch, c.channels)
        x = jnp.swapaxes(x, 2, 3).reshape(len(images), side * side, c.patch, c.patch, c.channels)
        return layer.norm(c, self.encoded(params, x, rng=rng), params.get("norm"))

    def encoded(
        self,
        params: dict[str, Any],
        patches: jax.Array,
        segments: jax.Array | None = None,
        places: jax.Array | None = None,
        rng: jax.Array | None = None,
        left: int = 0,
    ) -> jax.Array:
        """[B, N, D] of patches [B, N, P, P, C], before the last norm and without the last `left` layers.

        segments int32 [B, N], 0 for none, and places int32 [B, N, 4], which patch it is and of how many, downwards and
        across (y, x, height, width): of images of any sizes, several in a row. None: a whole image is a row.
        """
        c, B = self.config, len(patches)
        x = normalised(patches, c.mean, c.std).astype(c.dtype)
        w = weight.gather_for_use(params["patches"]["w"], (None, None, None, "embed"), x.dtype)
        x = weight.project("bnpqc,pqcd->bnd", x, params["patches"] | {"w": w})
        if c.class_token:
            own = jnp.broadcast_to(params["class_token"]["w"].astype(x.dtype), (B, 1, c.width))
            x = jnp.concatenate([own, x], 1)
        table = weight.dense(params["positions"]["w"], jnp.float32)
        x = x + (table if places is None else stretched(table, places)).astype(x.dtype)
        x = layer.norm(c, x, params.get("embed_norm"))
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        mesh, N = jax.sharding.get_abstract_mesh(), x.shape[1]
        if more := 0 if mesh.empty else -N % mesh.shape[RULES["seq"]]:  # so that tokens divide over the context axis
            x, segments = jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.pad(segments, ((0, 0), (0, more)))
        where = {"positions": jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), "segments": segments}
        ctx: dict[str, Any] = {"where": where, "angles": {}}
        if rng is not None and c.dropout:
            ctx["ids"] = dropout.ids(x.shape[:2])
            ctx["seeds"] = dropout.seeds(rng, 1 + c.layers)
            x = dropout.dropout(x, c.dropout, ctx["seeds"][0], ctx["ids"])
        # The stack of those that are run has a name of its own where some are left out.
        run = dataclasses.replace(c, layers=c.layers - left, split=()) if left else c
        return decoder.run_layers(run, params["layers"], ctx, x)[0][:, :N]

    def outputs(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> tuple[jax.Array, None]:
        """(what a head reads of each image [B, 1, D], None) of a batch's images."""
        x = self.features(params, batch["image"], rng)
        return x[:, :1] if self.config.class_token else jnp.mean(x, 1, keepdims=True), None

    def train_flops(self, trainable: dict) -> Callable[[float, float, Callable], float]:
        """(images, trained, pairs of images) -> model FLOPs of a step; see flops.train_flops."""
        n, of = self.config.tokens, flops.train_flops(self.config, trainable, self.abstract)
        each = n * (n + 1) / 2

        def count(images, trained, pairs):
            return of(images * n, trained, lambda window: each * pairs(window))

        return count


def stretched(table: jax.Array, places: jax.Array) -> jax.Array:
    """The positions [B, N, D] of patches of images of any size, of a table [S * S, D] of a square's.

    places: as of Model.encoded. Bilinear, with the wider triangle where an image has fewer patches than the table, as
    torch's interpolate(antialias=True).
    """
    side = math.isqrt(len(table))

    def weights(at, n):  # [B, N, side]: what each row, or column, of the table counts
        step = side / jnp.maximum(n, 1)[..., None]
        off = (at[..., None] + 0.5) * step - (jnp.arange(side) + 0.5)
        w = jnp.maximum(1 - jnp.abs(off) / jnp.maximum(step, 1), 0)
        return w / jnp.sum(w, -1, keepdims=True)

    y, x, height, width = jnp.moveaxis(places, -1, 0)
    rows = jnp.einsum("bni,ijd->bnjd", weights(y, height), table.reshape(side, side, -1))
    return jnp.einsum("bnj,bnjd->bnd", weights(x, width), rows)
