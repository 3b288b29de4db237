"""One abstract tree describes a model's parameters; everything else is derived from it.

A tree is any pytree. Leaves are named by their path, joined with "/": "layers/0-11/attn/q/w". Trained and frozen
parameters are two trees of the same structure, with None where a leaf belongs to the other tree: None is an empty
subtree to JAX, so the optimizer and the gradient never see it.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sftjax.errors import ConfigError
from sftjax.terminal import columns


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter before it exists: its shape, the logical axis of each dimension, its init.

    init is called as init(key, shape, dtype), as in jax.nn.initializers. inputs: of the matrix of a product, the
    logical axes that the product sums over; None for all that is no such matrix: a bias, the scale of a norm, a table
    whose rows are looked up. Muon and the count of model FLOPs go by it. per: numbers of the model in each element.
    ValueError where shape, axes and inputs do not belong together.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable = jax.nn.initializers.normal(0.02)
    inputs: tuple[str, ...] | None = None
    per: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"Param has shape {self.shape} but axes {self.axes}")
        if self.inputs is not None and not (self.inputs and {*self.inputs} <= {*self.axes}):
            raise ValueError(f"Param has inputs {self.inputs} but axes {self.axes}")


def is_param(x: Any) -> bool:
    """Is it a Param; the `is_leaf` of walks over trees of them."""
    return isinstance(x, Param)


# The "/"-joined name of a jax.tree_util key path.
path_name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] = is_param) -> list[tuple[str, Any]]:
    """[(name such as "layers/attn/q/w", leaf)] in tree order; None is no leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path), leaf) for path, leaf in leaves]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] = is_param) -> dict[str, Any]:
    """{name: leaf} in tree order; None is no leaf."""
    return dict(named_leaves(tree, is_leaf))


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """tree_map whose function gets the leaf's name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest, is_leaf=is_param
    )


def replace(abstract: Any, nodes: Sequence[tuple[str, Callable[[Param], Any]]]) -> Any:
    """The abstract tree with a node in place of each Param whose name one of `nodes` matches.

    nodes: ordered (regex, make) pairs; make(Param) -> a node of Params (see ops.weight), or the Param to leave it as it
    is. Raises ValueError for a regex that matches no name.
    """
    if not nodes:
        return abstract
    makers = match_rules((*nodes, (".*", lambda p: p)), abstract, "nodes")
    return map_named(lambda _, p, make: make(p), abstract, makers)


# ---- from the abstract tree ----------------------------------------------------------------


def init(abstract: Any, rng: jax.Array, dtype: DTypeLike = jnp.float32, shardings: Any = None) -> Any:
    """Initialise every parameter, each from its own key, so that adding one changes no other."""

    def make(rng):
        def one(name, p):
            return p.init(jax.random.fold_in(rng, zlib.crc32(name.encode())), p.shape, dtype)

        return map_named(one, abstract)

    return jax.jit(make, out_shardings=shardings)(rng)


def shapes(abstract: Any, dtype: DTypeLike = jnp.float32, shardings: Any = None) -> Any:
    """jax.ShapeDtypeStruct of every parameter, for restore targets and ahead-of-time compiles."""
    struct = lambda p, s=None: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s)  # noqa: E731
    return jax.tree.map(struct, abstract, *([] if shardings is None else [shardings]), is_leaf=is_param)


def count(tree: Any) -> int:
    """Number of scalars in a tree of Params or arrays; a byte, which ops.quantized alone has, holds two."""
    per = lambda x: x.per if is_param(x) else 1 + (x.dtype == jnp.uint8)  # noqa: E731
    return sum(int(np.prod(x.shape)) * per(x) for x in jax.tree.leaves(tree, is_leaf=is_param))


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def table(params: Any, trainable: Any) -> str:
    """What is trained and what is not: a line for each parameter with shape, dtype and count."""
    rows = [("parameter", "shape", "dtype", "count", "trained")]
    for (name, leaf), on in zip(flatten(params).items(), jax.tree.leaves(trainable), strict=True):
        shape = "x".join(map(str, leaf.shape))
        rows.append((name, shape, str(leaf.dtype), f"{leaf.size:,}", "yes" if on else "frozen"))
    return columns(rows)


# ---- ordered regex rules -------------------------------------------------------------------


def match_rules(rules: Sequence[tuple[str, Any]], tree: Any, what: str) -> Any:
    """A tree like `tree` of the values of the first rule whose regex matches the whole leaf name.

    rules: ordered (regex, value) pairs. Raises ConfigError for a leaf that no rule covers and for a rule that matches
    no leaf: nearly always typing errors that would train the wrong thing.
    """
    names = list(flatten(tree))
    for pattern, _ in rules:
        try:
            hit = any(re.fullmatch(pattern, n) for n in names)
        except re.error as e:
            raise ConfigError(f"{what}: rule {pattern!r} is not a regular expression: {e}") from None
        if not hit:
            known = ", ".join(names[:12]) + (f", ... ({len(names) - 12} more)" if len(names) > 12 else "")
            raise ConfigError(
                f"{what}: rule {pattern!r} matches no parameter. Rules match whole names; the names here are: {known}"
            )

    def value(name, _):
        for pattern, v in rules:
            if re.fullmatch(pattern, name):
                return v
        raise ConfigError(f"{what}: no rule covers parameter {name!r}; end the rules with ('.*', value) for the rest")

    return map_named(value, tree)


# ---- trained and frozen --------------------------------------------------------------------


def partition(tree: Any, trainable: Any) -> tuple[Any, Any]:
    """(trained, frozen): two trees shaped like `tree`, None where the other has the leaf."""
    trained = jax.tree.map(lambda x, t: x if t else None, tree, trainable)
    frozen = jax.tree.map(lambda x, t: None if t else x, tree, trainable)
    return trained, frozen


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree again; the inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)
