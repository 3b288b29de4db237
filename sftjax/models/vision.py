"""Vision transformers: an image is cut into patches, which are the tokens of an encoder.

Letters of shapes: B images, H and W their sides, C channels, N tokens of an image, D width. A batch has `image` [B, H,
W, C] from 0 to 255.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sftjax.models import base, decoder, encoder, flops, layer
from sftjax.ops import dropout, weight
from sftjax.ops.pixels import normalised
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
    tree["patches"] = {"w": w, "b": Param((c.width,), ("norm",), jax.nn.initializers.zeros)}
    if c.class_token:
        tree["class_token"] = {"w": Param((c.width,), ("norm",), normal)}
    return tree


@dataclasses.dataclass(frozen=True)
class Model(base.Body):
    """A vision transformer with a head of classes, or with none; see base.Model."""

    config: Config
    reads: ClassVar[str] = "first"
    tree = staticmethod(abstract)

    def features(self, params: dict[str, Any], images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """[B, N, D] of images [B, H, W, C], after the last norm; rng: of dropout, None for none."""
        c, B, side = self.config, images.shape[0], self.config.image_size // self.config.patch
        x = normalised(images, c.mean, c.std).astype(c.dtype)
        x = x.reshape(B, side, c.patch, side, c.patch, c.channels)
        w = weight.gather_for_use(params["patches"]["w"], (None, None, None, "embed"), x.dtype)
        x = weight.project("bgphqc,pqcd->bghd", x, params["patches"] | {"w": w})
        x = x.reshape(B, side * side, c.width)
        if c.class_token:
            own = jnp.broadcast_to(params["class_token"]["w"].astype(x.dtype), (B, 1, c.width))
            x = jnp.concatenate([own, x], 1)
        x = x + weight.dense(params["positions"]["w"], x.dtype)
        places = jnp.broadcast_to(jnp.arange(c.tokens), (B, c.tokens))
        ctx: dict[str, Any] = {"where": {"positions": places, "segments": jnp.ones_like(places)}, "angles": {}}
        if rng is not None and c.dropout:
            ctx["ids"] = dropout.ids(places.shape)
            ctx["seeds"] = dropout.seeds(rng, 1 + c.layers)
            x = dropout.dropout(x, c.dropout, ctx["seeds"][0], ctx["ids"])
        x, _, _ = decoder.run_layers(c, params["layers"], ctx, x)
        return layer.norm(c, x, params["norm"])

    def outputs(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> tuple[jax.Array, None]:
        """(what a head reads of each image [B, 1, D], None) of a batch's images."""
        x = self.features(params, batch["image"], rng)
        return x[:, :1] if self.config.class_token else jnp.mean(x, 1, keepdims=True), None

    class_logits = decoder.Model.class_logits

    def train_flops(self, trainable: dict) -> Callable[[float, float, Callable], float]:
        """(images, trained, pairs of images) -> model FLOPs of a step; see flops.train_flops."""
        n, of = self.config.tokens, flops.train_flops(self.config, trainable, self.abstract)
        each = n * (n + 1) / 2

        def count(images, trained, pairs):
            return of(images * n, trained, lambda window: each * pairs(window))

        return count
