"""The first operation that makes a NaN in a step that was skipped, as JAX's checkify finds it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import checkify

from sftjax.errors import DivergenceError
from sftjax.params import combine
from sftjax.step import TrainState, call, train_step
from sftjax.training.health import not_finite

# An inf alone is no mistake, as masks are made of it: without a NaN, a division by 0 is looked for.
CHECKS = {"makes a NaN": checkify.nan_checks, "divides by 0": checkify.div_checks}
NOTHING = "no operation makes a NaN or divides by 0: a number overflows, or compilation differs"
LIBRARIES = re.compile("/(jax|jaxlib|optax|flax)/")  # their lines are not shown


def check(step: int, metrics: Mapping, state: TrainState, batch: Any, loss_fn: Callable, tx: Any) -> None:
    """Raises: DivergenceError with the operation that broke a step that was skipped, and its line.

    state: after that step, which is as before it. The others are those of train_step.
    """
    if not float(metrics["skipped"]):
        return
    before = dataclasses.replace(state, step=state.step - 1)
    loss, norm, names = float(metrics["loss"]), float(metrics["grad_norm"]), not_finite(before)
    text = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; "
    text += f"not finite before it: {', '.join(names[:3])}; " if names else ""
    fn = functools.partial(_gradient, loss_fn)
    if math.isfinite(loss + norm):  # it is the update, or the model's state
        fn = functools.partial(train_step, loss_fn=loss_fn, tx=tx)
    for what, errors in CHECKS.items():
        # Checkify does not know shard_map. Without a mesh, JAX divides the work as the arrays are.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            try:
                error = jax.jit(checkify.checkify(fn, errors=errors))(before, batch)[0]
            except Exception as e:  # such as a TPU kernel that JAX can't divide
                raise DivergenceError(f"{text}its operations can't be checked: {e}") from e
        if found := error.get_exception():
            frames = [f for f in found.traceback_info.frames if not LIBRARIES.search(f.file_name)]
            where = "\n  called at ".join(f"{f.file_name}:{f.line_num} ({f.function_name})" for f in frames[:6])
            raise DivergenceError(f"{text}{getattr(found, 'prim', 'div')} {what} at {where}")
    raise DivergenceError(text + NOTHING)


def _gradient(loss_fn, state, batch):
    def loss(params):
        whole, rng = combine(params, state.frozen), jax.random.fold_in(state.rng, state.step)
        return call(loss_fn, whole, batch, rng, state.model_state).sum.astype("float32")

    return jax.value_and_grad(loss)(state.params)
