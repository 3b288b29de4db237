"""Frozen weights of 4 or 8 bits: codes with scales, made whole where a layer uses them; see docs/adapters.md.

nf4 is QLoRA's (arXiv 2305.14314): blocks of 64 inputs, each number one of 16 quantiles of a normal distribution, by
bitsandbytes' table, and the blocks' scales in 8 bits themselves. int4 has 15 even steps; int8 one scale of each output.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from sftjax.errors import ConfigError
from sftjax.ops import weight
from sftjax.params import Param

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
CODES = {"nf4": jnp.uint8, "int4": jnp.uint8, "int8": jnp.int8}  # of 4 bits a byte has two


@struct.dataclass
class Quantized(weight.Node):
    """A frozen weight of fewer bits. It is never differentiated by."""

    codes: Any  # of the weight's shape; of 4 bits a byte has a number of a block's first half, and one of its second
    # float32, of each output; of 4 bits int8, of each block, as (absmax - mean) * 127 / span
    absmax: Any
    span: Any = None  # float32, of each output
    mean: Any = None
    kind: str = struct.field(pytree_node=False, default="nf4")
    # Of each dimension of the stacked weight: is it one of inputs.
    inputs: tuple[bool, ...] = struct.field(pytree_node=False, default=())
    dtype: str = struct.field(pytree_node=False, default="float32")  # of the files

    @classmethod
    def of(cls, p: Param, *, kind: str, dtype: DTypeLike = "float32") -> "Quantized":
        """The node of Params for the matrix p. kind: nf4, int4 or int8."""
        inputs = tuple(axis in (p.inputs or ()) for axis in p.axes)
        node, zeros = cls(None, None, kind=kind, inputs=inputs, dtype=str(jnp.dtype(dtype))), jax.nn.initializers.zeros
        axes, outer = node.leaf_axes(p.axes), [1 if one else n for n, one in zip(p.shape, inputs, strict=True)]
        scale = Param(tuple(outer), axes.absmax if kind == "int8" else axes.span, zeros)
        if kind == "int8":
            return dataclasses.replace(node, codes=Param(p.shape, p.axes, zeros, p.inputs), absmax=scale)
        last, n = len(p.shape) + node._last, p.shape[node._last]
        if n % 2:
            raise ConfigError(f"model.quantize={kind!r} needs an even number of inputs, not {p.shape}; take 'int8'")
        halves, blocks = ((*p.shape[:last], m, *p.shape[last + 1 :]) for m in (n // 2, n // math.gcd(BLOCK, n)))
        codes = Param(halves, p.axes, zeros, p.inputs, per=2)
        return dataclasses.replace(node, codes=codes, absmax=Param(blocks, axes.absmax, zeros), span=scale, mean=scale)

    @property
    def _last(self) -> int:
        """The last dimension of inputs, counted from the end: blocks lie along it."""
        return max(i for i, one in enumerate(self.inputs) if one) - len(self.inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.codes.shape)
        shape[self._last] *= 1 + (self.kind != "int8")
        return tuple(shape)

    def leaf_axes(self, axes: weight.Axes) -> "Quantized":
        """See Node."""
        inputs = self.inputs[-len(axes) :]
        outer = tuple(None if one else axis for one, axis in zip(inputs, axes, strict=True))
        # Blocks along a dimension that is stored in parts are few, and are whole everywhere.
        blocks = tuple(None if one and axis == "embed" else axis for one, axis in zip(inputs, axes, strict=True))
        if self.kind == "int8":
            return dataclasses.replace(self, codes=axes, absmax=outer)
        return dataclasses.replace(self, codes=axes, absmax=blocks, span=outer, mean=outer)

    def dtypes(self, dtype: DTypeLike) -> "Quantized":
        """See Node; scales stay in float32."""
        return jax.tree.map(lambda _: jnp.float32, self)

    def pack(self, w: jax.Array) -> "Quantized":
        """This node with the arrays that stand for w, which may be a part of the stack."""
        w, over = w.astype(jnp.float32), tuple(i - len(self.inputs) for i, one in enumerate(self.inputs) if one)
        largest = functools.partial(jnp.max, axis=over, keepdims=True)
        if self.kind == "int8":
            top = largest(jnp.abs(w))
            return dataclasses.replace(self, codes=jnp.round(127 * _over(w, top)).astype(jnp.int8), absmax=top)
        blocks = self._blocks(w, w.shape[self._last] // math.gcd(BLOCK, w.shape[self._last]))
        top = jnp.max(jnp.abs(blocks), self._last, keepdims=True)
        low, high = jnp.split(self._codes(_over(blocks, top)), 2, self._last)
        shape = [n // 2 if i == w.ndim + self._last else n for i, n in enumerate(w.shape)]
        codes, top = (low | high << 4).reshape(shape), jnp.squeeze(top, self._last)
        mean = jnp.mean(top, over, keepdims=True)
        span = largest(jnp.abs(top - mean))
        scales = jnp.round(127 * _over(top - mean, span)).astype(jnp.int8)
        return dataclasses.replace(self, codes=codes, absmax=scales, span=span, mean=mean)

    def pack_by_layer(self, layers: Iterable[jax.Array], places: Any = None) -> "Quantized":
        """The same of a stack whose layers come one after the other, [1, ...] each. places: shardings."""
        pack = jax.jit(self.pack, out_shardings=places)
        parts = [jax.block_until_ready(pack(w)) for w in layers]
        return jax.jit(lambda parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts), out_shardings=places)(parts)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The weight as one array in `dtype`, computed in float32."""
        if self.kind == "int8":
            return (self.codes.astype(jnp.float32) * (self.absmax / 127)).astype(dtype)
        pairs = self._blocks(self.codes, self.absmax.shape[self._last])
        codes = jnp.concatenate([pairs & 15, pairs >> 4], pairs.ndim + self._last)
        top = self.mean + self.absmax.astype(jnp.float32) * (self.span / 127)
        values = _nf4(codes) if self.kind == "nf4" else (codes.astype(jnp.float32) - 8) / 7
        return (values * jnp.expand_dims(top, self._last)).reshape(self.shape).astype(dtype)

    def einsum(self, equation: str, x: jax.Array) -> jax.Array:
        """See Node."""
        return product(functools.partial(jnp.einsum, equation), x, self)

    def ragged(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See Node."""
        return product(jax.lax.ragged_dot, x, self, sizes)

    def _blocks(self, x, n):
        """[..., inputs, ...] as [..., n, inputs / n, ...]."""
        axis = x.ndim + self._last
        return x.reshape(*x.shape[:axis], n, -1, *x.shape[axis + 1 :])

    def _codes(self, x):
        """Of numbers from -1 to 1."""
        if self.kind == "int4":
            return (jnp.round(x * 7) + 8).astype(jnp.uint8)
        return sum(((x > (a + b) / 2).astype(jnp.uint8) for a, b in itertools.pairwise(NF4)), jnp.uint8(0))


def product(fn: Callable, x: jax.Array, w: Quantized, *more: Any) -> jax.Array:
    """fn(x, the whole weight, *more), linear in x. The backward pass makes the weight whole again.

    Whatever of a layer is kept for that pass, a whole weight is not among it.
    """
    return _product(fn, (x.shape, x.dtype), x, w, more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(fn, like, x, w, more):
    return fn(x, w.dense(x.dtype), *more)


def _forward(fn, like, x, w, more):
    return _product(fn, like, x, w, more), (w, more)


def _backward(fn, like, saved, dy):
    w, more = saved
    turned = jax.linear_transpose(lambda x: fn(x, w.dense(x.dtype), *more), jax.ShapeDtypeStruct(*like))
    return *turned(dy), None, None


_product.defvjp(_forward, _backward)


def _over(x, top):
    return x / jnp.where(top, top, 1)


def _nf4(codes):
    """The numbers of codes, chosen bit by bit: a table of 16 would be read element by element."""
    numbers: list[Any] = list(NF4)
    for bit in range(4):
        on = (codes >> bit) & 1 == 1
        numbers = [jnp.where(on, b, a) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]


def dtype_of(name: str, kind: str) -> Any:
    """In what the array of this name of a tree is stored, with model.quantize = kind; None for one of no such node."""
    known = {"codes": CODES.get(kind), "absmax": jnp.float32 if kind == "int8" else jnp.int8}
    return (known | {"span": jnp.float32, "mean": jnp.float32}).get(name.rpartition("/")[2]) if kind else None
