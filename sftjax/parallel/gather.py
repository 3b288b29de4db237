"""How an array that is stored in parts becomes whole for one use, and its gradient parts again.

Left to itself, the partitioner sums gradients whole, or multiplies by small slices. So the gather of a layer's weights
over fsdp is said here, and the scatter of their gradients with it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sftjax.parallel.mesh import RULES, constrain, manual_axes, shard_map, spec, two_factors

GATHERED = ("embed",)  # dimensions that a layer needs whole, and that are stored in parts


def in_use(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The logical axes of an array after its gather: None where it has become whole."""
    return tuple(None if a in GATHERED else a for a in axes)


def for_use(w: jax.Array, axes: tuple[str | None, ...], dtype: DTypeLike) -> jax.Array:
    """The array w in `dtype`, gathered over fsdp for this use only, or as it is: see GATHERED.

    Its gradient is scattered as it is summed. Integers keep their dtype, and travel as such.
    """
    if not any(a in GATHERED for a in axes):
        return w
    if jnp.issubdtype(w.dtype, jnp.floating):
        w = w.astype(dtype)
    return _gather(w, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(w, axes):
    return _gather_fwd(w, axes)[0]


def _gather_fwd(w, axes):
    if RULES["embed"] not in manual_axes():
        return constrain(w, *in_use(axes)), None
    # Under a shard_map over the axes that are left too, or XLA would gather over these as well.
    dim, left = axes.index("embed"), spec(axes)
    return shard_map(lambda w: jax.lax.all_gather(w, RULES["embed"], axis=dim, tiled=True), (left,), left)(w), None


def _gather_bwd(axes, _, g):
    """The sum over fsdp, scattered in two steps, or XLA:TPU would sum everything everywhere."""
    if RULES["embed"] not in manual_axes():
        return (constrain(g, *axes),)
    dim, left = axes.index("embed"), spec(axes)

    def scatter(g):
        n = jax.lax.axis_size(RULES["embed"])
        grid = np.arange(n).reshape(two_factors(n))
        for groups in (grid.T, grid):
            if groups.shape[1] > 1:
                how = dict(scatter_dimension=dim, tiled=True, axis_index_groups=groups.tolist())
                g = jax.lax.psum_scatter(g, RULES["embed"], **how)
        return g

    return (shard_map(scatter, (left,), left)(g),)


_gather.defvjp(_gather_fwd, _gather_bwd)
