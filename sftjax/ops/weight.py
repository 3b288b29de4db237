"""The one door to a weight: the matrices and tables of layers, embedding, head and experts.

A weight is an array, or a Node: a pytree of other arrays that stands for one, such as two factors, or numbers of fewer
bits with their scales. Model code reads weights by the functions of this file only, and never asks which of the two it
holds. Biases, scales of norms and sinks are arrays.

In the abstract tree a Node holds Params, in a tree of parameters arrays; the names of its arrays go on after the
weight's: "layers/0-3/attn/q/w/a". Inside `layers` each of them has the stack's leading dimension, as the weight would
have.
"""

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sftjax.errors import ConfigError
from sftjax.ops import embed, linear
from sftjax.parallel import constrain, gather

Axes = tuple[str | None, ...]  # the logical axis of each dimension of an array; see parallel.RULES


class Node:
    """What stands for a weight. A subclass is a flax.struct dataclass of arrays.

    It has to give `leaf_axes` and `dense`. The rest follows from them, and is there to be replaced where it can be had
    for less than the whole weight.
    """

    def leaf_axes(self, axes: Axes) -> Self:
        """This node with the logical axes of each array in its place.

        axes: those of the weight, with or without `layers` in front; the arrays have them, each in the dimensions that
        it shares with the weight.
        """
        raise NotImplementedError

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The weight as one array in `dtype`."""
        raise NotImplementedError

    def dtypes(self, dtype: DTypeLike) -> Any:
        """This node with the dtype of each array in its place, where products are in `dtype`."""
        return jax.tree.map(lambda _: dtype, self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return jax.eval_shape(lambda node: node.dense(jnp.float32), self).shape

    def einsum(self, equation: str, x: jax.Array) -> jax.Array:
        """See `einsum`."""
        return linear.einsum(equation, x, self.dense(x.dtype))

    def ragged(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See `ragged`."""
        return jax.lax.ragged_dot(x, self.dense(x.dtype), sizes)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See `lookup`."""
        return embed.lookup(self.dense(dtype), tokens)

    def rows(self, index: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See `rows`."""
        return self.dense(dtype)[index]

    def as_head(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `as_head`."""
        return h, self.dense(h.dtype)


Weight = jax.Array | Node


def is_node(x: Any) -> bool:
    """Return whether x is a Node, which stands for a weight, and no array."""
    return isinstance(x, Node)


# ---- one weight ----------------------------------------------------------------------------


def einsum(equation: str, x: jax.Array, w: Weight) -> jax.Array:
    """jnp.einsum(equation, x, w) in x's dtype."""
    return w.einsum(equation, x) if isinstance(w, Node) else linear.einsum(equation, x, w)


def project(equation: str, x: jax.Array, p: dict[str, Any]) -> jax.Array:
    """The einsum with p["w"], plus p["b"] if there is one: its dimensions are the output's last."""
    y = einsum(equation, x, p["w"])
    return y + p["b"].astype(y.dtype) if "b" in p else y


def ragged(x: jax.Array, w: Weight, sizes: jax.Array) -> jax.Array:
    """The product of x [N, D], in groups of `sizes` int32 [E] rows, and each one's w [E, D, F].

    It is [N, F], in x's dtype; rows after the last group may come back as anything.
    """
    if isinstance(w, Node):
        return w.ragged(x, sizes)
    return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)


def lookup(w: Weight, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The rows of an embedding w [V, D] for tokens int32 [B, S] of a batch -> [B, S, D] in `dtype`.

    On a mesh by parts of the width, which are exchanged; see ops.embed.
    """
    if isinstance(w, Node):
        return w.lookup(tokens, dtype)
    return embed.lookup(w, tokens).astype(dtype)


def rows(w: Weight, index: jax.Array, dtype: DTypeLike) -> jax.Array:
    """w[index] in `dtype`, for a table that is small, or rows that are few: w [N, D]."""
    return w.rows(index, dtype) if isinstance(w, Node) else w[index].astype(dtype)


def as_head(h: jax.Array, w: Weight) -> tuple[jax.Array, jax.Array]:
    """(hidden states [..., K], array [V, K]) with the products of h [..., D] and the head w [V, D].

    So the loss takes any head by chunks of its logits and knows arrays only.
    """
    return w.as_head(h) if isinstance(w, Node) else (h, w)


def dense(w: Weight, dtype: DTypeLike) -> jax.Array:
    """The weight as one array in `dtype`."""
    return w.dense(dtype) if isinstance(w, Node) else w.astype(dtype)


# ---- trees of weights ----------------------------------------------------------------------
# axes: a tree like that of the weights, of the logical axes of each.


def map_arrays(fn: Callable[[Any, Axes], Any], tree: Any, axes: Any) -> Any:
    """fn(array, its logical axes) in place of each array, those of nodes among them."""

    def one(w, axes):
        return jax.tree.map(fn, w, w.leaf_axes(axes)) if is_node(w) else fn(w, axes)

    return jax.tree.map(one, tree, axes, is_leaf=is_node)


def gather_for_use(tree: Any, axes: Any, dtype: DTypeLike) -> Any:
    """The weights in `dtype`, each gathered over fsdp for this use only.

    Their arrays' gradients come in the layout in which these are stored: they are scattered as they are summed.
    """

    def one(w, axes):
        own = (w.leaf_axes(axes), w.dtypes(dtype)) if is_node(w) else (axes, dtype)
        return jax.tree.map(gather.for_use, w, *own)

    return jax.tree.map(one, tree, axes, is_leaf=is_node)


def as_stored(tree: Any, axes: Any) -> Any:
    """The same weights; gradients come laid out as the arrays are, so that none is ever whole."""
    return map_arrays(lambda w, axes: constrain(w, *axes), tree, axes)


def cut(tree: Any, axes: Any, axis: str, i: int, n: int) -> Any:
    """Part i of n of the weights along their logical axis `axis`, which n divides.

    What a node holds without that axis stays whole.
    """

    def part(w, axes):
        if axis not in axes:
            return w
        dim = axes.index(axis)
        if w.shape[dim] % n:
            raise ConfigError(f"model.remat: {n} parts of {axis} don't divide {w.shape[dim]} blocks of model.quantize")
        size = w.shape[dim] // n
        return jax.lax.slice_in_dim(w, i * size, (i + 1) * size, axis=dim)

    return map_arrays(part, tree, axes)
