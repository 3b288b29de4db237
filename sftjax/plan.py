"""What a config needs and how fast it may be, on hardware that you don't have.

python -m sftjax.plan --config=configs/chat.py --target=v5e-16 [--search] [--json=plan.json]

The real training step is compiled ahead of time for the target's devices, without data or weights:
of the model only its config.json is read. For a GPU, where there is none, shapes give an estimate,
and the report says so.
"""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import jax

from sftjax import config as config_lib
from sftjax import estimate as estimate_lib
from sftjax import hlo, optim, plan_text, setup, sharding, targets, tasks
from sftjax import memory as memory_lib
from sftjax.errors import OutOfMemory, writing
from sftjax.models import flops as flops_lib

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """A step's work, as assumed of data that is not read: rows full of documents of one length."""

    rows: int
    width: int
    trained: float  # share of the tokens
    document: int  # tokens

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    def pairs(self, window) -> float:
        """(query, key) pairs of a row."""
        n = self.document
        out = max(n - window, 0) if window else 0
        return self.width / n * (n * (n + 1) / 2 - out * (out + 1) / 2)

    def text(self) -> str:
        return (
            f"{self.rows} rows of {self.width}, full, of documents of {self.document} tokens;"
            f" {self.trained:.0%} of the tokens trained"
        )


@dataclasses.dataclass
class Program:
    """A config's training step over a mesh, in shapes."""

    config: object
    model: object
    trainable: dict
    mesh: object
    state: object
    batch: dict
    step: object  # jitted
    work: Work

    @property
    def model_flops(self) -> float:
        """Of a step, over all devices; see Model.train_flops."""
        of, w = self.model.train_flops(self.trainable), self.work
        return w.rows * of(w.width, w.width * w.trained, w.pairs)

    def kernel_flops(self, cost) -> float:
        """Of one device's kernels: as declared, or else those of attention, with its scores formed
        once more going backward."""
        if not cost.kernels or cost.kernel_flops:
            return cost.kernel_flops
        of = self.model.train_flops(self.trainable)
        return self.work.rows * of(0, 0, self.work.pairs) * 7 / 6 / self.mesh.size

    @property
    def head_flops(self) -> float:
        """Of them, those of the vocabulary projection, with the rows that pad it."""
        c, tokens = self.model.config, self.work.tokens * self.work.trained
        return flops_lib.head_flops(c, self.trainable, self.model.abstract, c.rows) * tokens


def build(config, target, trained=0.5, document=0) -> Program:
    """The Program of a config; raises what train would raise of it, before any compile."""
    config = _with_stored_dtype(config)
    task = tasks.make(config, None)
    mesh, model, trainable = build_shapes(config, task, target)
    lr = setup.make_schedule(config.optim, 1000)
    tx = optim.make(config.optim, lr, model.abstract, trainable)
    with use(mesh):
        state = setup.abstract_state(config.model, model, trainable, tx, mesh)
        device = target.devices[0] if target.devices else None
        loss_fn = task.loss_fn(model, config.loss.to_dict())
        micro = config.train.micro_batches
        step = setup.make_step(loss_fn, tx, state, micro, device)
    rows, width = config.train.batch_size, config.data.max_length
    batch = sharding.abstract_batch(mesh, task.layout.spec(rows, width))
    work = Work(rows, width, trained, document or width)
    return Program(config, model, trainable, mesh, state, batch, step, work)


def build_shapes(config, task, target):
    """(mesh, model, trainable), where all their sizes divide."""
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    mesh = sharding.make_mesh(sizes, target.devices) if target.devices else _abstract(sizes, target)
    rows, width = config.train.batch_size, config.data.max_length
    sharding.check_batch(mesh, rows, config.train.micro_batches, width)
    model, trainable = setup.make_model(config, task, platform=platform(target))
    sharding.param_shardings(mesh, model.abstract)
    return mesh, model, trainable


def _abstract(sizes, target):
    """A mesh without devices."""
    shape = tuple(sharding.mesh_shape(sizes, target.n))
    auto = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    return jax.sharding.AbstractMesh(shape, sharding.AXES, axis_types=auto)


def platform(target) -> str:
    return target.devices[0].platform if target.devices else "gpu"


def use(mesh):
    """A context in which `mesh`, with devices or without, is the mesh."""
    abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    return jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh)


def _with_stored_dtype(config):
    """Frozen parameters keep their files' dtype, which config.json names."""
    config = config.copy_and_resolve_references()
    if not config.model.frozen_dtype:
        path = Path(setup.hf.resolve(config.model.path, weights=False))
        file = path / "config.json" if path.is_dir() else path
        stored = json.loads(file.read_text()) if file.exists() else {}
        name = stored.get("dtype") or stored.get("torch_dtype")
        config.model.frozen_dtype = name if isinstance(name, str) else ""
    return config


# ---- the plan ------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """Everything the report says. Bytes are those of one device, FLOPs those of all."""

    target: str
    mesh: dict
    micro_batches: int
    remat: str
    basis: str  # "compiled" | "estimated from shapes" | "does not fit, says the compiler"
    seconds: float  # that it took to find out
    work: str
    memory: dict  # part -> bytes
    total: float
    limit: float | None
    largest: list  # [(bytes, what)], the largest first
    model_flops: float
    hardware_flops: float
    cost: hlo.Cost
    time: dict | None  # the projection; see `project`

    @property
    def fits(self) -> bool:
        """An estimate has to leave a tenth free."""
        share = 1.0 if self.basis == "compiled" else 0.9
        return self.limit is None or self.total <= share * self.limit

    def as_json(self) -> dict:
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return out | {"cost": self.cost.summary(), "fits": self.fits}


def plan(config, target, trained=0.5, document=0) -> Plan:
    """Compile, or estimate where there is no compiler, and account for it."""
    program, began = build(config, target, trained, document), time.monotonic()
    if not target.devices:
        return estimated(program, target, "estimated from shapes", began)
    try:
        with use(program.mesh):
            compiled = program.step.lower(program.state, program.batch).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return _too_large(program, target, str(e), began)
    text = compiled.as_text()
    cost = hlo.analyze(text, assume=rounds(text, program))
    found = memory_lib.account(program, compiled, text)
    return _plan(program, target, "compiled", began, cost, found)


def rounds(text, program) -> int:
    """How often the loss's loop over chunks of trained tokens runs: the only loop that data ends.

    As often as the FLOPs of its rounds make up those of the vocabulary projection.
    """
    once, twice = (hlo.analyze(text, assume=n) for n in (1, 2))
    each = twice.flops - once.flops
    if not each:
        return 1
    return max(1, -(-int(program.head_flops / program.mesh.size) // int(each)))


def estimated(program, target, basis, began) -> Plan:
    with use(program.mesh):
        traced = estimate_lib.trace(program)
    cost, found = estimate_lib.estimate(traced, program.config, program.mesh)
    return _plan(program, target, basis, began, cost, found)


def _too_large(program, target, message, began) -> Plan:
    """The estimate's parts, with the size and the largest buffers that the compiler named."""
    out = estimated(program, target, "does not fit, says the compiler", began)
    total, largest = memory_lib.exhausted(message)
    out.total = max(total, out.total, (out.limit or 0) + 1)
    out.largest = largest or out.largest
    return out


def _plan(program, target, basis, began, cost, found) -> Plan:
    out = Plan(
        target=f"{target.name}: {target.text()}",
        mesh=dict(program.mesh.shape),
        micro_batches=program.config.train.micro_batches,
        remat=program.config.model.remat,
        basis=basis,
        seconds=time.monotonic() - began,
        work=program.work.text(),
        memory=found.parts,
        total=found.total,
        limit=memory_lib.limit(target),
        largest=found.largest,
        model_flops=program.model_flops,
        hardware_flops=(cost.flops + program.kernel_flops(cost)) * target.n,
        cost=cost,
        time=None,
    )
    out.time = project(out, program, target)
    return out


MATMUL_SHARE = 0.6  # of peak, that a step's matmuls reach where the compiler counts no cycles


def project(p: Plan, program, target) -> dict | None:
    """A projection of one step's seconds; None for a chip of which no figures are known.

    Work: the compiler's cycles over the clock, and the kernels' FLOPs at MATMUL_SHARE of peak;
    without cycles all FLOPs so. Collectives: what a device sends, over what its links carry, those
    across slices over the network; asynchronous ones hide behind work, the rest adds to it.
    """
    chip = target.chip
    if chip is None:
        return None
    rate = chip.flops * MATMUL_SHARE
    if p.cost.total_cycles and chip.clock:
        work = p.cost.total_cycles / (chip.clock * 1e9) + program.kernel_flops(p.cost) / rate
    else:
        work = p.hardware_flops / target.n / rate
    links, share = seconds_of_collectives(p.cost, target), p.cost.async_share
    hidden = min(work, links * share)
    step = work + links - hidden
    tokens = program.work.tokens
    return {
        "work": work,
        "collectives": links,
        "hidden": hidden,
        "step": step,
        "mfu": p.model_flops / (step * target.n * chip.flops),
        "tokens_per_s": tokens / step,
        "trained_tokens_per_s": tokens * program.work.trained / step,
    }


def seconds_of_collectives(cost, target) -> float:
    """A group larger than a slice, or one that pairs slices, crosses the network."""
    seconds = 0.0
    for (_, group), c in cost.collectives.items():
        far = target.slices > 1 and (group > target.per_slice or group == target.slices)
        seconds += c.wire / (1e9 * (target.chip.dcn if far else target.chip.link))
    return seconds


# ---- search --------------------------------------------------------------------------------

COMPILED = 3  # of the candidates, the best so many by the estimate are compiled


def search(config, target, trained=0.5, document=0, compiled=None) -> list:
    """Plans of micro-batches x remat x mesh, best first: those compiled, then the estimated rest.

    A policy of remat is traced once; from that, every candidate is estimated. Where the target has
    devices, the fastest that may fit are compiled.
    """
    found = []
    on_cpu = platform(target) == "cpu"  # whose memory is the host's
    for remat in (r for r in REMAT if r != "offload" or not on_cpu):
        began, traced = time.monotonic(), None
        for one, mesh in candidates(config, target, remat):
            if traced is None:
                program = build(one, dataclasses.replace(target, devices=()), trained, document)
                with use(program.mesh):
                    traced = estimate_lib.trace(program)
            cost, account = estimate_lib.estimate(traced, one, mesh)
            at = dataclasses.replace(program, config=one, mesh=mesh)
            basis = "estimated from shapes"
            found.append((_plan(at, target, basis, began, cost, account), one))
    found.sort(key=lambda x: _rank(x[0]))
    n = (COMPILED if compiled is None else compiled) if target.devices else 0
    done = [plan(one, target, trained, document) if p.fits else p for p, one in found[:n]]
    return sorted(done, key=_rank) + [p for p, _ in found[n:]]


def _rank(p):
    """What fits comes first, then what is fast to a percent, then what needs less."""
    fast = p.time["step"] if p.time else p.hardware_flops
    return not p.fits, round(math.log(fast), 2), p.total


# "offload" needs less of the device than "full" and as much time, where copies to the host keep up.
REMAT = ("none", "dots", "attention", "full", "offload")


def candidates(config, target, remat):
    """(config, mesh without devices) of what a search tries: where all sizes divide."""
    model, _ = setup.make_model(config, tasks.make(config, None), platform=platform(target))
    rows, width = config.train.batch_size, config.data.max_length
    for sizes in _meshes(target):
        mesh = _abstract(sizes, target)
        for micro in (2**i for i in range(11)):
            try:
                sharding.check_batch(mesh, rows, micro, width)
                sharding.param_shardings(mesh, model.abstract)
            except sharding.MeshError:
                continue
            one = config.copy_and_resolve_references()
            one.mesh.update(sizes)
            one.train.micro_batches, one.model.remat = micro, remat
            yield one, mesh


def _meshes(target):
    """fsdp over all or a part of a slice, data over the rest; with tensor 2 to 8 or context 2, 4"""
    for inner in ({}, {"tensor": 2}, {"tensor": 4}, {"tensor": 8}, {"context": 2}, {"context": 4}):
        left, odd = divmod(target.per_slice, inner.get("tensor", 1) * inner.get("context", 1))
        if odd or not left:
            continue
        for data in sorted({1, 2, 4, left}):
            if left % data == 0:
                one = dict(data=data * target.slices, fsdp=left // data, context=1, tensor=1)
                yield one | inner | {"expert": 1}


# ---- the command ---------------------------------------------------------------------------


@contextlib.contextmanager
def advice(config):
    """An out-of-memory error inside is raised again with what else may fit these devices."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        reason = str(e).split("\n")[0]
        raise OutOfMemory(f"{reason}\n{suggestions(config, targets.resolve('here'))}") from e


def suggestions(config, target, trained=0.5, document=0) -> str:
    """What may fit, from shapes alone, as a table and config lines."""
    found = search(config, target, trained, document, compiled=0)[:5]
    return plan_text.table(found)


def main(argv):
    flags = dict(target=None, search=False, json="", trained=0.5, document=0)
    config, flags = config_lib.parse(argv, **flags)
    if not 0 < flags.trained <= 1:
        raise config_lib.ConfigError(f"--trained={flags.trained}: expected a share, above 0 to 1")
    if flags.document < 0 or flags.document > config.data.max_length:
        raise config_lib.ConfigError(
            f"--document={flags.document}: expected a length up to data.max_length ="
            f" {config.data.max_length} tokens, or 0 for that"
        )
    target, work = targets.resolve(flags.target), (flags.trained, flags.document)
    found = [plan(config, target, *work)]
    print(plan_text.report(found[0]), flush=True)
    if flags.search:
        found = search(config, target, *work)
        print(plan_text.table(found[:12]))
    elif not found[0].fits:
        print(suggestions(config, target, *work))
    if flags.json:
        text = json.dumps([p.as_json() for p in found], indent=1)
        with writing("--json", flags.json):
            Path(flags.json).write_text(text + "\n")


if __name__ == "__main__":
    config_lib.run(main)
