"""What a training step may need, from the shapes of its traced program: no compiler is asked.

Exact: the state, and the FLOPs of every matmul, recomputed ones too. Estimated: what the layers keep for the backward
pass (the arrays that one scan leaves to another), the widest moment of a layer and of the loss (the results of its
matmuls at once), and collectives, from the layout.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
from jax.extend import core

from sftjax import parallel
from sftjax import params as params_lib
from sftjax.plan import hlo

if TYPE_CHECKING:
    from sftjax.plan.compile import Program


@dataclasses.dataclass(frozen=True)
class Traced:
    """What a traced step says, of the whole batch on all devices. It holds for any mesh."""

    flops: float
    kept: float  # bytes that scans leave to scans
    layer: float  # of the matmuls of one round of a scan
    logits: float  # of one round of the loss
    moments: float  # of the optimizer's state, for each byte of the trained parameters


def trace(program: "Program") -> Traced:
    """Trace the step; nothing is compiled. The program's mesh must be set."""
    traced = program.step.trace(program.state, program.batch).jaxpr.jaxpr
    once, each = _flops(traced)
    # The only loop that data ends is the loss's; see plan.rounds.
    rounds = max(1, -(-int(program.head_flops) // int(each))) if each else 1
    n = program.config.train.micro_batches
    kept, layer, logits = _activations(traced)
    moments = [x for x in jax.tree.leaves(program.state.opt_state) if x.ndim]
    share = params_lib.nbytes(moments) / params_lib.nbytes(program.state.params)
    return Traced(once + rounds * each, kept * n, layer * n, logits, share)


def estimate(traced: Traced, program: "Program") -> tuple[hlo.Cost, dict[str, float], float]:
    """(Cost, {part of the memory: bytes}, bytes in all) of one device, of a step that was traced for any mesh."""
    mesh, cost = program.mesh, hlo.Cost(flops=traced.flops / program.mesh.size)
    _collectives(program, cost)
    shards = parallel.axis_size(mesh, parallel.RULES["batch"]) * mesh.shape["context"]
    micro = shards * program.config.train.micro_batches
    trained, frozen = _parameters(program)
    parts = {"parameters": trained, "frozen": frozen, "optimizer": trained * traced.moments}
    parts["batch"] = params_lib.nbytes(program.batch) / shards
    layer, logits = traced.layer / micro, traced.logits / shards
    parts |= {"gradients": trained, "activations": traced.kept / micro + layer, "logits": logits}
    # A layer is over when the loss runs, and the other way round.
    return cost, parts, sum(parts.values()) - min(layer, logits)


def _parameters(program) -> tuple[float, float]:
    """Bytes of one device's shards of the trained and of the frozen parameters."""
    sizes = {True: 0.0, False: 0.0}
    on, whole = params_lib.flatten(program.trainable), program.state.all_params
    kinds = {name: x.dtype for name, x in params_lib.flatten(whole).items()}
    for name, p in params_lib.flatten(program.model.abstract).items():
        shape = parallel.named(program.mesh, *p.axes).shard_shape(p.shape)
        sizes[on[name]] += math.prod(shape) * kinds[name].itemsize
    return sizes[True], sizes[False]


def _inner(eqn):
    """(jaxpr, how often it runs, how many devices run it) of each program inside an equation."""
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    if eqn.primitive.name == "shard_map":
        sizes = eqn.params["mesh"].shape  # of the axes that it splits, its shapes are a shard's
        times = math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if isinstance(one, core.Jaxpr):
                yield one, times


def _flops(jaxpr) -> tuple[float, float]:
    """(FLOPs of the matmuls, those of one round of the loops that data ends), of all devices."""
    once, each = 0.0, 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            once += _dot(eqn)
        if eqn.primitive.name == "pallas_call":
            declared = eqn.params.get("cost_estimate")
            once += declared.flops if declared else 0.0
            continue
        for inner, times in _inner(eqn):
            a, b = _flops(inner)
            if eqn.primitive.name == "while":
                a, b = 0.0, a + b
            once, each = once + times * a, each + times * b
    return once, each


def _dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _bytes(var) -> float:
    """Of the device's memory."""
    if var.aval.memory_space == jax.memory.Space.Host:
        return 0.0
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def _activations(jaxpr) -> tuple[float, float, float]:
    """(what scans leave to scans, matmuls of one round of a scan, of the loss), in global bytes."""
    kept, layer, logits, left = 0.0, 0.0, 0.0, dict[Any, float]()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "shard_map"):
            for var in eqn.invars:
                kept += left.pop(var, 0.0) if not isinstance(var, core.Literal) else 0.0
            left |= {var: _bytes(var) for var in _stacked(eqn)}
        if eqn.primitive.name == "scan":
            layer = max([layer] + [_dots(inner) for inner, _ in _inner(eqn)])
        if eqn.primitive.name == "while":
            logits = max([logits] + [_dots(inner) for inner, _ in _inner(eqn)])
        for inner, times in _inner(eqn):
            deeper = _activations(inner)
            many = times if eqn.primitive.name == "shard_map" else 1
            kept = max(kept, many * deeper[0]) if deeper[0] else kept
            layer, logits = max(layer, many * deeper[1]), max(logits, many * deeper[2])
    return kept, layer, logits


def _stacked(eqn) -> list:
    """The results with a part from each round of a scan, also of one over shards."""
    if eqn.primitive.name == "scan":  # by their shapes: how many it carries has a name that changed
        each = zip(eqn.outvars, eqn.params["jaxpr"].out_avals, strict=True)
        return [var for var, one in each if var.aval.shape != one.shape]
    if eqn.primitive.name != "shard_map":
        return []
    inner = eqn.params["jaxpr"]
    found = {var for one in inner.eqns for var in _stacked(one)}
    own = zip(eqn.outvars, inner.outvars, strict=True)
    return [var for var, inside in own if not isinstance(inside, core.Literal) and inside in found]


def _dots(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _bytes(eqn.outvars[0])
        if eqn.primitive.name not in ("scan", "while"):
            total += sum(_dots(inner) for inner, _ in _inner(eqn))
    return total


def _collectives(program, cost):
    """What fsdp shards, per micro-batch; gradients, per step; tensor's sums and context's keys."""
    mesh, m, c = program.mesh, program.mesh.shape, program.model.config
    n, item = program.config.train.micro_batches, jax.numpy.dtype(c.dtype).itemsize
    size = params_lib.count(program.model.abstract) * item / (m["tensor"] * m["expert"])
    trained = 4 * params_lib.count(program.state.params) / mesh.size * m["data"]
    batch = parallel.axis_size(mesh, parallel.RULES["batch"]) * m["context"]
    tokens = item * program.work.tokens / batch
    kv = 2 * c.kv_heads * c.head_dim * m["context"] / m["tensor"]
    for kind, axis, count, payload in (
        ("all-gather", "fsdp", 2 * n, size),
        ("reduce-scatter", "fsdp", n, size),
        ("all-reduce", "data", 1, trained),
        ("all-reduce", "tensor", 4 * c.layers, tokens * c.width),
        ("all-gather", "context", 3 * c.layers, tokens * kv),
    ):
        group, record = m[axis], cost.collectives[kind, m[axis]]
        record.count += count
        record.bytes += count * payload
        sends = (group - 1) / group * (2 if kind == "all-reduce" else 1)
        record.wire += count * payload * sends
        record.async_bytes += count * payload * (axis in ("fsdp", "data"))
    for key in [k for k in cost.collectives if k[1] == 1]:
        del cost.collectives[key]
