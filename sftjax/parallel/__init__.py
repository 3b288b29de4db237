"""The mesh of devices: its axes, what lies where, and what crosses it."""

from sftjax.errors import MeshError
from sftjax.parallel.batches import abstract_batch, check_batch, local_rows, put_batch, row_parts
from sftjax.parallel.context_order import places, spread, unspread
from sftjax.parallel.mesh import (
    AXES,
    RULES,
    axis_size,
    constrain,
    make_mesh,
    manual_axes,
    mesh_shape,
    mesh_text,
    named,
    param_shardings,
    part,
    shard_map,
    spec,
    two_factors,
)

__all__ = [
    "AXES",
    "RULES",
    "MeshError",
    "abstract_batch",
    "axis_size",
    "check_batch",
    "constrain",
    "local_rows",
    "make_mesh",
    "manual_axes",
    "mesh_shape",
    "mesh_text",
    "named",
    "param_shardings",
    "part",
    "places",
    "put_batch",
    "row_parts",
    "shard_map",
    "spec",
    "spread",
    "two_factors",
    "unspread",
]
