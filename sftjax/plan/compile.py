"""What a config needs and how fast it may be, on hardware that you don't have: docs/plan.md."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from sftjax import hf, optim, parallel, tasks
from sftjax.files import read_object
from sftjax.models import flops as flops_lib
from sftjax.models.base import Model
from sftjax.plan import estimate as estimate_lib
from sftjax.plan import hlo
from sftjax.plan.hardware import Target
from sftjax.plan.hlo_text import first
from sftjax.step import TrainState
from sftjax.training import build as build_lib
from sftjax.training.metrics import peak_bytes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """A step's work, as assumed of data that is not read: rows full of documents of one length."""

    rows: int
    width: int
    trained: float  # share of the tokens
    document: int  # tokens
    targets: int = 0  # tokens of a row of targets, beside one of sources

    @property
    def tokens(self) -> int:
        """Those of a step, over all devices."""
        return self.rows * (self.width + self.targets)

    def pairs(self, window: int) -> float:
        """(query, key) pairs of a row."""
        n = self.document
        out = max(n - window, 0) if window else 0
        return self.width / n * (n * (n + 1) / 2 - out * (out + 1) / 2)


@dataclasses.dataclass
class Program:
    """A config's training step over a mesh, in shapes."""

    config: ConfigDict
    target: Target
    model: Model
    trainable: dict
    mesh: Mesh | AbstractMesh
    state: TrainState
    batch: dict
    step: jax.stages.Wrapped  # jitted
    work: Work

    def _flops(self, pairs) -> float:
        of, w = self.model.train_flops(self.trainable), self.work
        n = w.width + w.targets
        return w.rows * of(n, n * w.trained, pairs)

    @property
    def model_flops(self) -> float:
        """Of a step, over all devices; see Model.train_flops."""
        return self._flops(self.work.pairs)

    @property
    def attention_flops(self) -> float:
        """Of one device, by shapes; attention forms its scores once more going backward."""
        return (self.model_flops - self._flops(lambda window: 0)) * 7 / 6 / self.mesh.size

    def kernel_flops(self, cost: hlo.Cost) -> float:
        """FLOPs of one device's kernels: as declared, or else those of attention."""
        return cost.kernel_flops or (self.attention_flops if cost.kernels else 0.0)

    @property
    def head_flops(self) -> float:
        """Of them, those of the vocabulary projection, with the rows that pad it."""
        c, tokens = self.model.config, self.work.tokens * self.work.trained
        if c.head == "image":
            return 0.0
        return flops_lib.head_flops(c, self.trainable, self.model.abstract, c.rows) * tokens


def build(config: ConfigDict, target: Target, trained: float = 0.5, document: int = 0) -> Program:
    """The Program of a config; raises what train would raise of it, before any compile."""
    config = _with_stored_dtype(config)
    task = tasks.make(config, None)
    sizes = {axis: config.mesh[axis] for axis in parallel.AXES}
    here = target.devices
    mesh = parallel.make_mesh(sizes, here) if here else abstract_mesh(sizes, target)
    rows, width, micro = config.train.batch_size, config.data.max_length, config.train.micro_batches
    parallel.check_batch(mesh, rows, micro, width)
    model, trainable = build_lib.make_model(config, task, platform=platform(target))
    parallel.param_shardings(mesh, model.abstract)  # raises where a size does not divide
    tx = optim.make(config.optim, build_lib.make_schedule(config.optim, 1000), model.abstract, trainable)
    with use(mesh):
        state = build_lib.abstract_state(config.model, model, trainable, tx, mesh)
        loss_fn = task.loss_fn(model, config.loss.to_dict())
        step = build_lib.make_step(loss_fn, tx, state, micro, here[0] if here else None)
    if task.layout.fixed:
        width, trained, document = 1, 1.0, 1
    spec = task.layout.spec(rows, width)
    batch = parallel.abstract_batch(mesh, spec)
    targets = spec["targets"].shape[1] if "target_segments" in spec else 0
    trained = targets / (width + targets) if targets else trained  # of pairs, all of the target
    work = Work(rows, width, trained, document or width, targets)
    return Program(config, target, model, trainable, mesh, state, batch, step, work)


def abstract_mesh(sizes: Mapping[str, int], target: Target) -> AbstractMesh:
    """A mesh without devices."""
    shape = tuple(parallel.mesh_shape(sizes, target.n))
    return AbstractMesh(shape, parallel.AXES, axis_types=(AxisType.Auto,) * len(parallel.AXES))


def platform(target: Target) -> str:
    """JAX's name of what the target is, such as tpu; without devices it is a gpu."""
    return target.devices[0].platform if target.devices else "gpu"


def use(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    """A context in which `mesh`, with devices or without, is the mesh."""
    return jax.sharding.use_abstract_mesh(mesh) if isinstance(mesh, AbstractMesh) else jax.set_mesh(mesh)


def _with_stored_dtype(config):
    """Frozen parameters keep their files' dtype, which config.json names."""
    config = config.copy_and_resolve_references()
    if not config.model.frozen_dtype:
        path = hf.resolve(config.model.path, weights=False)
        stored = read_object(path / "config.json" if path.is_dir() else path)
        name = stored.get("dtype") or stored.get("torch_dtype")
        config.model.frozen_dtype = name if isinstance(name, str) else ""
    return config


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
    limit: float
    largest: list  # [(bytes, what)], the largest first
    model_flops: float
    hardware_flops: float
    cost: hlo.Cost
    time: dict | None  # the projection; see `project`

    @property
    def fits(self) -> bool:
        """An estimate has to leave a tenth free."""
        share = 1.0 if self.basis == "compiled" else 0.9
        return self.total <= share * self.limit

    def as_json(self) -> dict:
        """All fields and whether it fits, as JSON holds them."""
        return vars(self) | {"cost": self.cost.summary(), "fits": self.fits}


def plan(config: ConfigDict, target: Target, trained: float = 0.5, document: int = 0) -> Plan:
    """Compile, or estimate where there is no compiler, and account for it."""
    program, began = build(config, target, trained, document), time.monotonic()
    if not target.devices:
        return estimated(program, "estimated from shapes", began)
    try:
        with use(program.mesh):
            compiled = program.step.lower(program.state, program.batch).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        # The estimate's parts, with the size and the largest buffers that the compiler named.
        out = estimated(program, "does not fit, says the compiler", began)
        total, largest = exhausted(str(e))
        out.total, out.largest = max(total, out.total, out.limit + 1), largest or out.largest
        return out
    text: Any = compiled.as_text()  # None only where a backend has no text
    cost = hlo.analyze(text, assume=assumed(text, program))
    return account(program, "compiled", began, cost, *compiled_memory(program, compiled))


def rounds(text: str, program: Program, attention: bool = False) -> int:
    """How often the loss's loop over chunks of trained tokens runs, or attention's over blocks.

    So often that their FLOPs make up those of the vocabulary projection, or of attention.
    """
    twice = hlo.analyze(text, lambda name: 1 + (("attention" in name) == attention))
    each = twice.flops - hlo.analyze(text).flops
    if not each:
        return 1
    whole = program.attention_flops if attention else program.head_flops / program.mesh.size
    return max(1, round(whole / each) if attention else -(-int(whole) // int(each)))


def assumed(text: str, program: Program) -> Callable[[str], int]:
    """The rounds of a loop that data ends, by its name."""
    of = {attention: rounds(text, program, attention) for attention in (False, True)}
    return lambda name: of["attention" in name]


def estimated(program: Program, basis: str, began: float) -> Plan:
    """The Plan from shapes alone. began: by time.monotonic, when the work on it began."""
    with use(program.mesh):
        traced = estimate_lib.trace(program)
    return account(program, basis, began, *estimate_lib.estimate(traced, program))


def account(program: Program, basis: str, began: float, cost: hlo.Cost, memory: dict, total: float) -> Plan:
    """The Plan of a step's cost and its memory by part and in all, of one device, with its projection."""
    target, chip, work = program.target, program.target.chip, program.work
    flops = (cost.flops + program.kernel_flops(cost)) * target.n
    return Plan(
        target=f"{target.name}: {target.text()}",
        mesh=dict(program.mesh.shape),
        micro_batches=program.config.train.micro_batches,
        remat=program.config.model.remat,
        basis=basis,
        seconds=time.monotonic() - began,
        work=f"{work.rows} rows of {work.width}, full, of documents of {work.document} tokens;"
        f" {work.trained:.0%} of the tokens trained"
        if work.width > 1
        else f"{work.rows} examples of one shape",
        memory=memory,
        total=total,
        limit=chip.hbm * GIB if chip else build_lib.memory_limit(target.devices),
        largest=sorted(((size, f"the {name}") for name, size in memory.items() if name != "other"), reverse=True),
        model_flops=program.model_flops,
        hardware_flops=flops,
        cost=cost,
        time=project(program, cost, flops),
    )


def held(program: Program) -> dict:
    """Bytes a device holds between the steps, exactly: its shards of state and batch."""
    parts = {"parameters": program.state.params, "frozen": program.state.frozen}
    parts |= {"optimizer": program.state.opt_state, "batch": program.batch}
    return {name: build_lib.shard_bytes(tree) for name, tree in parts.items()}


def compiled_memory(program: Program, compiled: jax.stages.Compiled) -> tuple[dict[str, float], float]:
    """({part: bytes}, bytes in all) of the memory of one device, of a compiled step."""
    parts, total = held(program), peak_bytes(compiled)
    m: Any = compiled.memory_analysis()  # CompiledMemoryStats: CPUs, GPUs and TPUs have it
    parts["temporaries"] = m.temp_size_in_bytes
    # The step's number, the random key, the metrics, and what fills up the tiles of all arrays.
    parts["other"] = max(0, total - sum(parts.values()))
    return parts, total


def exhausted(message: str) -> tuple[float, list]:
    """(bytes needed, [(bytes, what)] the largest) from XLA's message of exhausted memory."""
    unit = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    size = r"([\d.]+)([BKMGT])"
    used = re.search(rf"(?:Used |required for \w+ \w+ \(){size}", message)
    total = float(used[1]) * unit[used[2]] if used else 0.0
    total = float(first(r"allocating (\d+) bytes", message) or total)
    found = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        number, scale = re.findall(rf"\A{size}", part)[0]
        what = " ".join(filter(None, (first(r"Shape: (\S+\])", part), first(r'op_name="([^"]*)"', part))))
        found.append((float(number) * unit[scale], what or part.split("\n")[0]))
    return total, found


MATMUL_SHARE = 0.6  # of peak, that a step's matmuls reach where the compiler counts no cycles


def project(program: Program, cost: hlo.Cost, flops: float) -> dict | None:
    """A projection of one step's seconds; None for a chip of which no figures are known.

    Work: the compiler's cycles over the clock, and the kernels' FLOPs at MATMUL_SHARE of peak; without cycles all of
    `flops`, those of all devices. Collectives: what a device sends, over what its links carry, those across slices over
    the network; asynchronous ones hide behind work.
    """
    target, chip = program.target, program.target.chip
    if chip is None:
        return None
    rate = chip.flops * MATMUL_SHARE
    if cost.total_cycles and chip.clock:
        work = cost.total_cycles / (chip.clock * 1e9) + program.kernel_flops(cost) / rate
    else:
        work = flops / target.n / rate
    links, share = seconds_of_collectives(cost, target), cost.async_share
    hidden = min(work, links * share)
    step = work + links - hidden
    tokens = program.work.tokens
    return {
        "work": work,
        "collectives": links,
        "hidden": hidden,
        "step": step,
        "mfu": program.model_flops / (step * target.n * chip.flops),
        "tokens_per_s": tokens / step,
        "trained_tokens_per_s": tokens * program.work.trained / step,
    }


def seconds_of_collectives(cost: hlo.Cost, target: Target) -> float:
    """A group larger than a slice, or one that pairs slices, crosses the network."""
    chip: Any = target.chip  # known: `project` asks for no other
    seconds = 0.0
    for (_, group), c in cost.collectives.items():
        far = target.slices > 1 and (group > target.per_slice or group == target.slices)
        seconds += c.wire / (1e9 * (chip.dcn if far else chip.link))
    return seconds
