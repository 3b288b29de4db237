"""ResNets (He et al. 2015): convolutions with batch norms, whose statistics are model_state.

Letters of shapes: B images, H and W their sides, C channels, D width. A batch has `image`
[B, H, W, C] from 0 to 255, and perhaps `weights` [B, 1], 0 for images that are not there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sftjax import params as params_lib
from sftjax.errors import ModelError
from sftjax.models import base
from sftjax.ops.pixels import normalised
from sftjax.params import Param

MOMENTUM = 0.1  # the weight of a batch in the running statistics, as in torch


@dataclasses.dataclass(frozen=True)
class Config:
    """What a ResNet is, and the dtype in which it is run."""

    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...]  # channels that they give
    stem: int = 64  # channels of the first convolution
    bottleneck: bool = False  # blocks of three convolutions, else of two
    early_stride: bool = False  # a bottleneck's first convolution has its stride, else its second
    # The form for small images: a first convolution of 3x3 without a pool after it, and no convolution beside a block:
    # what it adds is every second pixel, with channels of zeros.
    small: bool = False
    files: str = "torch"  # whose names the files have: torch (torchvision, timm) | transformers
    classifier: str = "fc"  # torch: what they call the head
    channels: int = 3  # of an image
    image_size: int = 224  # height and width
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, from 0 to 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    norm_eps: float = 1e-5
    head: str = ""  # image, or "" for the body alone
    classes: int = 0
    dtype: str = "float32"
    causal: ClassVar[bool] = False
    tied: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """Of the features of an image."""
        return self.widths[-1]


def blocks(c: Config) -> list[tuple[str, int, int, int]]:
    """(name, channels in, channels out, stride) of each block, in order."""
    out, channels = [], c.stem
    for stage, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            out.append((f"stages/{stage}/{block}", channels, width, stride))
            channels = width
    return out


def convolutions(c: Config, channels: int, width: int, stride: int) -> list[tuple]:
    """(name, kernel's side, channels in, channels out, stride) of those of a block."""
    if not c.bottleneck:
        out = [("conv1", 3, channels, width, stride), ("conv2", 3, width, width, 1)]
    else:
        mid, (first, second) = width // 4, (stride, 1) if c.early_stride else (1, stride)
        out = [("conv1", 1, channels, mid, first), ("conv2", 3, mid, mid, second), ("conv3", 1, mid, width, 1)]
    if not c.small and (stride > 1 or channels != width):
        out.append(("shortcut", 1, channels, width, stride))
    return out


def _trees(c: Config) -> tuple[dict, dict]:
    """(parameters, statistics) as trees of Params."""
    he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
    ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros

    def convolution(name, side, channels, width):
        axes = (None, None, "channels", None)
        w = Param((side, side, channels, width), axes, he, ("channels",))
        scale, shift = (Param((width,), ("norm",), init) for init in (ones, zeros))
        moments = {"mean": Param((width,), ("norm",), zeros), "var": scale}
        return {name: {"w": w}, f"{name}_norm": {"scale": scale, "b": shift}}, {f"{name}_norm": moments}

    params, state = convolution("stem", 3 if c.small else 7, c.channels, c.stem)
    for name, *block in blocks(c):
        for part, side, channels, width, _ in convolutions(c, *block):
            for tree, own in zip((params, state), convolution(part, side, channels, width), strict=True):
                for key in name.split("/"):
                    tree = tree.setdefault(key, {})
                tree.update(own)
    if c.classes:
        w = Param((c.classes, c.width), ("classes", "embed"), he, ("embed",))
        params["score"] = {"w": w, "b": Param((c.classes,), ("classes",), zeros)}
    return params, state


@dataclasses.dataclass(frozen=True)
class Model(base.Model):
    """A ResNet with a head of classes, or with none; see base.Model.

    frozen: the names of the norms that read their stored statistics in training too, and leave them as they are.
    """

    config: Config
    frozen: frozenset[str] = frozenset()
    reads: ClassVar[str] = "first"
    attention_features: ClassVar[set[str]] = set()
    stores_state: ClassVar[bool] = True  # the statistics lie in the files, beside the weights

    @property
    def abstract(self) -> dict:
        """The tree of Params."""
        return _trees(self.config)[0]

    @property
    def state(self) -> dict:
        """The tree of Params of the norms' running statistics."""
        return _trees(self.config)[1]

    def with_trained(self, trainable: dict) -> "Model":
        """The same model; a norm of which nothing is trained keeps its statistics."""
        on = params_lib.flatten(trainable)
        norms = (name.removesuffix("/mean") for name in params_lib.flatten(self.state) if name.endswith("/mean"))
        return dataclasses.replace(self, frozen=frozenset(n for n in norms if not (on[f"{n}/scale"] or on[f"{n}/b"])))

    def outputs(
        self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None, model_state: dict | None = None
    ) -> tuple[jax.Array, dict]:
        """(features [B, 1, D], new statistics) of a batch's images; rng None: in evaluation.

        Raises: ModelError without the statistics.
        """
        if model_state is None:
            raise ModelError("a ResNet needs model_state, the statistics of its batch norms")
        c, new = self.config, dict[str, jax.Array]()
        p, state = params_lib.flatten(params), params_lib.flatten(model_state)
        there = batch.get("weights", jnp.ones((batch["image"].shape[0], 1)))[:, 0] > 0

        def convolved(x, path, stride):
            norm = f"{path}_norm"
            stored = {k: state[f"{norm}/{k}"] for k in ("mean", "var")}
            real = None if rng is None or norm in self.frozen else there
            x = convolve(x, p[f"{path}/w"], stride)
            x, own = batch_norm(x, p[f"{norm}/scale"], p[f"{norm}/b"], stored, real, c.norm_eps)
            new.update({f"{norm}/{k}": v for k, v in own.items()})
            return x

        x = normalised(batch["image"], c.mean, c.std).astype(c.dtype)
        x = jax.nn.relu(convolved(x, "stem", 1 if c.small else 2))
        if not c.small:  # the largest of each 3x3 pixels, at every second one
            pads = [(0, 0), (1, 1), (1, 1), (0, 0)]
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)
        for name, *block in blocks(c):
            before, parts = x, convolutions(c, *block)
            for part, *_, stride in parts:
                if part == "shortcut":  # the last of them
                    before = convolved(before, f"{name}/{part}", stride)
                else:
                    x = convolved(x if part == "conv1" else jax.nn.relu(x), f"{name}/{part}", stride)
            if before.shape != x.shape:
                more = (x.shape[-1] - before.shape[-1]) // 2
                before = jnp.pad(before[:, ::2, ::2], [(0, 0)] * 3 + [(more, more)])
            x = jax.nn.relu(x + before)
        hidden = jnp.mean(x.astype(jnp.float32), (1, 2))[:, None]
        return hidden.astype(c.dtype), params_lib.map_named(lambda name, _: new[name], model_state)

    def train_flops(self, trainable: dict) -> Callable[[float, float, Callable], float]:
        """(images, _, _) -> FLOPs of a step that trains all: three times the forward pass."""
        del trainable
        c, side = self.config, self.config.image_size
        batch = {"image": jax.ShapeDtypeStruct((1, side, side, c.channels), jnp.uint8)}
        trees = (params_lib.shapes(self.abstract), params_lib.shapes(self.state))

        def forward(params, state, batch):
            return self.outputs(params, batch, None, state)[0]

        cost: Any = jax.jit(forward).lower(*trees, batch).cost_analysis()
        return lambda images, trained, pairs: 3 * cost["flops"] * images

    def replace(self, **changes: Any) -> "Model":
        """The same model with other fields of its Config; those that it does not have are left."""
        known = {f.name for f in dataclasses.fields(self.config)}
        own = {k: v for k, v in changes.items() if k in known}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **own))


def convolve(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
    """The convolution of x [B, H, W, C] with w [side, side, C, D], padded on both sides alike."""
    pad = (w.shape[0] // 2,) * 2
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w.astype(x.dtype), (stride, stride), (pad, pad), dimension_numbers=dims)


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, state: dict, there: jax.Array | None, eps: float
) -> tuple[jax.Array, dict]:
    """(x [B, H, W, C] normalised, the new statistics); scale, bias, mean and var of state: [C].

    there: bool [B], the images whose statistics count; None: the stored ones are read, and stay. Over devices these are
    the statistics of all images of the batch.
    """
    mean, var = state["mean"], state["var"]
    if there is not None:
        w = there.astype(jnp.float32)[:, None, None, None]
        n = jnp.maximum(jnp.sum(w) * x.shape[1] * x.shape[2], 1.0)
        wide = x.astype(jnp.float32)
        mean = jnp.sum(wide * w, (0, 1, 2)) / n
        var = jnp.sum((wide - mean) ** 2 * w, (0, 1, 2)) / n
        fresh = {"mean": mean, "var": var * n / jnp.maximum(n - 1, 1)}
        some = jnp.any(there)
        state = {k: jnp.where(some, v + MOMENTUM * (fresh[k] - v), v) for k, v in state.items()}
        state = jax.lax.stop_gradient(state)
    factor = jax.lax.rsqrt(var + eps) * scale
    y = x.astype(jnp.float32) * factor + (bias - mean * factor)
    return y.astype(x.dtype), state
