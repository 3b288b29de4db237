"""The search: which micro-batches, remat and mesh a step could have on a target."""

import dataclasses
import math
import time
from collections.abc import Iterator

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from sftjax import parallel, tasks
from sftjax.plan import compile as compile_lib
from sftjax.plan import estimate as estimate_lib
from sftjax.plan import text
from sftjax.plan.hardware import Target
from sftjax.training import build

COMPILED = 3  # of the candidates, the best so many by the estimate are compiled


def search(
    config: ConfigDict, target: Target, trained: float = 0.5, document: int = 0, compiled: int | None = None
) -> list[compile_lib.Plan]:
    """Plans of micro-batches x remat x mesh, best first: those compiled, then those estimated from a trace a remat."""
    found = []
    on_cpu = compile_lib.platform(target) == "cpu"  # whose memory is the host's
    for remat in (r for r in REMAT if r != "offload" or not on_cpu):
        began, traced, shapes = time.monotonic(), None, dataclasses.replace(target, devices=())
        for one, mesh in candidates(config, target, remat):
            if traced is None:
                program = compile_lib.build(one, shapes, trained, document)
                with compile_lib.use(program.mesh):
                    traced = estimate_lib.trace(program)
            at = dataclasses.replace(program, config=one, mesh=mesh, target=target)
            p = compile_lib.account(at, "estimated from shapes", began, *estimate_lib.estimate(traced, at))
            found.append((p, one))
    found.sort(key=lambda x: _rank(x[0]))
    n = (COMPILED if compiled is None else compiled) if target.devices else 0
    done = [compile_lib.plan(one, target, trained, document) if p.fits else p for p, one in found[:n]]
    return sorted(done, key=_rank) + [p for p, _ in found[n:]]


def _rank(p):
    """What fits comes first, then what is fast to a percent, then what needs less."""
    fast = p.time["step"] if p.time else p.hardware_flops
    return not p.fits, round(math.log(fast), 2), p.total


# "offload" needs less of the device than "full" and as much time, where copies to the host keep up.
REMAT = ("none", "dots", "attention", "full", "offload")


def candidates(config: ConfigDict, target: Target, remat: str) -> Iterator[tuple[ConfigDict, AbstractMesh]]:
    """(config, mesh without devices) of what a search tries: where all sizes divide."""
    model, _ = build.make_model(config, tasks.make(config, None), compile_lib.platform(target))
    rows, width = config.train.batch_size, config.data.max_length
    for sizes in _meshes(target):
        mesh = compile_lib.abstract_mesh(sizes, target)
        for micro in (2**i for i in range(11)):
            try:
                parallel.check_batch(mesh, rows, micro, width)
                parallel.param_shardings(mesh, model.abstract)
            except parallel.MeshError:
                continue
            one = config.copy_and_resolve_references()
            one.mesh.update(sizes)
            one.train.micro_batches, one.model.remat = micro, remat
            yield one, mesh


def _meshes(target):
    """All or a part of a slice as fsdp, the rest as data; with tensor 2 to 8, or context 2 or 4."""
    for inner in ({}, {"tensor": 2}, {"tensor": 4}, {"tensor": 8}, {"context": 2}, {"context": 4}):
        left, odd = divmod(target.per_slice, inner.get("tensor", 1) * inner.get("context", 1))
        if odd or not left:
            continue
        for data in sorted({1, 2, 4, left}):
            if left % data == 0:
                yield dict(data=data * target.slices, fsdp=left // data, context=1, tensor=1, expert=1) | inner


def suggestions(config: ConfigDict, target: Target, trained: float = 0.5, document: int = 0) -> str:
    """What may fit, from shapes alone, as a table and config lines."""
    return text.table(search(config, target, trained, document, compiled=0)[:5])
