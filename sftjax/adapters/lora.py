"""The node of a frozen weight with a trained change of low rank beside it.

LoRA (arXiv 2106.09685), scaled by the root of the rank (rsLoRA, 2312.03732), with a trained length for each output
(DoRA, 2402.09353), begun at the weight's largest singular values (PiSSA, 2404.02948); figures are those of PEFT.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from sftjax.errors import ConfigError
from sftjax.ops import dropout, embed, linear, weight
from sftjax.parallel import RULES, gather, manual_axes
from sftjax.params import Param

BATCH = ("layers", "expert")  # the axes along which a weight holds many matrices


@struct.dataclass
class LoRA(weight.Node):
    """base + scale * (a b - the product of `first`), its outputs' lengths made `magnitude`."""

    base: Any  # never differentiated by
    a: Any  # [..., *inputs, rank]
    b: Any  # [..., rank, *outputs]
    magnitude: Any = None  # of DoRA: [..., *outputs]
    first: Any = None  # of PiSSA: a and b at step 0, so that the base stays that of the files
    seed: Any = None  # of dropout, uint32 [..., 2]; within a loss only
    # Of each dimension of the stacked weight: "b" of many matrices, "i" of inputs, "o" of outputs.
    dims: str = struct.field(pytree_node=False, default="io")
    fan_in: int = struct.field(pytree_node=False, default=0)
    scale: float = struct.field(pytree_node=False, default=1.0)
    rate: float = struct.field(pytree_node=False, default=0.0)  # of dropout of what a reads

    @classmethod
    def of(cls, p: Param, *, kind: str, rank: int, scale: float, rate: float = 0.0) -> "LoRA":
        """The node of Params for p. kind: lora, dora or pissa. Of a table without inputs a is 0 at first, else b is."""
        inputs, zeros = p.inputs or p.axes[:1], jax.nn.initializers.zeros
        dims = "".join("b" if axis in BATCH else "i" if axis in inputs else "o" for axis in p.axes)
        node = cls(p, None, None, None, (), dims=dims, scale=scale, rate=rate)
        (batch, inner, outer), axes = node.split(p.shape), node.leaf_axes(p.axes)
        bound = math.prod(inner) ** -0.5
        starts: tuple = (lambda key, shape, of: jax.random.uniform(key, shape, of, -bound, bound)), zeros
        starts = starts if p.inputs else (zeros, jax.nn.initializers.normal(1.0))
        a = Param((*batch, *inner, rank), axes.a, starts[0], p.inputs)
        b = Param((*batch, rank, *outer), axes.b, starts[1], ("rank",))
        lengths = Param((*batch, *outer), tuple(x for x in axes.b if x != "rank"), zeros) if kind == "dora" else None
        first = (a, b) if kind == "pissa" else None
        return dataclasses.replace(node, a=a, b=b, magnitude=lengths, first=first, fan_in=math.prod(inner))

    def split(self, items: Sequence) -> tuple[tuple, tuple, tuple]:
        """Those of many matrices, of inputs and of outputs, of an item for each dimension of the weight."""
        pairs = list(zip(items, self.dims[-len(items) :], strict=True))
        batch, inner, outer = (tuple(x for x, dim in pairs if dim == kind) for kind in "bio")
        return batch, inner, outer

    def leaf_axes(self, axes: weight.Axes) -> "LoRA":
        """See Node."""
        batch, inner, outer = self.split(axes)
        a, b = (*batch, *inner, "rank"), (*batch, "rank", *outer)
        lengths, first = self.magnitude is not None and (*batch, *outer), self.first is not None and (a, b)
        seed = None if self.seed is None else (*batch[: batch[:1] == ("layers",)], None)
        return dataclasses.replace(self, base=axes, a=a, b=b, magnitude=lengths or None, first=first or None, seed=seed)

    def started(self) -> "LoRA":
        """With the start that follows from the base: DoRA's lengths, PiSSA's factors."""
        if self.magnitude is not None:
            return dataclasses.replace(self, magnitude=self._norm().astype(self.magnitude.dtype))
        batch, inner, outer = self.split(range(self.base.ndim))
        w = self.base.astype(jnp.float32).transpose(*batch, *inner, *outer)
        w, rank = w.reshape(*w.shape[: len(batch)], self.fan_in, -1), self.a.shape[-1]
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[..., :rank] / self.scale)
        a = (u[..., :rank] * root[..., None, :]).reshape(self.a.shape).astype(self.a.dtype)
        b = (root[..., None] * v[..., :rank, :]).reshape(self.b.shape).astype(self.b.dtype)
        return dataclasses.replace(
            self, a=a, b=b, first=jax.tree.map(lambda x, old: x.astype(old.dtype), (a, b), self.first)
        )

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The merged weight, made in float32."""
        w = self._sum()
        if self.magnitude is not None:
            w = w * jnp.expand_dims(self._gain(), self.split(range(w.ndim))[1])
        return w.astype(dtype)

    def einsum(self, equation: str, x: jax.Array) -> jax.Array:
        """See Node."""
        of_x, of_w, of_y = equation.replace("->", ",").split(",")
        _, inner, outer = map("".join, self.split(of_w))
        low = "".join(letter for letter in of_x if letter not in inner) + "z"

        def change(x, a, b):
            x = linear.einsum(f"{of_x},{inner}z->{low}", x, a) * self.scale
            return linear.einsum(f"{low},z{outer}->{of_y}", x, b)

        return self._joined(x, lambda x: jnp.einsum(equation, x, self.base.astype(x.dtype)), change)

    def ragged(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See Node."""
        product = lambda x, w: jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)  # noqa: E731
        change = lambda x, a, b: product(product(x, a) * self.scale, b)  # noqa: E731
        return self._joined(x, lambda x: product(x, self.base), change)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See Node."""
        x = embed.lookup(self.a, tokens, ("vocab", "rank")).astype(dtype) * self.scale
        x = linear.einsum("bsr,rd->bsd", x, gather.for_use(self.b, ("rank", "embed"), dtype))
        return embed.lookup(self.base, tokens).astype(dtype) + x

    def _joined(self, x, base: Callable, change: Callable):
        """base(x) and the change, before which x has dropout; DoRA's lengths as PEFT has them."""
        y, dropped = base(x), self._dropped(x)
        delta = change(dropped, self.a, self.b)
        delta = delta if self.first is None else delta - change(x, *self.first)
        if self.magnitude is None:
            return y + delta
        gain = self._gain().astype(y.dtype)
        return gain * (y + delta) if dropped is x else y + (gain - 1) * base(dropped) + gain * delta

    def _sum(self):
        """The base and the change in float32."""
        letters = string.ascii_lowercase[: self.base.ndim]
        batch, inner, outer = map("".join, self.split(letters))

        def product(a, b):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return self.scale * jnp.einsum(f"{batch}{inner}z,{batch}z{outer}->{letters}", a, b, precision="highest")

        w = self.base.astype(jnp.float32) + product(self.a, self.b)
        return w if self.first is None else w - product(*self.first)

    def _norm(self):
        """The length of each output's vector of inputs."""
        _, inner, _ = self.split(range(self.base.ndim))
        if math.prod(self.base.shape[i] for i in inner) != self.fan_in:
            raise ConfigError(
                "adapter.kind='dora' needs all inputs of a weight at once, and model.remat cuts them in parts: take"
                " another than full and offload, or leave mlp/down out of adapter.targets"
            )
        return jnp.sqrt(jnp.sum(jnp.square(self._sum()), inner))

    def _gain(self):
        """What the lengths make of each output; the present ones are taken for constants."""
        return self.magnitude.astype(jnp.float32) / jnp.maximum(jax.lax.stop_gradient(self._norm()), 1e-30)

    def _dropped(self, x):
        if self.seed is None:
            return x
        flat = x.reshape(*(x.shape[:2] if x.ndim > 2 else (1, len(x))), -1)
        ids, shards = dropout.ids(flat.shape[:2]), (*RULES["batch"], RULES["seq"])
        here = tuple(axis for axis in shards if axis in manual_axes())
        ids = ids + jax.lax.axis_index(here) * ids.size if here else ids  # each device has a part of the batch
        return dropout.dropout(flat, self.rate, self.seed, ids).reshape(x.shape)
