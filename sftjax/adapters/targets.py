"""From config.adapter to a model: which weights have adapters, what is trained, how they begin and are merged."""

import dataclasses
import difflib
import functools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import hf, parallel
from sftjax import params as params_lib
from sftjax.adapters.lora import LoRA
from sftjax.errors import ConfigError
from sftjax.ops.weight import is_node
from sftjax.params import Param
from sftjax.terminal import columns

PRESETS = {"attention": "(attn|cross)/[qkvo]", "mlp": "mlp/(up|gate|down)"}
PRESETS = {"all_linear": "({attention}|{mlp})".format(**PRESETS)} | PRESETS
PRESETS = {name: f"(.*/)?layers/[^/]+/{weights}/w" for name, weights in PRESETS.items()}


def adapt(section: ConfigDict, model: Any) -> Any:
    """The model with nodes in place of the weights that the config's section `adapter` names; itself without a kind.

    Raises: ConfigError for a target that matches no weight, with the nearest names, and for a rank beyond the matrix.
    """
    if not section.kind:
        return model
    if not hasattr(model, "nodes"):
        raise ConfigError(f"adapter.kind={section.kind!r}: a {type(model).__name__} takes no adapters; set it to ''")
    kind, rank = section.kind, section.rank
    scale = section.alpha / (rank**0.5 if kind == "rslora" else rank)
    make = functools.partial(LoRA.of, kind=kind, rank=rank, scale=scale, rate=section.dropout)
    names = _matched(section.targets, params_lib.flatten(model.abstract))
    model = dataclasses.replace(model, nodes=(("|".join(map(re.escape, names)), make),))
    for name, node in nodes_of(model.abstract).items():
        _, ins, outs = map(math.prod, node.split(node.base.shape))
        problem = f"rank={rank}: {name} is a matrix of {ins} x {outs}, expected 1 to {min(ins, outs)}"
        if kind in ("dora", "pissa") and (not node.base.inputs or (kind == "dora" and "expert" in node.base.axes)):
            problem = f"kind={kind!r}: of {name}, a table or experts, expected lora or rslora"
        elif rank <= min(ins, outs):
            continue
        raise ConfigError(f"adapter.{problem}; change it, or leave this weight out of adapter.targets")
    return model


def _matched(targets: Sequence[str], named: dict[str, Param]) -> list[str]:
    # A tied embedding's adapter would be the head's too, which PEFT's files can't say; a convolution is no matrix.
    known = [name for name, p in named.items() if (p.inputs if name != "embed/w" else not p.inputs)]
    known, found = [name for name in known if "channels" not in named[name].axes], list[str]()
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


def _is_leaf(x):
    return is_node(x) or params_lib.is_param(x)


def nodes_of(tree: Any) -> dict[str, LoRA]:
    """{name of the weight: its node} of a tree of parameters or Params."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    return {params_lib.path_name(path): w for path, w in leaves if is_node(w)}


def table(model: Any) -> str:
    """A line for each weight with an adapter: how many matrices of which size it is, and what is trained."""
    rows: list[tuple] = [("weight", "matrices", "inputs", "outputs", "rank", "trained")]
    for name, node in nodes_of(model.abstract).items():
        sizes = (*map(math.prod, node.split(node.base.shape)), node.a.shape[-1])
        rows.append((name, *sizes, f"{params_lib.count([node.a, node.b, node.magnitude]):,}"))
    return columns(rows, range(1, 6))


def rules(given: Sequence, default: Sequence, model: Any) -> Sequence:
    """What is trained, as ordered rules: `given`, or with adapters these, and beside them what `given` names.

    given: optim.trainable. At its default it stands for nothing but the parts of a head that the files lack.
    """
    if not nodes_of(model.abstract):
        return given
    if tuple(map(tuple, given)) == default:
        given = (*((re.escape(name), True) for name in hf.drawn(without(model))), (".*", False))
    return ((r".*/w/(base|first/\d)", False), (r".*/w/(a|b|magnitude)", True), *given)


def plain(tree: Any) -> Any:
    """The tree with the base in place of each node."""
    return jax.tree.map(lambda w: w.base if is_node(w) else w, tree, is_leaf=is_node)


def without(model: Any) -> Any:
    """The model without adapters."""
    return dataclasses.replace(model, nodes=()) if getattr(model, "nodes", ()) else model


def begun(model: Any, params: Any, kinds: Any, mesh: Mesh, seed: int) -> Any:
    """The parameters at step 0, of those without adapters, which are given up. kinds: tree of dtypes."""
    if not nodes_of(model.abstract):
        return params
    own = lambda w: dataclasses.replace(w, base=None) if is_node(w) else None  # noqa: E731
    new = jax.tree.map(own, model.abstract, is_leaf=_is_leaf)
    layouts, new_layouts = (parallel.param_shardings(mesh, tree) for tree in (model.abstract, new))
    new = params_lib.init(new, jax.random.key(seed), shardings=new_layouts)

    def one(w, node, kind, layout):
        if not is_node(node):
            return w
        node = dataclasses.replace(jax.tree.map(lambda x, k: x.astype(k), node, own(kind)), base=w)
        start = jax.jit(LoRA.started, donate_argnums=0, out_shardings=layout)
        return node if node.magnitude is None and node.first is None else start(node)

    return jax.tree.map(one, params, new, kinds, layouts)


def merged(model: Any, params: Any) -> tuple[Any, Any]:
    """(model, parameters) without adapters: added up in float32, then in the dtype of the base."""
    dense = jax.jit(LoRA.dense, static_argnums=1)
    return without(model), jax.tree.map(lambda w: dense(w, w.base.dtype) if is_node(w) else w, params, is_leaf=is_node)


def seeded(loss_fn: Callable) -> Callable:
    """The loss function with dropout of adapters by its rng; with rng None, as it is."""

    def with_seeds(params, batch, rng, *state: Any):
        def one(path, w):
            if rng is None or not is_node(w) or not w.rate:
                return w
            key = jax.random.fold_in(rng, zlib.crc32(params_lib.path_name(path).encode()))
            return dataclasses.replace(w, seed=jax.random.bits(key, (*w.base.shape[: w.dims[0] == "b"], 2), jnp.uint32))

        return loss_fn(jax.tree_util.tree_map_with_path(one, params, is_leaf=is_node), batch, rng, *state)

    return with_seeds
