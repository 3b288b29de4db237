"""Adapters: the node of a frozen weight with a trained change of low rank beside it, and models made of such nodes.

LoRA (arXiv 2106.09685), scaled by the root of the rank (rsLoRA, 2312.03732), with a trained length for each output
(DoRA, 2402.09353), begun at the weight's largest singular values (PiSSA, 2404.02948) or its first orthogonal directions
(OLoRA, 2406.01775); figures are those of PEFT.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from sftjax import hf, parallel
from sftjax import params as params_lib
from sftjax.errors import ConfigError
from sftjax.ops import dropout, linear, weight
from sftjax.ops.quantized import Quantized, product
from sftjax.ops.weight import is_node
from sftjax.params import Param
from sftjax.terminal import columns

BATCH = ("layers", "expert")  # the axes along which a weight holds many matrices
PRESETS = {"attention": "(attn|cross)/[qkvo]", "mlp": "mlp/(up|gate|down)"}
PRESETS = {"all_linear": "({attention}|{mlp})".format(**PRESETS)} | PRESETS
PRESETS = {name: f"(.*/)?layers/[^/]+/{weights}/w" for name, weights in PRESETS.items()}


@struct.dataclass
class LoRA(weight.Node):
    """base + scale * (a b - the product of `first`), its outputs' lengths made `magnitude`."""

    base: Any  # never differentiated by
    a: Any  # [..., *inputs, rank]
    b: Any  # [..., rank, *outputs]
    magnitude: Any = None  # of DoRA: [..., *outputs]
    first: Any = None  # of PiSSA and OLoRA: a and b at step 0, so that the base stays that of the files
    seed: Any = None  # of dropout, uint32 [..., 2]; within a loss only
    # Of each dimension of the stacked weight: "b" of many matrices, "i" of inputs, "o" of outputs.
    dims: str = struct.field(pytree_node=False, default="io")
    fan_in: int = struct.field(pytree_node=False, default=0)
    scale: float = struct.field(pytree_node=False, default=1.0)
    rate: float = struct.field(pytree_node=False, default=0.0)  # of dropout of what a reads
    kind: str = struct.field(pytree_node=False, default="lora")

    @classmethod
    def of(cls, p: Param, *, kind: str, rank: int, scale: float, rate: float = 0.0) -> "LoRA":
        """The node of Params for the matrix p, with a drawn and b of 0. kind: lora, dora, pissa or olora."""
        dims = "".join("b" if axis in BATCH else "i" if axis in (p.inputs or ()) else "o" for axis in p.axes)
        node = cls(p, None, None, None, (), dims=dims, scale=scale, rate=rate, kind=kind)
        (batch, inner, outer), axes, zeros = node.split(p.shape), node.leaf_axes(p.axes), jax.nn.initializers.zeros
        bound = math.prod(inner) ** -0.5
        uniform = lambda key, shape, of: jax.random.uniform(key, shape, of, -bound, bound)  # noqa: E731
        a = Param((*batch, *inner, rank), axes.a, uniform, p.inputs)
        b = Param((*batch, rank, *outer), axes.b, zeros, ("rank",))
        lengths = Param((*batch, *outer), tuple(x for x in axes.b if x != "rank"), zeros) if kind == "dora" else None
        first = (a, b) if kind in ("pissa", "olora") else None
        return dataclasses.replace(node, a=a, b=b, magnitude=lengths, first=first, fan_in=math.prod(inner))

    @property
    def dtype(self) -> Any:
        """Of the base."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.base.shape

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
        base = self.base.leaf_axes(axes) if is_node(self.base) else axes
        return dataclasses.replace(self, base=base, a=a, b=b, magnitude=lengths or None, first=first or None, seed=seed)

    def started(self) -> "LoRA":
        """With the start that follows from the base: DoRA's lengths, the factors of PiSSA and OLoRA."""
        if self.magnitude is not None:
            return dataclasses.replace(self, magnitude=self._norm().astype(self.magnitude.dtype))
        batch, inner, outer = self.split(range(len(self.base.shape)))
        w = weight.dense(self.base, jnp.float32).transpose(*batch, *inner, *outer)
        w, rank = w.reshape(*w.shape[: len(batch)], self.fan_in, -1), self.a.shape[-1]
        if self.kind == "olora":
            q, r = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
            a, b = jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2)
        else:
            u, s, v = jnp.linalg.svd(w, full_matrices=False)
            root = jnp.sqrt(s[..., :rank] / self.scale)
            a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
        a, b = (x.reshape(old.shape).astype(old.dtype) for x, old in ((a, self.a), (b, self.b)))
        first = tuple(x.astype(old.dtype) for x, old in zip((a, b), self.first, strict=True))
        return dataclasses.replace(self, a=a, b=b, first=first)

    def dtypes(self, dtype: DTypeLike) -> "LoRA":
        """See Node; the lengths stay in float32."""
        out = jax.tree.map(lambda _: dtype, self)
        out = out if self.magnitude is None else dataclasses.replace(out, magnitude=jnp.float32)
        return dataclasses.replace(out, base=self.base.dtypes(dtype)) if is_node(self.base) else out

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

        # Lengths of outputs that were rounded before would be lost in the next rounding.
        kind = None if self.magnitude is None else jnp.float32
        return self._joined(
            x, self._by_base(functools.partial(jnp.einsum, equation, preferred_element_type=kind)), change
        )

    def _by_base(self, fn: Callable, *more: jax.Array):
        """fn(x, base, *more) as a function of x."""
        if is_node(self.base):
            return lambda x: product(fn, x, self.base, *more)
        return lambda x: fn(x, self.base.astype(x.dtype), *more)

    def ragged(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """See Node."""
        if self.magnitude is not None:
            raise ConfigError("adapter.kind='dora' is not for experts: leave them out of adapter.targets, or take lora")
        times = lambda x, w: jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)  # noqa: E731
        change = lambda x, a, b: times(times(x, a) * self.scale, b)  # noqa: E731
        return self._joined(x, self._by_base(jax.lax.ragged_dot, sizes), change)

    def _joined(self, x, base: Callable, change: Callable):
        """base(x) and the change, before which x has dropout; DoRA's lengths as PEFT has them."""
        y, dropped = base(x), self._dropped(x)
        delta = change(dropped, self.a, self.b)
        delta = delta if self.first is None else delta - change(x, *self.first)
        if self.magnitude is None:
            return y + delta
        gain = self._gain()
        y = gain * (y + delta) if dropped is x else y + (gain - 1) * base(dropped) + gain * delta
        return y.astype(x.dtype)

    def _sum(self):
        """The base and the change in float32."""
        letters = string.ascii_lowercase[: len(self.base.shape)]
        batch, inner, outer = map("".join, self.split(letters))

        def product(a, b):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return self.scale * jnp.einsum(f"{batch}{inner}z,{batch}z{outer}->{letters}", a, b, precision="highest")

        w = weight.dense(self.base, jnp.float32) + product(self.a, self.b)
        return w if self.first is None else w - product(*self.first)

    def _norm(self):
        """The length of each output's vector of inputs."""
        _, inner, _ = self.split(range(len(self.base.shape)))
        if math.prod(self.base.shape[i] for i in inner) != self.fan_in:
            raise ConfigError("adapter.kind='dora' with model.remat full or offload: leave mlp/down out of targets")
        return jnp.sqrt(jnp.sum(jnp.square(self._sum()), inner))

    def _gain(self):
        """What the lengths make of each output; the present ones are taken for constants."""
        return self.magnitude.astype(jnp.float32) / jnp.maximum(jax.lax.stop_gradient(self._norm()), 1e-30)

    def _dropped(self, x):
        if self.seed is None:
            return x
        flat = x.reshape(*(x.shape[:2] if x.ndim > 2 else (1, len(x))), -1)
        ids, shards = dropout.ids(flat.shape[:2]), (*parallel.RULES["batch"], "context")
        here = tuple(axis for axis in shards if axis in parallel.manual_axes())
        ids = ids + jax.lax.axis_index(here) * ids.size if here else ids  # each device has a part of the batch
        return dropout.dropout(flat, self.rate, self.seed, ids).reshape(x.shape)


# ---- models with adapters ------------------------------------------------------------------


def adapt(section: ConfigDict, model: Any, quantize: str = "") -> Any:
    """The model with nodes in place of the weights that the config's section `adapter` names; itself without a kind.

    quantize: in how few bits the linear layers are held, model.quantize. Raises: ConfigError for a target that matches
    no weight, with the nearest names, and for a rank beyond the matrix.
    """
    if not section.kind and not quantize:
        return model
    kind, named = section.kind, params_lib.flatten(model.abstract)
    unused = re.compile(getattr(getattr(model, "config", None), "unused", "(?!)"))
    named = {n: p for n, p in named.items() if hasattr(model, "nodes") and not unused.fullmatch(n)}
    names = _matched(section.targets, named) if kind else []
    rules = (*((PRESETS.get(pattern, pattern), n) for pattern, n in section.ranks), (".*", section.rank))
    ranks = params_lib.match_rules(rules, dict.fromkeys(names, 0), "adapter.ranks") if kind else {}
    fewer = [name for name in named if re.fullmatch(PRESETS["all_linear"], name)] if quantize else []
    if quantize and not fewer:
        raise ConfigError(f"model.quantize={quantize!r}: the model has no linear layers in a stack; leave it at ''")
    stored = hf.stored_dtypes(model) if getattr(model, "source", None) else {}

    def make(name, p):
        base = Quantized.of(p, kind=quantize, dtype=stored.get(name, "float32")) if name in fewer else p
        if name not in names:
            return base
        scale = section.alpha / (ranks[name] ** 0.5 if kind == "rslora" else ranks[name])
        made = LoRA.of(p, kind=kind, rank=ranks[name], scale=scale, rate=section.dropout)
        return dataclasses.replace(made, base=base)

    every = dict.fromkeys([*names, *fewer])
    model = dataclasses.replace(model, nodes=tuple((re.escape(n), functools.partial(make, n)) for n in every))
    for name, node in nodes_of(model.abstract).items():
        _, ins, outs = map(math.prod, node.split(node.base.shape))
        if (rank := ranks[name]) > min(ins, outs):
            raise ConfigError(
                f"adapter.{'rank' if rank == section.rank else 'ranks'}={rank}: {name} is a matrix of {ins} x {outs},"
                f" expected 1 to {min(ins, outs)}; lower it,"
                " or leave this weight out of adapter.targets"
            )
    return model


def _matched(targets: Sequence[str], named: dict[str, Param]) -> list[str]:
    # No embedding, where a row is no product; no convolution, which sums over its places too; no head of classes.
    known = [
        n for n, p in named.items() if p.inputs and "channels" not in p.axes and not n.startswith(("embed", "score"))
    ]
    found = list[str]()
    for target in targets or [""]:
        try:
            own = [name for name in known if re.fullmatch(PRESETS.get(target, target), name)]
        except re.error as e:
            raise ConfigError(f"adapter.targets: {target!r} is not a regular expression: {e}") from None
        if not own:
            near = ", ".join(difflib.get_close_matches(target, [*PRESETS, *known], 3, 0))
            raise ConfigError(
                f"adapter.targets: {target!r} matches no weight that takes an adapter, expected {', '.join(PRESETS)}"
                f" or a regular expression over whole names; the nearest are {near}"
            )
        found += own
    return list(dict.fromkeys(found))


def nodes_of(tree: Any) -> dict[str, LoRA]:
    """{name of the weight: its adapter} of a tree of parameters or Params."""
    return {name: w for name, w in params_lib.named_leaves(tree, is_node) if isinstance(w, LoRA)}


def table(model: Any) -> str:
    """A line for each weight with an adapter: how many matrices of which size it is, and what is trained."""
    rows: list[tuple] = [("weight", "matrices", "inputs", "outputs", "rank", "trained")]
    for name, node in nodes_of(model.abstract).items():
        sizes = (*map(math.prod, node.split(node.base.shape)), node.a.shape[-1])
        rows.append((name, *sizes, f"{params_lib.count([node.a, node.b, node.magnitude]):,}"))
    return columns(rows, range(1, 6))


def rules(given: Sequence, model: Any) -> Sequence:
    """What is trained, as ordered rules: `given`, or with adapters these, and beside them what `given` names.

    given: optim.trainable. At its default it stands for nothing but the parts of a head that the files lack.
    """
    if not nodes_of(model.abstract):
        return given
    if tuple(map(tuple, given)) == ((".*", True),):
        head = hf.drawn(without(model)) if getattr(model, "source", None) else ()
        given = (*((re.escape(name), True) for name in head), (".*", False))
    return ((r".*/w/(base(/\w+)?|first/\d)", False), (r".*/w/(a|b|magnitude)", True), *given)


def _base(w):
    return w.base if isinstance(w, LoRA) else w


def plain(kinds: Any) -> Any:
    """Of a tree of dtypes that with the weight's in place of each node."""
    one = lambda w: jnp.dtype(w.dtype) if isinstance(w := _base(w), Quantized) else w  # noqa: E731
    return jax.tree.map(one, kinds, is_leaf=is_node)


def packed(model: Any) -> dict[str, Quantized]:
    """{name: the node of Params} of each weight that is held in fewer bits, an adapter's base among them."""
    leaves = params_lib.named_leaves(model.abstract, is_node)
    return {name: w for name, leaf in leaves if isinstance(w := _base(leaf), Quantized)}


def without(model: Any) -> Any:
    """The model without adapters."""
    return dataclasses.replace(model, nodes=()) if getattr(model, "nodes", ()) else model


def begun(model: Any, params: Any, kinds: Any, mesh: Mesh, seed: int) -> Any:
    """The parameters at step 0, of those without adapters, which are given up. kinds: tree of dtypes."""
    if not getattr(model, "nodes", ()):
        return params
    own = lambda w: dataclasses.replace(w, base=None) if isinstance(w, LoRA) else None  # noqa: E731
    new = jax.tree.map(own, model.abstract, is_leaf=is_node)
    layouts, new_layouts = (parallel.param_shardings(mesh, tree) for tree in (model.abstract, new))
    new = params_lib.init(new, jax.random.key(seed), shardings=new_layouts)

    def one(p, w, node, kind, layout):
        if isinstance(base := _base(p), Quantized) and not is_node(w):  # it was drawn
            w = jax.jit(base.pack, out_shardings=_base(layout))(w)
        if not isinstance(node, LoRA):
            return w
        node = dataclasses.replace(jax.tree.map(lambda x, k: x.astype(k), node, own(kind)), base=w)
        start = jax.jit(LoRA.started, donate_argnums=0, out_shardings=layout)
        return node if node.magnitude is None and node.first is None else start(node)

    leaf = lambda x: is_node(x) or params_lib.is_param(x)  # noqa: E731
    return jax.tree.map(one, model.abstract, params, new, kinds, layouts, is_leaf=leaf)


def merged(model: Any, params: Any) -> tuple[Any, Any]:
    """(model, parameters) without adapters: added up in float32, then in the dtype of the base."""
    dense = jax.jit(weight.dense, static_argnums=1)
    one = lambda w: dense(w, jnp.dtype(_base(w).dtype)) if is_node(w) else w  # noqa: E731
    return without(model), jax.tree.map(one, params, is_leaf=is_node)


def seeded(loss_fn: Callable) -> Callable:
    """The loss function with dropout of adapters by its rng; with rng None, as it is."""

    def with_seeds(params, batch, rng, *state: Any):
        number = itertools.count(2**16)  # small ones are folded into the key elsewhere

        def one(w):
            if rng is None or not isinstance(w, LoRA) or not w.rate:
                return w
            key, lead = jax.random.fold_in(rng, next(number)), w.base.shape[: w.dims[0] == "b"]
            return dataclasses.replace(w, seed=jax.random.bits(key, (*lead, 2), jnp.uint32))

        return loss_fn(jax.tree.map(one, params, is_leaf=is_node), batch, rng, *state)

    return with_seeds
