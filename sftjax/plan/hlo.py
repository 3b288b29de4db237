"""What a compiled program does, read from the text of its scheduled HLO.

XLA's own cost analysis counts the body of a loop once. Here a body counts as often as it runs: by the trip count that
XLA noted, or by running the loop's scalars. A loop whose end depends on data counts as often as the caller assumes, and
is listed.

Bytes of a collective are those of its whole payload: what a reduce-scatter takes, what all others give. Cycles are the
TPU compiler's own estimate; collectives and Pallas kernels have none.
"""

import dataclasses
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from sftjax.plan import hlo_text as text_lib

KINDS = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"}
KINDS |= {"ragged-all-to-all", "collective-broadcast"}


@dataclasses.dataclass
class Collective:
    """All collectives of one kind and group size. wire: bytes a device sends over a ring."""

    count: int = 0
    bytes: float = 0.0
    wire: float = 0.0
    async_bytes: float = 0.0  # of those that run beside other work


@dataclasses.dataclass
class Kernel:
    """A Pallas kernel or another custom call, with the cost that it declares (0 = none)."""

    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program, and how often its body runs each time."""

    name: str  # where it comes from, as in the source: "jit(step)/while"
    trips: int
    known: bool  # False: the caller's assumption


@dataclasses.dataclass
class Cost:
    """What one run of a program, or of one computation of it, takes on one device."""

    flops: float = 0.0  # of dots and convolutions
    cycles: Counter = dataclasses.field(default_factory=Counter)  # matmul | copy | other
    collectives: dict = dataclasses.field(default_factory=lambda: defaultdict(Collective))
    kernels: dict = dataclasses.field(default_factory=lambda: defaultdict(Kernel))
    loops: list = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add another Cost, `times` over; its loops are listed once."""
        self.flops += times * other.flops
        for k, v in other.cycles.items():
            self.cycles[k] += times * v
        for name in ("collectives", "kernels"):
            for k, record in getattr(other, name).items():
                mine = vars(getattr(self, name)[k])
                for field, value in vars(record).items():
                    mine[field] += times * value
        self.loops += other.loops

    @property
    def total_cycles(self) -> float:
        """Cycles of all instructions for which the compiler gives them."""
        return sum(self.cycles.values())

    @property
    def kernel_flops(self) -> float:
        """As declared; they are not in `flops`."""
        return sum(k.flops for k in self.kernels.values())

    @property
    def async_share(self) -> float:
        """Of the bytes of all collectives, the share that runs beside other work."""
        total = sum(c.bytes for c in self.collectives.values())
        return sum(c.async_bytes for c in self.collectives.values()) / total if total else 1.0

    def summary(self) -> dict:
        """The same as plain JSON."""
        return {
            "flops": self.flops,
            "cycles": dict(self.cycles),
            "collectives": {
                f"{kind} x{group}": dataclasses.asdict(c) for (kind, group), c in sorted(self.collectives.items())
            },
            "async_share": self.async_share,
            "kernels": {k: dataclasses.asdict(v) for k, v in sorted(self.kernels.items())},
            "loops": [dataclasses.asdict(x) for x in self.loops],
        }


def analyze(text: str, assume: int | Callable[[str], int] = 1) -> Cost:
    """The Cost of a program's entry. text: compiled.as_text().

    collectives: {(kind, group size): Collective}. assume: how often a loop runs whose trip count depends on data; or a
    function that says so of its name.
    """
    reader = _Reader(text, assume)
    return reader.walk(reader.entry, {})


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")
_BINARY: dict[str, Callable] = dict(add=operator.add, subtract=operator.sub, multiply=operator.mul)
_BINARY |= {"minimum": min, "maximum": max, "and": operator.and_, "or": operator.or_}
MOST_TRIPS = 100_000


class _Reader:
    def __init__(self, text, assume) -> None:
        self.computations, self.entry = text_lib.parse(text)
        self.assume = assume
        self.started = {
            c.key
            for body in self.computations.values()
            if body.find("AsyncCollectiveStart")
            for c in _collectives_in(body)
        }

    def walk(self, name, env) -> Cost:
        """env: {(parameter, index): int}: the scalars known of the computation's tuple."""
        body, total = self.computations[name], Cost()
        for one in body:
            self._one(one, name, env, total)
            for c in self._collectives(one, body):
                if c.group == 1:  # nothing is sent
                    continue
                whole, wire = c.sizes
                record = total.collectives[c.kind, c.group]
                record.count, record.bytes = record.count + 1, record.bytes + whole
                record.wire += wire
                record.async_bytes += whole * c.asynchronous
        return total

    def _one(self, one, name, env, total):
        body = self.computations[name]
        cycles = text_lib.first(r'"estimated_cycles":"(\d+)"', one.rest)
        if cycles and one.op not in ("while", "call", "conditional"):
            total.cycles[self._category(one)] += int(cycles)
        if one.op == "while":
            trips, inner = self._trips(one, name, env, total)
            total.add(self.walk(one.attribute("body"), inner), trips)
        elif one.op == "call":
            total.add(self.walk(one.attribute("to_apply"), {}))
        elif one.op == "conditional":
            costs = [self.walk(b, {}) for b in text_lib.branches(one)]
            total.add(max(costs, key=lambda c: (c.total_cycles, c.flops)))
        elif one.op in ("dot", "convolution", "fusion"):
            total.flops += self._flops(one, body)
        elif one.op == "custom-call":
            total.flops += text_lib.gemm_flops(one, body)
            _kernel(one, total)

    def _flops(self, one, body) -> float:
        if one.op == "fusion":
            callee = self.computations[one.attribute("calls")]
            return sum(self._flops(i, callee) for i in callee if i.op in ("dot", "convolution", "fusion"))
        return (text_lib.dot_flops if one.op == "dot" else text_lib.convolution_flops)(one, body)

    def _category(self, one) -> str:
        ops = {one.op}
        if one.op == "fusion":
            ops |= {i.op for i in self.computations[one.attribute("calls")]}
        if ops & {"dot", "convolution"}:
            return "matmul"
        return "copy" if one.op in ("copy", "transpose") else "other"

    def _collectives(self, one, body):
        """Those that this instruction starts or does."""
        name = one.attribute("calls") or (one.op == "call-start" and one.attribute("to_apply"))
        if name and one.op in ("fusion", "async-start", "call-start"):
            callee = self.computations[name]
            starts = one.op.endswith("-start") or callee.find("AsyncCollectiveStart")
            for c in _collectives_in(callee):
                # A TPU's collective in flight is an operand of the fusions beside which it runs.
                if starts or c.key not in self.started:
                    scatters = "all-reduce-scatter" in name and c.kind == "all-reduce"
                    yield dataclasses.replace(c, kind="reduce-scatter" if scatters else c.kind, asynchronous=starts)
        elif found := _collective(one, body):
            yield found

    def _trips(self, one, name, env, total):
        """(how often the body runs, the scalars that stay the same in it)."""
        state = dict[tuple, int]()  # the scalars that it starts with, as far as they are known
        for k, kind in enumerate(re.findall(r"[a-z]\w*\[[\d,]*\]", one.type)):
            if re.match(r"(pred|[su]\d+)\[\]", kind):
                state[0, k] = self._value(name, one.args[0], env, k)
        trips, inner = self._run(one, {k: v for k, v in state.items() if v is not None})
        if noted := text_lib.first(r'"known_trip_count":\{"n":"(\d+)"', one.rest):
            trips = int(noted)
        assumed = self.assume(one.op_name) if callable(self.assume) else self.assume
        rounds = assumed if trips is None else trips
        total.loops.append(Loop(one.op_name, rounds, trips is not None))
        return rounds, inner

    def _run(self, one, state):
        """Run the loop's scalars: (trips or None, those that never change)."""
        condition, body = one.attribute("condition"), one.attribute("body")
        root = self.computations[body].root
        fixed = {k: v for k, v in state.items() if self._invariant(body, k[1])}
        moving = [k for k in state if k not in fixed]
        for trips in range(MOST_TRIPS if moving else 1):
            more = self._value(condition, self.computations[condition].root, state)
            if not more:
                return (None if more is None else trips), fixed
            new = {k: self._value(body, root, state, k[1]) for k in moving}
            state = fixed | {k: v for k, v in new.items() if v is not None}
        return None, fixed

    def _invariant(self, body, k) -> bool:
        computation = self.computations[body]
        root = computation.instructions[computation.root]
        if root.op != "tuple":
            return False
        one = computation.instructions[root.args[k]]
        while one.op in _SAME:
            one = computation.instructions[one.args[0]]
        if one.op != "get-tuple-element" or text_lib.index(one) != k:
            return False
        return computation.instructions[one.args[0]].op == "parameter"

    def _value(self, name, instruction, env, k=None):
        """The value of a scalar in a computation, or of a tuple's element k; None if not known."""
        one = self.computations[name].instructions[instruction]
        if one.op == "parameter":
            return env.get((int(one.raw), k))
        if one.op in _SAME:
            return self._value(name, one.args[0], env, k)
        if one.op == "fusion" or (one.op == "call" and k is None):
            callee = one.attribute("calls") or one.attribute("to_apply")
            given = {(i, None): self._value(name, a, env) for i, a in enumerate(one.args)}
            return self._value(callee, self.computations[callee].root, given, k)
        if k is None:
            return self._scalar(one, name, env)
        if one.op == "tuple":
            return self._value(name, one.args[k], env)
        if one.op == "while" and self._invariant(one.attribute("body"), k):
            return self._value(name, one.args[0], env, k)
        return None

    def _scalar(self, one, name, env):
        if one.op == "constant":
            whole = int(one.raw) if re.fullmatch(r"-?\d+", one.raw) else None
            return {"true": True, "false": False}.get(one.raw, whole)
        if one.op == "get-tuple-element":
            return self._value(name, one.args[0], env, text_lib.index(one))
        if one.op in _BINARY or one.op == "compare":
            a, b = (self._value(name, x, env) for x in one.args)
            # The directions of a comparison, such as LT, are called as Python's operators are.
            fn = _BINARY.get(one.op) or getattr(operator, one.attribute("direction").lower())
            return None if a is None or b is None else fn(a, b)
        return None


@dataclasses.dataclass(frozen=True)
class _Found:
    """A collective in the text. key: the same at its start and at its end."""

    one: text_lib.Instruction
    kind: str
    operands: float  # bytes
    key: str
    asynchronous: bool

    @property
    def group(self) -> int:
        return text_lib.group_size(self.one.rest)

    @property
    def sizes(self) -> tuple[float, float]:
        """(bytes of the whole payload, bytes that a device sends)."""
        n, whole = self.group, text_lib.nbytes(self.one.type)
        if self.one.op.endswith("-start"):  # its type holds the operands too
            whole = self.operands * n if self.kind == "all-gather" else self.operands
        whole = self.operands if self.kind == "reduce-scatter" else whole
        share = (n - 1) / n if n else 1.0
        sends = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return whole, whole * sends


def _collective(one, computation):
    kind = one.op.removesuffix("-start")
    if kind not in KINDS:
        return None
    operands = sum(text_lib.nbytes(computation.instructions[a].type) for a in one.args)
    return _Found(one, kind, operands, one.attribute("channel_id") or one.name, one.op.endswith("-start"))


def _collectives_in(computation):
    return [found for one in computation if (found := _collective(one, computation))]


def _kernel(one, total):
    target = text_lib.first(r'custom_call_target="([^"]*)"', one.rest)
    if target != "tpu_custom_call" and "triton" not in target and "cudnn" not in target:
        return
    record = total.kernels[one.name.rstrip(".0123456789")]
    record.count += 1
    declared = text_lib.first(r'cost_estimate":\{([^}]*)\}', one.rest)
    record.flops += float(text_lib.first(r'"flops":"?([\d.e+]+)', declared) or 0)
    record.bytes += float(text_lib.first(r'"bytes_accessed":"?([\d.e+]+)', declared) or 0)
