"""Hardware to plan for: chips by name, slices by product or topology, devices to compile for."""

import dataclasses
import math
import os
import re

import jax

from sftjax.errors import TargetError
from sftjax.training.metrics import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one JAX device of a kind, as its vendor publishes them (hbm: as XLA reports it).

    link: what a device sends to its neighbours over all its links, one way. dcn: over the network between slices or
    hosts, its share of the host's.
    """

    kind: str  # device_kind
    hbm: float  # GiB that a program may use
    link: float  # GB/s
    dcn: float  # GB/s
    clock: float = 0.0  # GHz, of what counts the compiler's cycles; 0 = it counts none
    dims: int = 0  # of the topology; 0 = no TPU
    devices: int = 1  # JAX devices of a chip
    named_by: int = 1  # what a product's number counts of each chip: 1, or its 2 cores
    config: str = "default"  # libtpu's name of how a chip's cores are used

    @property
    def flops(self) -> float:
        """Peak dense bf16 FLOP/s."""
        return peak_flops(self.kind) or 0.0  # never 0: it knows every kind of CHIPS

    @property
    def products(self) -> dict[int, str]:
        """{the number in a product's name: its topology}."""
        return {self.named_by * math.prod(_sizes(shape)): shape for shape in SHAPES[self.dims]}


def _sizes(topology: str) -> list[int]:
    return [int(n) for n in topology.split("x")]


CHIPS = {
    "v4": Chip("TPU v4", 30.75, 300, 3.1, 1.05, dims=3, named_by=2, config="megacore"),
    "v5e": Chip("TPU v5 lite", 15.75, 200, 3.1, 1.5, dims=2),
    "v5p": Chip("TPU v5", 95.74, 600, 6.25, 1.75, dims=3, named_by=2, config="megacore"),
    "v6e": Chip("TPU v6 lite", 31.25, 448, 12.5, 1.75, dims=2),
    "tpu7x": Chip("TPU7x", 94.75, 300, 6.25, 2.2, dims=3, devices=2, named_by=2),
    "gpu-a100": Chip("NVIDIA A100", 79.0, 300, 25),
    "gpu-h100": Chip("NVIDIA H100", 79.0, 450, 50),
    "gpu-h200": Chip("NVIDIA H200", 140.0, 450, 50),
    "gpu-b200": Chip("NVIDIA B200", 178.0, 900, 50),
}
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}

# Of a number of dimensions: the topologies of the products, the smallest first.
SHAPES = {
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split(),
    3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16".split(),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is planned for: a number of devices of one kind, on one slice or several."""

    name: str
    chip: Chip | None  # None: a device whose figures are not known
    n: int  # JAX devices
    topology: str = ""  # "4x4"; "" for no TPU
    slices: int = 1
    devices: tuple = ()  # () = an estimate only

    @property
    def per_slice(self) -> int:
        """JAX devices of one slice."""
        return self.n // self.slices

    def text(self) -> str:
        """The devices in words, for a report."""
        if not self.chip or not self.topology:
            return f"{self.n} x {self.chip.kind if self.chip else self.devices[0].device_kind}"
        one = f"{self.chip.kind}, {self.topology}: {self.per_slice // self.chip.devices} chips"
        many = f"{self.slices} slices, each {one}" if self.slices > 1 else one
        return f"{self.n} devices; {many}"


def known() -> str:
    """What a target may be, for an error message."""
    tpus = []
    for name, chip in CHIPS.items():
        if chip.dims:
            numbers, shape = list(chip.products), SHAPES[chip.dims][2]
            tpus.append(f"{name}-{numbers[0]} ... {name}-{numbers[-1]} or {name}:{shape}")
    gpus = ", ".join(f"{name}xN" for name, chip in CHIPS.items() if not chip.dims)
    return (
        f"here; a TPU slice by product or topology: {'; '.join(tpus)}; several slices of one: 4xv6e-256; GPUs: {gpus}"
    )


def parse(text: str) -> Target:
    """The Target of "here", "v5e-16", "v5p:2x2x2", "4xv6e-256" or "gpu-h100x8", without devices."""
    gpu = re.fullmatch(r"(gpu-\w+?)(?:x(\d+))?", text)
    if gpu and gpu[1] in CHIPS and int(gpu[2] or 1):
        return Target(text, CHIPS[gpu[1]], int(gpu[2] or 1))
    tpu = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+)|:(\d+(?:x\d+)+))", text)
    name = ALIASES.get(tpu[2], tpu[2]) if tpu else ""
    chip = CHIPS.get(name)
    if not tpu or not chip or not chip.dims or tpu[1] == "0":
        raise TargetError(f"--target={text} is unknown; known are {known()}")
    like = f"{name}:{SHAPES[chip.dims][2]}"
    topology = tpu[4] or chip.products.get(int(tpu[3]))
    if not topology:
        products = ", ".join(f"{name}-{number}" for number in chip.products)
        counts = ", counted in cores: two a chip" if chip.named_by > 1 else ""
        raise TargetError(f"--target={text} is no product; there are {products}{counts}. Or give the topology: {like}")
    sizes = _sizes(topology)
    if len(sizes) != chip.dims or 0 in sizes:
        raise TargetError(f"--target={text}: a slice of {name} has {chip.dims} dimensions, such as {like}")
    slices = int(tpu[1] or 1)
    return Target(text, chip, math.prod(sizes) * chip.devices * slices, f"{name}:{topology}", slices)


def resolve(text: str) -> Target:
    """The Target with the devices to compile for; for a TPU before JAX's backends start."""
    if text == "here":
        devices = tuple(jax.devices())
        return Target(text, _present(devices[0]), len(devices), devices=devices)
    target = parse(text)
    jax.config.update("jax_platforms", "cpu")
    return dataclasses.replace(target, devices=_describe(target)) if target.topology else target


def _describe(target) -> tuple:
    # libtpu would ask the cloud's metadata server what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise TargetError(
            f"--target={target.name} needs libtpu to compile: pip install 'sftjax[tpu]' (no TPU is needed)"
        ) from None
    from jax.experimental import topologies

    options = dict(platform="tpu", topology_name=target.topology, chip_config_name=target.chip.config)
    if target.slices > 1:
        options["num_slices"] = target.slices
    if target.n == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(**options)
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).split("\n")[0]
        raise TargetError(f"--target={target.name}: there is no such slice: {reason}") from None
    return tuple(found.devices)


def _present(device):
    """The figures of a device of this machine; None where its kind is not in the table."""
    kind = device.device_kind.lower()
    for chip in CHIPS.values():
        gpu = not chip.dims and chip.kind.split()[-1].lower() in kind
        if gpu or chip.kind.lower() == kind:
            return chip
    return None
