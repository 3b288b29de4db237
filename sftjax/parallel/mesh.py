"""The mesh, and the one table from logical axes, which model code names, to mesh axes."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import params as params_lib
from sftjax.errors import MeshError

AnyMesh = Mesh | AbstractMesh  # with devices, or without
AXES = ("data", "fsdp", "context", "tensor", "expert")

RULES: dict[str, Any] = {  # logical axis: a mesh axis, several, or None
    # activations
    "batch": ("data", "fsdp", "expert"),
    "seq": "context",
    "act_embed": None,
    # parameters (and activations that have the same dimension)
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "expert": "expert",
    "choice": None,  # of an expert, by the router
    "classes": None,
    "channels": None,  # that a convolution sums over
    "rank": None,  # of a factor of a weight
}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the five axes. sizes: {axis: size}; one size may be -1 and takes what is left.

    Several TPU slices (devices with different slice_index) become the leading factor of `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = _arrange(mesh_shape(sizes, len(devices)), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_text(sizes: Mapping[str, int], joint: str = " x ") -> str:
    """The axes that have more than one device, and their sizes; "" where none has."""
    return joint.join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)


def mesh_shape(sizes: Mapping[str, int] | None, n: int) -> list[int]:
    """The sizes of the five axes over n devices."""
    sizes = dict(sizes or {})
    if unknown := set(sizes) - set(AXES):
        raise MeshError(f"unknown mesh axis {sorted(unknown)}; the axes are {', '.join(AXES)}")
    shape = [int(sizes.get(a, 1)) for a in AXES]
    asked = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise MeshError(f"mesh {asked}: sizes must be positive, and at most one may be -1")
    fixed = math.prod(n for n in shape if n != -1)
    if n % fixed or (-1 not in shape and fixed != n):
        raise MeshError(
            f"mesh {asked} needs {'a multiple of ' if -1 in shape else ''}{fixed} devices, found"
            f" {n}; set mesh.* so that their product is {n}, or one of them to -1"
        )
    return [n // fixed if s == -1 else s for s in shape]


def _arrange(shape, devices) -> np.ndarray:
    if devices[0].platform != "tpu":  # each host may call itself a slice
        return np.array(devices).reshape(shape)
    n = len({getattr(d, "slice_index", 0) for d in devices})
    if shape[0] % n:
        raise MeshError(f"mesh data={shape[0]} does not divide over {n} slices; only the data axis may cross slices")
    # Each of the two parts of fsdp along lines of chips; see parallel.gather.
    sizes, split = [shape[0] // n, *two_factors(shape[1]), *shape[2:]], True
    if n == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    else:
        outer = [n, *(1 for _ in sizes[1:])]
        grid = mesh_utils.create_hybrid_device_mesh(sizes, outer, devices, allow_split_physical_axes=split)
    return grid.reshape(shape)


def two_factors(n: int) -> tuple[int, int]:
    """Two factors of n, as near to each other as can be, the smaller first."""
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def spec(axes: Sequence[str | None]) -> P:
    """The PartitionSpec of logical `axes`. Two dimensions on one mesh axis are an error."""
    used, out, split = dict[str, str | None](), [], set(manual_axes())
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise MeshError(f"unknown logical axis {axis!r}; the table has {', '.join(RULES)}")
        mesh_axes = RULES[axis] if axis is not None else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        for m in names:
            if m in used:
                raise MeshError(f"logical axes {used[m]!r} and {axis!r} of one array both map to mesh axis {m!r}")
            used[m] = axis
        left = tuple(m for m in names if m not in split) or None
        out.append(left if split else mesh_axes)
    return P(*out)


def part(axes: Sequence[str | None], mesh_axes: Collection[str]) -> P:
    """The PartitionSpec of logical `axes` over some mesh axes only."""
    rules = (None if a is None else RULES.get(a) for a in axes)
    return P(*(m if isinstance(m, str) and m in mesh_axes else None for m in rules))


def named(mesh: AnyMesh, *axes: str | None) -> NamedSharding:
    """NamedSharding of logical axes."""
    return NamedSharding(mesh, spec(axes))


def param_shardings(mesh: AnyMesh, abstract: Any) -> Any:
    """A NamedSharding for every Param; a dimension that does not divide is an error, by name."""

    def one(name, p):
        sharding = named(mesh, *p.axes)
        for size, axis, part in zip(p.shape, p.axes, sharding.spec, strict=True):
            parts = axis_size(mesh, part)
            if size % parts:
                pad = f", or set model.vocab_multiple to a multiple of {parts}" * (axis == "vocab")
                raise MeshError(
                    f"parameter {name}: dimension {axis}={size} does not divide over mesh axis"
                    f" {part}={parts}; choose a size of mesh.{part} that divides {size}{pad}"
                )
        return sharding

    return params_lib.map_named(one, abstract)


def axis_size(mesh: AnyMesh, part: str | Sequence[str] | None) -> int:
    """Number of shards of one PartitionSpec entry (None, a mesh axis, or several)."""
    names = () if part is None else (part,) if isinstance(part, str) else part
    return math.prod(mesh.shape[n] for n in names)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's layout inside jit; does nothing when no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def manual_axes() -> tuple[str, ...]:
    """The mesh axes that an enclosing shard_map has split already."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def shard_map(fn: Callable, in_specs: Any, out_specs: Any, axes: Iterable[str] | None = None) -> Callable:
    """jax.shard_map over the mesh axes `axes`; None: all that are not split already."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names if axes is None else axes) - set(mesh.manual_axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
