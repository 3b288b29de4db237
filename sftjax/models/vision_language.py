"""A decoder that reads images: a vision transformer, a projector, and their tokens among those of the text.

A text has as many image tokens as its images have features, one of each patch or each square of patches; the n-th of a
row is replaced by the n-th feature of the row's images. So a batch has `patches` uint8 [B, N, P, P, C] beside the
tokens: of images of one size one after the other, the rest 0; of images of any sizes with `patch_segments` and
`patch_places`, see vision.Model.encoded.

Letters of shapes: B rows, S tokens of a row, N patches of a row, D width of the decoder.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.models import base, decoder, flops, layer, vision
from sftjax.ops import weight
from sftjax.params import Param

PROJECTION = (("up", "bnc,cd->bnd", (None, "embed")), ("down", "bnd,de->bne", ("embed", None)))


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
    """decoder.Config with the tower that images go through."""

    vision: Any = None  # vision.Config
    image_token: int = 0  # its id
    family: str = ""  # the decoder's model_type
    left: int = 1  # so many of the tower's last layers are left out
    tower_norm: bool = False  # is the tower's last norm run
    pool: int = 1  # a token is the mean of a square of patches of this side
    projector: str = "gelu"  # the activation between its two matrices; "" = it has one
    projector_bias: bool = True
    projector_norm: bool = False  # of what it reads
    whole: bool = False  # an image's tokens see all of it, in both directions
    prefix: bool = False  # so do all tokens of a text that stand before the first trained one
    around: tuple[int, ...] = ()  # ids of the tokens before and after an image

    @property
    def image_tokens(self) -> int:
        """Of an image, where all are squares."""
        return (self.vision.tokens - self.vision.class_token) // self.pool**2

    @property
    def unused(self) -> str:
        """A regex over the names of parameters that no output depends on."""
        parts = [rf"layers/{self.vision.layers - self.left}-.*"] * bool(self.left) + ["norm/.*"] * (not self.tower_norm)
        return rf"tower/({'|'.join(parts) or '(?!)'})"


def with_vision(text: decoder.Config, tower: vision.Config, **more: Any) -> Config:
    """The Config of a decoder that reads images."""
    if more.get("left", 1):  # what is left out is a stack of its own, which is not run
        tower = dataclasses.replace(tower, split=(tower.layers - more.get("left", 1),))
    return Config(**{f.name: getattr(text, f.name) for f in dataclasses.fields(text)}, vision=tower, **more)


def abstract(c: Config) -> dict:
    """The tree of Params: that of the decoder, with the tower's and the projector's."""
    normal, zeros = jax.nn.initializers.normal(c.init_std), jax.nn.initializers.zeros

    def matrix(inputs, axes):
        bias = {"b": Param((c.width,), ("norm",), zeros)} if c.projector_bias else {}
        return {"w": Param((inputs, c.width), axes, normal, axes[:1])} | bias

    projector: dict[str, Any] = {"up": matrix(c.vision.width, ("channels", "embed"))}
    if c.projector:
        projector["down"] = matrix(c.width, ("embed", None))
    if c.projector_norm:
        projector["norm"] = {"scale": Param((c.vision.width,), ("norm",), zeros)}
    return decoder.abstract(c) | {"tower": vision.abstract(c.vision), "projector": projector}


@dataclasses.dataclass(frozen=True)
class Model(decoder.Model):
    """A decoder that reads images, with a vocabulary head; see base.Model."""

    config: Config
    tree = staticmethod(abstract)  # type: ignore[assignment] # of this Config

    def image_features(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> jax.Array:
        """[B, F, D]: what stands for the image tokens of each row of a batch, in order."""
        c, patches = self.config, batch["patches"]
        B, N = patches.shape[:2]
        tower, of = vision.Model(dataclasses.replace(c.vision, dtype=c.dtype)), params["tower"]
        if c.vision.patches:
            own = (batch["patch_segments"], batch["patch_places"])
            x = tower.encoded(of, patches, *own, rng=rng, left=c.left)
        else:
            n = c.vision.tokens - c.vision.class_token
            x = tower.encoded(of, patches.reshape(-1, n, *patches.shape[2:]), rng=rng, left=c.left)
            x = x[:, 1:] if c.vision.class_token else x
        x = layer.norm(c.vision, x, of["norm"]) if c.tower_norm else x
        if c.pool > 1:
            side = c.vision.image_size // c.vision.patch // c.pool
            x = jnp.mean(x.reshape(-1, side, c.pool, side, c.pool, c.vision.width), (2, 4))
        x = x.reshape(B, N // c.pool**2, c.vision.width)
        x = layer.norm(dataclasses.replace(c, norm_eps=c.vision.norm_eps), x, params["projector"].get("norm"))
        for name, equation, axes in PROJECTION[: 1 + bool(c.projector)]:
            p = params["projector"][name]
            x = layer.ACTIVATIONS[c.projector](x) if name == "down" else x
            x = weight.project(equation, x, p | {"w": weight.gather_for_use(p["w"], axes, x.dtype)})
        return x

    def inserted(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> base.Inserted | None:
        """Which tokens of a batch are of images, and what stands for them; None of a batch without `patches`."""
        c, tokens = self.config, batch["tokens"]
        if "patches" not in batch:
            none = jnp.zeros((*tokens.shape, 1), c.dtype)
            return base.Inserted(tokens != tokens, none, self._prefix(batch)) if c.prefix else None
        own = tokens == c.image_token
        x = self.image_features(params, batch, rng)
        at = jnp.clip(jnp.cumsum(own, 1) - 1, 0, x.shape[1] - 1)
        sees = self._whole(batch, own, at) if c.whole else self._prefix(batch) if c.prefix else None
        return base.Inserted(own, jnp.take_along_axis(x, at[..., None], 1), sees)

    def _prefix(self, batch):
        """int32 [B, S]: of a token before the first trained one of its text the last such position; else its own.

        A trained token is the target of the one before it. Without one all of a text is a prompt.
        """
        positions, segments = base.places(batch)
        never = jnp.iinfo(jnp.int32).max
        trained = jnp.where(batch.get("weights", jnp.zeros(positions.shape)) > 0, positions, never)

        def row(trained, positions, segments):
            first = jax.ops.segment_min(trained, segments, segments.size + 1)
            last = jax.ops.segment_max(positions, segments, segments.size + 1)
            return jnp.maximum(jnp.minimum(first, last)[segments], positions)

        return jax.vmap(row)(trained, positions, segments)

    def _whole(self, batch, own, at):
        """int32 [B, S]: of a token of an image the position of its last one, else its own."""
        if self.config.vision.patches:
            image = jnp.take_along_axis(batch["patch_segments"], at, 1)
        else:
            image = 1 + at // self.config.image_tokens
        image, positions = jnp.where(own, image, 0), base.places(batch)[0]
        last = jax.vmap(lambda p, i: jax.ops.segment_max(p, i, batch["patches"].shape[1] + 1)[i])(positions, image)
        return jnp.where(own, last, positions)

    @property
    def attention_features(self) -> set[str]:
        """As of base.Model, and that a token may see later ones."""
        return super().attention_features | ({"sees"} if self.config.whole or self.config.prefix else set())

    def outputs(
        self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """As of decoder.Model; a batch without `patches` is of texts alone."""
        images = self.inserted(params, batch, rng)
        x, _, routing = decoder.forward(self.config, params, batch, rng=rng, inserted=images)
        return x, routing

    def train_flops(self, trainable: dict) -> Callable[[float, float, Callable], float]:
        """See flops.train_flops; the tower's are not counted, whose patches the numbers do not say."""
        reached = any(jax.tree.leaves([trainable["tower"], trainable["projector"]]))
        return flops.train_flops(self.config, trainable, self.abstract, reached)
