"""The mesh of devices: its axes, what lies where, and what crosses it."""
# ruff: noqa: F401 (its names are offered here)

from sftjax.errors import MeshError
from sftjax.parallel.batches import abstract_batch, check_batch, local_rows, put_batch, row_parts
from sftjax.parallel.context_order import places, spread
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
)
