"""Batches on the mesh: how they divide, their layout, and which rows a process reads."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sftjax.errors import MeshError
from sftjax.parallel.mesh import RULES, AnyMesh, axis_size, named


def check_batch(mesh: AnyMesh, batch_size: int, micro_batches: int, length: int) -> None:
    """Raise MeshError unless the batch splits over micro-batches, mesh and processes."""
    shards = axis_size(mesh, RULES["batch"])
    if micro_batches < 1 or batch_size % micro_batches:
        raise MeshError(f"train.batch_size={batch_size} does not divide into {micro_batches} micro-batches")
    if (batch_size // micro_batches) % shards:
        raise MeshError(
            f"a micro-batch of {batch_size // micro_batches} rows (train.batch_size={batch_size}, micro_batches="
            f"{micro_batches}) does not divide over the {shards} batch shards of the mesh (data x fsdp x expert)"
        )
    context = mesh.shape["context"]
    if context > 1 and length % (2 * context):
        raise MeshError(
            f"data.max_length={length} does not divide into twice mesh.context={context} parts;"
            " each of data.buckets has to, too"
        )


def abstract_batch(mesh: AnyMesh, spec: Mapping[str, tuple]) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as ShapeDtypeStructs laid out on the mesh. spec: {name: Field}, see data.pack."""
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, *axes))
        for name, (shape, dtype, axes) in spec.items()
    }


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process must read, ascending; not always a range."""
    return _rows(mesh, batch_size).get(jax.process_index(), [])


def row_parts(mesh: Mesh, batch_size: int) -> list[list[int]]:
    """The rows of a global batch in parts; each process reads one, several may read the same."""
    parts = sorted({tuple(own) for own in _rows(mesh, batch_size).values()})
    if sum(map(len, parts)) != batch_size:
        raise MeshError("data.streaming: processes share some rows of a batch; choose another mesh")
    return [list(part) for part in parts]


def _rows(mesh, batch_size) -> dict[int, list[int]]:
    """The rows of a global batch that each process's devices hold, ascending."""
    rows: dict[int, set[int]] = {}
    layout: Mapping[Any, Any] = named(mesh, "batch", None).devices_indices_map((batch_size, 1))
    for device, part in layout.items():
        own = rows.setdefault(device.process_index, set())
        own.update(range(*part[0].indices(batch_size)))
    return {process: sorted(own) for process, own in rows.items()}


def put_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int, axes: Mapping | None = None
) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] of this process's rows. axes: {name: logical axes}; None: ("batch", "seq")."""

    def put(name, x):
        own = axes[name] if axes else ("batch", "seq")[: x.ndim] + (None,) * (x.ndim - 2)
        return jax.make_array_from_process_local_data(named(mesh, *own), x, (batch_size, *x.shape[1:]))

    return {k: put(k, np.asarray(v)) for k, v in batch.items()}
