"""The mesh, and the one table from logical axes to mesh axes.

Model code names logical axes only. The five mesh axes are always present, size 1 unless set, so
one program serves a laptop and a pod. GSPMD inserts the collectives.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import params as params_lib
from sftjax.errors import MeshError

AXES = ("data", "fsdp", "context", "tensor", "expert")

RULES: dict[str, str | tuple[str, ...] | None] = {
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
    "rank": None,  # of a factor of a weight
}


def make_mesh(sizes=None, devices=None) -> Mesh:
    """A mesh of the five axes. sizes: {axis: size}; one size may be -1 and takes what is left.

    Several TPU slices (devices with different slice_index) become the leading factor of `data`, so
    that only data-parallel traffic crosses the data-centre network.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    return Mesh(_arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes, n: int) -> list[int]:
    """The sizes of the five axes over n devices."""
    sizes = dict(sizes or {})
    unknown = set(sizes) - set(AXES)
    if unknown:
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
    tpu = devices[0].platform == "tpu"  # elsewhere each host may call itself a slice
    slices = {getattr(d, "slice_index", 0) for d in devices} if tpu else {0}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise MeshError(
                f"mesh data={shape[0]} does not divide over {len(slices)} slices; only the data"
                " axis may cross slices"
            )
        inner = [shape[0] // len(slices), *two_factors(shape[1]), *shape[2:]]
        outer = [len(slices), *(1 for _ in inner[1:])]
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
        return grid.reshape(shape)
    if tpu:  # each of the two parts of fsdp along lines of chips; see ops.gather
        grid = [shape[0], *two_factors(shape[1]), *shape[2:]]
        grid = mesh_utils.create_device_mesh(grid, devices, allow_split_physical_axes=True)
        return grid.reshape(shape)
    return np.array(devices).reshape(shape)


def two_factors(n: int) -> tuple[int, int]:
    """Two factors of n, as near to each other as can be, the smaller first."""
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def spec(axes, rules=None) -> P:
    """The PartitionSpec of logical `axes`. Two dimensions on one mesh axis are an error."""
    rules = rules or RULES
    used, out, split = {}, [], set(manual_axes())
    for axis in axes:
        if axis is not None and axis not in rules:
            raise MeshError(f"unknown logical axis {axis!r}; the table has {', '.join(rules)}")
        mesh_axes = rules[axis] if axis is not None else None
        for m in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
            if m in used:
                raise MeshError(
                    f"logical axes {used[m]!r} and {axis!r} of one array both map to mesh axis"
                    f" {m!r}"
                )
            used[m] = axis
        if split and mesh_axes:
            names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
            mesh_axes = tuple(m for m in names if m not in split) or None
        out.append(mesh_axes)
    return P(*out)


def part(axes, mesh_axes) -> P:
    """The PartitionSpec of logical `axes` over some mesh axes only."""
    keep = lambda m: m if m in mesh_axes else None  # noqa: E731
    return P(*(keep(RULES[a]) if isinstance(RULES.get(a), str) else None for a in axes))


def named(mesh, *axes) -> NamedSharding:
    """NamedSharding of logical axes."""
    return NamedSharding(mesh, spec(axes))


def param_shardings(mesh, abstract):
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


def axis_size(mesh, part) -> int:
    """Number of shards of one PartitionSpec entry (None, a mesh axis, or several)."""
    names = () if part is None else (part,) if isinstance(part, str) else part
    return math.prod(mesh.shape[n] for n in names)


def constrain(x, *axes):
    """Pin an activation's layout inside jit; does nothing when no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


# ---- programs over shards ------------------------------------------------------------------


def manual_axes() -> tuple[str, ...]:
    """The mesh axes that an enclosing shard_map has split already."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def shard_map(fn, in_specs, out_specs, axes=None):
    """jax.shard_map over the mesh axes `axes`; None: all that are not split already."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names if axes is None else axes) - set(mesh.manual_axes)
    return jax.shard_map(
        fn, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


# ---- rows on the context axis --------------------------------------------------------------


def places(length: int, shards: int):
    """The place in the row of each of its columns on a mesh with `shards` shards of the row.

    Shard i holds parts i and 2 * shards - 1 - i of 2 * shards, so that each has the same share of
    causal attention's work.
    """
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * shards):
        raise MeshError(
            f"rows of {length} tokens do not divide into twice mesh.context={shards} parts"
        )
    parts = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([parts[:shards], parts[: shards - 1 : -1]], 1).reshape(-1)


def spread(x):
    """[B, S, ...] with its columns in the order in which the context axis holds them."""
    return _reorder(x, _spread)


def unspread(x):
    """The inverse of `spread`."""
    return _reorder(x, _unspread)


def _reorder(x, shard):
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else mesh.shape[RULES["seq"]]
    if n == 1:
        return x
    places(x.shape[1], n)  # raises where the row does not divide
    rows = P(*spec(("batch", "seq")), *(None,) * (x.ndim - 2))
    return shard_map(functools.partial(shard, n=n), (rows,), rows)(x)


# Of the 2n parts of a row, shard i holds 2i and 2i + 1 in the natural order, and i and 2n - 1 - i
# when spread: one of them is even, one odd, so two exchanges are all it takes.


def _exchanges(n):
    """For even parts and for odd ones: (shard when spread, shard in the natural order) of each."""
    where = [(p if p < n else 2 * n - 1 - p, p // 2) for p in range(2 * n)]
    return where[::2], where[1::2]


def _unspread(x, n):
    first, second = jnp.split(x, 2, axis=1)
    swap = jax.lax.axis_index(RULES["seq"]) % 2 == 1
    parts = jnp.where(swap, second, first), jnp.where(swap, first, second)
    return jnp.concatenate(
        [jax.lax.ppermute(x, RULES["seq"], w) for x, w in zip(parts, _exchanges(n), strict=True)], 1
    )


def _spread(x, n):
    back = [[(b, a) for a, b in w] for w in _exchanges(n)]
    parts = zip(jnp.split(x, 2, axis=1), back, strict=True)
    even, odd = (jax.lax.ppermute(x, RULES["seq"], w) for x, w in parts)
    swap = jax.lax.axis_index(RULES["seq"]) % 2 == 1
    return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], 1)


# ---- batches -------------------------------------------------------------------------------


def check_batch(mesh, batch_size: int, micro_batches: int, length: int):
    """Raise MeshError unless the batch splits over micro-batches, mesh and processes."""
    shards = axis_size(mesh, RULES["batch"])
    if micro_batches < 1 or batch_size % micro_batches:
        raise MeshError(
            f"train.batch_size={batch_size} does not divide into {micro_batches} micro-batches"
        )
    if (batch_size // micro_batches) % shards:
        raise MeshError(
            f"a micro-batch of {batch_size // micro_batches} rows (train.batch_size={batch_size},"
            f" micro_batches={micro_batches}) does not divide over the {shards} batch shards of"
            f" the mesh (data x fsdp x expert)"
        )
    context = mesh.shape["context"]
    if context > 1 and length % (2 * context):
        raise MeshError(
            f"data.max_length={length} does not divide into twice mesh.context={context} parts;"
            " each of data.buckets has to, too"
        )


def abstract_batch(mesh, spec) -> dict:
    """A batch as ShapeDtypeStructs laid out on the mesh. spec: {name: Field}, see data.pack."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, *axes))
        for name, (shape, dtype, axes) in spec.items()
    }


def local_rows(mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process must read, ascending.

    Not always a range: on a TPU slice the mesh may alternate between hosts.
    """
    sharding = named(mesh, "batch", None)
    parts = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    return sorted({row for part in parts for row in range(*part[0].indices(batch_size))})


def row_parts(mesh, batch_size: int) -> list[list[int]]:
    """The rows of a global batch in parts; each process reads one, several may read the same."""
    rows = {}
    layout = named(mesh, "batch", None).devices_indices_map((batch_size, 1))
    for device, part in layout.items():
        own = rows.setdefault(device.process_index, set())
        own.update(range(*part[0].indices(batch_size)))
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    if sum(map(len, parts)) != batch_size:
        raise MeshError("data.streaming: processes share some rows of a batch; choose another mesh")
    return [list(part) for part in parts]


def put_batch(mesh, batch, batch_size: int, axes=None):
    """numpy rows of this process -> global arrays [batch_size, ...] laid out on the mesh.

    axes: {name: logical axes}; the default is that of a batch of tokens, ("batch", "seq").
    """

    def put(name, x):
        own = axes[name] if axes else ("batch", "seq")[: x.ndim] + (None,) * (x.ndim - 2)
        return jax.make_array_from_process_local_data(
            named(mesh, *own), x, (batch_size, *x.shape[1:])
        )

    return {k: put(k, np.asarray(v)) for k, v in batch.items()}
