"""Where a training step's time goes, on one page: a profiler trace beside the compiled program.

    python benchmarks/trace.py [--shape=S] [--steps=3] [--logdir=DIR] [--out=trace.json]
                               [--svg=roofline.svg]

Runs a few steps of a shape of benchmarks/train_step.py under jax.profiler and gives each operation
that ran to one kind, by the compiled program's text:

matmul       products outside the kinds below, alone or fused with what surrounds them
attention    all that ops.attention traced, products and softmax
vocabulary   all that the loss traced: the projection, softmax, and their gradients
collectives  what moves data between devices
other        the rest: norms, activations, the optimizer, copies
idle         no operation on any line of the device

Shares are of the steps' wall time on the busiest device; where several threads run at once, each
kind has its part of the busy time. FLOPs count the products; bytes what operations read and
write, caches aside. Beside them stand the rates that this machine reaches in a large matmul and in
a copy, measured here: that is the roofline. What other programs take of the machine counts as idle.
"""

import argparse
import functools
import json
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import sftjax
from sftjax import params as params_lib
from sftjax.reports import curves
from sftjax.training import workdir

sys.path.insert(0, str(Path(__file__).parent))
from plot import loglog
from train_step import SHAPES, make_batch

KINDS = ("matmul", "attention", "vocabulary", "collectives", "other")
COLLECTIVE = re.compile(r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|ragged-all-to-all)")
CONTAINERS = {"while", "call", "conditional"}  # their time is that of what they run
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4,
         "f64": 8, "s64": 8, "u64": 8}  # fmt: skip

# ---- the compiled program ------------------------------------------------------------------

LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


class Program:
    """Instructions of a compiled program's text: what they are, their FLOPs and bytes."""

    def __init__(self, text):
        self.ops, self.bodies, body = {}, defaultdict(list), None
        for line in text.splitlines():
            if line.rstrip().endswith("{") and "->" in line:
                body = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%").split("(")[0]
            elif match := LINE.match(line):
                name, shape, opcode, rest = match.groups()
                self.ops[name] = (shape, opcode, rest)
                self.bodies[body].append(name)

    def inside(self, name):
        """The instruction and those of the computations that it calls as one operation."""
        _, opcode, rest = self.ops[name]
        yield name
        if opcode not in CONTAINERS:
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", rest):
                for inner in self.bodies.get(called, ()):
                    yield from self.inside(inner)

    def kind(self, name) -> str | None:
        """One of KINDS; None for what is not an operation of its own."""
        if name not in self.ops or self.ops[name][1] in CONTAINERS:
            return None
        if COLLECTIVE.match(self.ops[name][1]):
            return "collectives"
        inner = list(self.inside(name))
        paths = [m[1] for n in inner if (m := re.search(r'op_name="([^"]*)"', self.ops[n][2]))]
        for scope, kind in (("attention", "attention"), ("linear_cross_entropy", "vocabulary")):
            if 2 * sum(scope in path for path in paths) > len(paths):
                return kind
        return "matmul" if any(self.is_product(n) for n in inner) else "other"

    def is_product(self, name):
        _, opcode, rest = self.ops[name]
        return opcode in ("dot", "convolution") or "gemm" in rest or "matmul" in rest.lower()

    def flops(self, name) -> float:
        """2 a multiplication and addition, of the products that the instruction holds."""
        return sum(self._product_flops(n) for n in self.inside(name))

    def _product_flops(self, name):
        shape, _, rest = self.ops[name]
        found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]"?([\d,"]*)', rest)
        if not self.is_product(name) or not found:
            return 0
        operand = re.match(r"\s*(?:\w+\[[^)]*?\]\S* )?%?([\w.\-]+)", rest)
        shapes = _shapes(self.ops[operand[1]][0]) if operand and operand[1] in self.ops else []
        if not shapes:
            return 0
        dims = [int(d) for d in re.findall(r"\d+", found[1])]
        out = _shapes(shape)[0][1]  # what follows in a tuple is workspace
        return 2 * math.prod(out) * math.prod(shapes[0][1][d] for d in dims)

    def bytes(self, name) -> int:
        """What the instruction writes and reads, its operands by the names that it takes."""
        shape, _, rest = self.ops[name]
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        shapes = [shape, *(self.ops[n][0] for n in operands if n in self.ops)]
        return sum(SIZES.get(d, 4) * math.prod(s) for text in shapes for d, s in _shapes(text))


def _shapes(text):
    """[(dtype, sizes)] of a shape's text, a tuple's parts each."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
    return [(d, [int(n) for n in s.split(",") if n]) for d, s in found]


# ---- the trace -----------------------------------------------------------------------------


def read_trace(logdir, step_name):
    """([(device, start, stop, instruction)] in ns, [(start, stop)] of the steps)."""
    file = max(Path(logdir).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    events, steps = [], []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                span = (event.start_ns, event.start_ns + event.duration_ns)
                if event.name == step_name:
                    steps.append(span)
                    continue
                stats = dict(event.stats)
                name = stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%")
                if "hlo_op" in stats and not event.name.startswith("end: "):
                    events.append((f"{plane.name}/{stats.get('device_ordinal', 0)}", *span, name))
                elif line.name == "XLA Ops":  # a TPU's, named by their whole text
                    events.append((plane.name, *span, name))
    return events, steps


def union(spans):
    """Total length of the spans' union."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def summarise(program, events, steps):
    """{kind: dict(share, seconds a step, flops, bytes)} and idle's share, on the busiest device."""
    start, stop = min(s for s, _ in steps), max(s for _, s in steps)
    inside = [e for e in events if e[1] >= start and e[2] <= stop and program.kind(e[3])]
    if not inside:
        raise ValueError("the trace holds no operation of the compiled step")
    by_device = defaultdict(list)
    for device, *event in inside:
        by_device[device].append(event)
    device = max(by_device, key=lambda d: union([e[:2] for e in by_device[d]]))
    mine, n = by_device[device], len(steps)
    busy, worked = union([e[:2] for e in mine]), sum(e[1] - e[0] for e in mine)
    out = {k: dict(share=0.0, seconds=0.0, flops=0.0, bytes=0.0) for k in KINDS}
    for begin, end, name in mine:
        row = out[program.kind(name)]
        row["share"] += (end - begin) / worked * busy / (stop - start)
        row["seconds"] += (end - begin) / worked * busy / n * 1e-9
        row["flops"] += program.flops(name) / n
        row["bytes"] += program.bytes(name) / n
    return out, 1 - busy / (stop - start), (stop - start) / n * 1e-9


# ---- what the machine can do ---------------------------------------------------------------


def best_seconds(fn, *args, tries=5):
    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - began)
    return min(found)


def machine_rates(dtype, n=None, mib=None):
    """(FLOP/s of a large square matmul, bytes/s of a large array read and written)."""
    small = jax.default_backend() == "cpu"
    n, mib = n or (2048 if small else 8192), mib or (256 if small else 2048)
    a = jnp.ones((n, n), dtype)
    x = jnp.ones(mib * 2**20 // 4, jnp.float32)
    matmul = best_seconds(jax.jit(lambda a: a @ a), a)
    copy = best_seconds(jax.jit(lambda x: x + 1), x)
    return 2 * n**3 / matmul, 2 * x.nbytes / copy


# ---- the page ------------------------------------------------------------------------------


def show(found, idle, seconds, rates):
    peak, bandwidth = rates
    print(f"a step takes {1e3 * seconds:,.1f} ms; matmul {peak / 1e9:,.0f} GFLOP/s, ", end="")
    print(f"memory {bandwidth / 1e9:,.1f} GB/s, equal at {peak / bandwidth:.0f} FLOP a byte")
    print(f"{'':<12}{'share':>8}{'ms':>10}{'GFLOP/s':>10}{'of peak':>9}{'GB/s':>8}{'FLOP/byte':>11}")
    for kind, row in found.items():
        if not row["seconds"]:
            print(f"{kind:<12}{'-':>8}")
            continue
        rate, moved = row["flops"] / row["seconds"], row["bytes"] / row["seconds"]
        print(
            f"{kind:<12}{row['share']:>8.1%}{1e3 * row['seconds']:>10.1f}{rate / 1e9:>10.1f}"
            f"{rate / peak:>9.1%}{moved / 1e9:>8.1f}{row['flops'] / max(row['bytes'], 1):>11.1f}"
        )
    print(f"{'idle':<12}{idle:>8.1%}{1e3 * idle * seconds:>10.1f}")
    total = sum(row["flops"] for row in found.values())
    print(f"the step as a whole: {total / seconds / peak:.1%} of the machine's own matmul rate")


def roofline(found, rates, title):
    """A figure: the machine's roof, and each kind that multiplies as a point under it."""
    peak, bandwidth = rates
    points = {
        kind: [(row["flops"] / row["bytes"], row["flops"] / row["seconds"] / 1e9)]
        for kind, row in found.items()
        if row["flops"] and row["bytes"] and row["seconds"]
    }
    ridge, tops = peak / bandwidth, [p[0][0] for p in points.values()]
    low, high = min([ridge / 30, *tops]) / 2, max([ridge * 30, *tops]) * 2
    roof = [(low, low * bandwidth / 1e9), (ridge, peak / 1e9), (high, peak / 1e9)]
    return loglog({"roof": roof, **points}, title, "FLOP a byte", "GFLOP/s")


def profile(config, rows, length, steps, logdir):
    """The compiled program's text; the trace is in logdir."""
    model, tx = sftjax.Model(config), optax.adamw(1e-4)
    state = sftjax.TrainState.create(params=params_lib.init(model.abstract, jax.random.key(0)), tx=tx)
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0)
    batch = jax.device_put(make_batch(config, rows, length, 0.5))
    compiled = step.lower(state, batch).compile()
    state, _ = jax.block_until_ready(compiled(state, batch))
    with jax.profiler.trace(logdir):
        for i in range(steps):
            with jax.profiler.StepTraceAnnotation("train_step", step_num=i):
                state, _ = jax.block_until_ready(compiled(state, batch))
    return compiled.as_text()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="S", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--logdir", default="", help="keep the trace here")
    parser.add_argument("--out", default="")
    parser.add_argument("--svg", default="")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        logdir = args.logdir or temporary
        text, dtype = profile(*SHAPES[args.shape], args.steps, logdir), SHAPES[args.shape][0].dtype
        events, steps = read_trace(logdir, "train_step")
    found, idle, seconds = summarise(Program(text), events, steps)
    rates = machine_rates(dtype)
    print(f"shape {args.shape} on {jax.devices()[0].device_kind}, {dtype}")
    show(found, idle, seconds, rates)
    if args.svg:
        title = f"Train step, shape {args.shape}, {jax.devices()[0].device_kind}, {dtype}"
        curves.save(roofline(found, rates, title), args.svg, title)
    if args.out:
        value = dict(
            environment=workdir.environment(), shape=args.shape, steps=args.steps, seconds=seconds,
            idle=idle, kinds=found, matmul_flops_per_s=rates[0], bytes_per_s=rates[1],
        )  # fmt: skip
        Path(args.out).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
