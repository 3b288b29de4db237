"""The first operation of a step whose result is not finite, found by running its jaxpr."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from sftjax.errors import DivergenceError
from sftjax.step import Loss, TrainState, train_step

# Calls of a jaxpr that has their own inputs and outputs, under any name of the supported versions.
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
OWN = ("jaxpr", "call_jaxpr", "fun_jaxpr")
Operations = Generator[tuple[Any, list, list], None, list]  # (equation, its inputs, its outputs)
TESTS = {"nan": jnp.isnan, "inf": jnp.isinf}


def first_operations(fn: Callable[..., Any], *args: Any) -> dict[str, str]:
    """{"inf": the first operation of fn(*args) that makes one, in words; "nan": the same}.

    An inf counts where no input has one: what is masked with -inf is no mistake. Loops and branches
    are gone through; a shard_map or a kernel is one operation. They come in their order.
    """
    closed = jax.make_jaxpr(fn)(*args)
    found = dict[str, str]()
    for eqn, inputs, outputs in _run(closed, jax.tree.leaves(args)):
        what = _made(inputs, outputs)
        if what and what not in found:
            found[what] = _text(eqn, what, inputs, outputs)
        if what == "nan":
            break
    return found


def check(
    step: int,
    metrics: Mapping[str, Any],
    state: TrainState,
    batch: Any,
    loss_fn: Callable[..., Loss],
    tx: optax.GradientTransformation,
) -> None:
    """Raises: DivergenceError with what `first_operations` finds in a step that was skipped.

    state: after that step, which is as before it. The others are those of train_step.
    """
    if not float(metrics["skipped"]):
        return
    before = dataclasses.replace(state, step=state.step - 1)
    run = functools.partial(train_step, loss_fn=loss_fn, tx=tx)
    lines = first_operations(run, before, batch).values()
    if lines:
        title = f"step {step}: the first operations whose results are not finite"
    else:
        title = f"step {step} is not finite as it is compiled, and finite by single operations"
    raise DivergenceError("\n".join([title, *lines]))


def _run(closed, args) -> Operations:
    """Yields every operation of a jaxpr, and returns the results."""
    jaxpr, consts = (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, [])
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        inner = next((eqn.params[k] for k in OWN if k in eqn.params), None)
        if eqn.primitive.name in CALLS and inner is not None:
            results = yield from _run(inner, inputs)
        elif eqn.primitive.name == "scan":
            results = yield from _scan(eqn, inputs)
        elif eqn.primitive.name == "cond":
            branches = eqn.params["branches"]
            at = int(np.clip(int(inputs[0]), 0, len(branches) - 1))
            results = yield from _run(branches[at], inputs[1:])
        else:
            results = _bind(eqn, inputs)
            yield eqn, inputs, results
        values |= zip(eqn.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _bind(eqn, inputs) -> list:
    params = eqn.primitive.get_bind_params(eqn.params)

    def bind(*inputs: Any) -> list:
        made = eqn.primitive.bind(*inputs, **params)
        return list(made) if eqn.primitive.multiple_results else [made]

    # Outside of jit a shard_map takes no axes that are left to the partitioner.
    return (jax.jit(bind) if eqn.primitive.name == "shard_map" else bind)(*inputs)


def _scan(eqn, inputs) -> Operations:
    p, stacked = eqn.params, list[list]()
    # By their shapes: the parameters that count them have names that changed with JAX 0.12.
    rest = _alike(p["jaxpr"].jaxpr.invars, eqn.invars)  # before what is scanned over
    carried = _alike(p["jaxpr"].jaxpr.outvars, eqn.outvars)
    consts, carry, xs = inputs[: rest - carried], inputs[rest - carried : rest], inputs[rest:]
    order = range(p["length"])
    for i in reversed(order) if p["reverse"] else order:
        out = yield from _run(p["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry = out[:carried]
        stacked.append(out[carried:])
    stacked = stacked[::-1] if p["reverse"] else stacked
    return [*carry, *(jnp.stack(ys) for ys in zip(*stacked, strict=True))]


def _alike(inner, outer) -> int:
    """How many variables of a loop have the shape that they have in its body."""
    return sum(a.aval.shape == b.aval.shape for a, b in zip(inner, outer, strict=True))


def _floats(values):
    return [x for x in values if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def _made(inputs, outputs) -> str:
    """What of "nan" and "inf" the outputs have and the inputs have not; "" for neither."""
    for what, test in TESTS.items():
        if any(test(x).any() for x in _floats(outputs)):
            return "" if any(test(x).any() for x in _floats(inputs)) else what
    return ""


def _text(eqn, what, inputs, outputs) -> str:
    test = TESTS[what]
    bad = next(x for x in _floats(outputs) if test(x).any())
    shape = ",".join(map(str, bad.shape))
    counted = f"{int(test(bad).sum())} of {bad.size} numbers of {bad.dtype}[{shape}] are {what}"
    ranges = [
        f"{float(jnp.min(x)):.4g} to {float(jnp.max(x)):.4g}" for x in _floats(inputs) if x.size
    ]
    scope = f" in {eqn.source_info.name_stack}" if str(eqn.source_info.name_stack) else ""
    given = f"; its inputs are {', '.join(ranges)}" if ranges else ""
    return f"  {eqn.primitive.name} at {_line(eqn)}{scope}: {counted}{given}"


def _line(eqn) -> str:
    """The file and line that wrote an operation: the innermost one that is not JAX's own."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else []
    for frame in frames:
        if not any(part in frame.file_name for part in ("/jax/", "/jaxlib/", "/optax/", "/flax/")):
            return f"{frame.file_name}:{frame.line_num}"
    return "an unknown line"
