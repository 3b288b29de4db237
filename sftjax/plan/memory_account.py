"""Where a compiled step's memory goes: what is held, and what lives at the peak.

The compiler gives totals only. What makes up its temporaries is found by walking the schedule:
every instruction's result lives until its last use; tuples, loops and updates in place share their
operands' memory. The remainder, fragmentation mostly, is shown as other.
"""

import dataclasses
import math
import os
import re
from typing import TYPE_CHECKING, Any

import jax

from sftjax import params as params_lib
from sftjax.plan import hlo, hlo_text
from sftjax.plan.hardware import Target

if TYPE_CHECKING:
    from sftjax.plan.compile import Program

GIB = 2**30


@dataclasses.dataclass
class Account:
    """The memory of one device, by part, and its largest buffers."""

    parts: dict  # name -> bytes of one device
    total: float
    largest: list  # [(bytes, what)]


def held(program: "Program") -> dict:
    """Bytes a device holds between the steps, exactly: its shards of state and batch."""
    parts = {"parameters": program.state.params, "frozen": program.state.frozen}
    parts |= {"optimizer": program.state.opt_state, "batch": program.batch}
    return {name: local_bytes(tree) for name, tree in parts.items()}


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs with shardings."""
    leaves = (x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, _KEY))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


_KEY = jax.dtypes.prng_key


def account(program: "Program", compiled: jax.stages.Compiled, text: str) -> Account:
    """The Account of a compiled step. text: compiled.as_text()."""
    m: Any = compiled.memory_analysis()
    parts, peak = held(program), Live(text).peak()
    shapes = _shapes(program)
    found = {"gradients": 0.0, "weights in use": 0.0, "activations": 0.0, "logits": 0.0}
    for b in peak:
        found[_class_of(b, *shapes)] += b.size
    shrink = min(1.0, m.temp_size_in_bytes / max(sum(found.values()), 1))
    parts |= {name: size * shrink for name, size in found.items()}
    total = hlo.peak_bytes(compiled)
    parts["other"] = max(0.0, total - sum(parts.values()))
    named = [(b.size, b.text()) for b in sorted(peak, key=lambda b: -b.size)]
    held_ones = [(size, f"the {name} held") for name, size in held(program).items()]
    return Account(parts, total, sorted(named + held_ones, reverse=True)[:8])


def _shapes(program):
    """({shapes of parameters and of a layer's, whole or a shard}, {sizes of the vocabulary})."""
    known, c = set(), program.model.config
    for p in params_lib.flatten(program.state.params).values():
        for shape in (p.shape, p.sharding.shard_shape(p.shape)):
            known |= {_squeeze(shape), _squeeze(shape[1:])}
    m = program.mesh.shape
    parts = (1, m["tensor"], m["fsdp"], m["tensor"] * m["fsdp"], program.mesh.size)
    return known, {c.rows // n for n in parts if c.rows // n > max(c.width, c.mlp)} | {c.rows}


def _squeeze(shape):
    return tuple(sorted(n for n in shape if n > 1))


def _class_of(b, params, vocab) -> str:
    if _squeeze(b.dims) in params and len(_squeeze(b.dims)) > 1:
        return "gradients" if "transpose(" in b.op_name else "weights in use"
    return "logits" if any(n in vocab for n in b.dims) else "activations"


def limit(target: Target) -> float | None:
    """Bytes that a device's program may use; None where nothing says it."""
    if target.chip is not None:
        return target.chip.hbm * GIB
    stats = target.devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if target.devices[0].platform == "cpu":  # forced devices share the machine's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / target.n
    return None


def exhausted(message: str) -> tuple[float, list]:
    """(bytes needed, [(bytes, what)] the largest) from XLA's message of exhausted memory."""
    unit = {"B": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    size = r"([\d.]+)([BKMGT])"
    used = re.search(rf"(?:Used |required for \w+ \w+ \(){size}", message)
    total = float(used[1]) * unit[used[2]] if used else 0.0
    asked = re.search(r"allocating (\d+) bytes", message)
    total = float(asked[1]) if asked else total
    found = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        number, scale = re.findall(rf"\A{size}", part)[0]
        named = re.search(r'op_name="([^"]*)"', part)
        shape = re.search(r"Shape: (\S+\])", part)
        what = " ".join(x[1] for x in (shape, named) if x)
        found.append((float(number) * unit[scale], what or part.split("\n")[0]))
    return total, found


# ---- what lives at the peak ----------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Buffer:
    """One array in memory: its size in bytes, where it comes from and when it is last used."""

    size: float
    dims: tuple
    kind: str
    op_name: str
    last: int = 0  # place in the schedule of its last use

    def text(self) -> str:
        """Its type and its origin, for a report."""
        where = re.sub(r"\b(jit\(train_step\)|closed_call|while|body|jvp\(\))/", "", self.op_name)
        return f"{self.kind} of {where}"


_SAME = ("bitcast", "optimization-barrier", "copy-done", "async-done", "async-update")


class Live:
    """The buffers of a program's schedule."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = hlo_text.parse(text)

    def peak(self) -> list:
        """The temporaries that live at the moment when they are most."""
        return self._peak(self.entry, in_place=False)

    def _peak(self, name, in_place) -> list:
        """in_place: the result has a place already, as a loop's has in what it began with."""
        body, values, buffers, inner = self.computations[name], dict[str, list](), [], {}
        for at, one in enumerate(body):
            values[one.name], made = self._value(one, body, values)
            for b in made:
                b.last = at
            buffers += [(at, b) for b in made]
            used = one.args
            if one.op.endswith("-done"):  # until now what it started with has been in use too
                used = used + body.instructions[used[0]].args
            for arg in used:
                for b in _flat(values.get(arg)):
                    b.last = max(b.last, at)
            callee = one.attribute("body") or (one.op == "call" and one.attribute("to_apply"))
            if callee:
                inner[at] = self._peak(callee, in_place=one.op == "while")
        kept = {id(b) for b in _flat(values[body.root])}
        temporary = [(at, b) for at, b in buffers if id(b) not in kept and b.size]
        if not in_place:  # a result lives on; the entry's own are no temporaries
            temporary += [(at, b) for at, b in buffers if id(b) in kept and name != self.entry]
        return _most(temporary, inner)

    def _value(self, one, body, values):
        """(the buffers of a result, nested like its tuple; those it makes)."""
        args = [values.get(a) for a in one.args]
        if one.op == "parameter":
            return [None] * len(hlo_text.elements(one.type)), []
        if one.op == "tuple":
            return [a[0] if a and len(a) == 1 else a for a in args], []
        if one.op == "get-tuple-element":
            return _element(args[0], hlo_text.index(one)), []
        if one.op in _SAME or one.op == "while" or one.op.endswith("-done"):
            return args[0] if args else None, []
        if one.op == "dynamic-update-slice":
            return args[0], []
        if one.op == "constant":
            return [None], []
        shared = self._shared(one, args) if one.op == "fusion" else {}
        made, out, arrays = [], [], _arrays(one.type)
        if one.op.endswith("-start"):  # (operand, result, ...); of a call the result is the last
            result = {"copy-start": 0, "call-start": -1}.get(one.op, min(1, len(arrays) - 1))
            arrays = [arrays[result]]
        for k, (kind, layout) in enumerate(arrays):
            if k in shared:
                out.append(shared[k])
                continue
            dims = tuple(hlo_text.shapes(kind)[0][1])
            b = Buffer(_size(kind, dims, layout), dims, kind, _origin(one, body))
            made.append(b)
            out.append(b)
        return out, made

    def _shared(self, one, args) -> dict:
        """{element of a fusion's result: the operand in whose place it is written}."""
        callee = self.computations[one.attribute("calls")]
        root = callee.instructions[callee.root]
        parts = root.args if root.op == "tuple" else [root.name]
        out = {}
        for k, name in enumerate(parts):
            part = callee.instructions[name]
            while part.op in ("bitcast", "dynamic-update-slice") and part.args:
                part = callee.instructions[part.args[0]]
            written = callee.instructions[name].op != "parameter"
            in_place = self._updates(callee, name)
            if part.op == "parameter" and (in_place or not written):
                value = args[int(part.raw)] if int(part.raw) < len(args) else None
                out[k] = value[0] if value and len(value) == 1 else value
        return out

    def _updates(self, callee, name) -> bool:
        one = callee.instructions[name]
        while one.op == "bitcast":
            one = callee.instructions[one.args[0]]
        return one.op == "dynamic-update-slice"


def _origin(one, body) -> str:
    """An instruction's name in the source; a copy has none, but what it copies may."""
    for _ in range(4):
        if "op_name=" in one.rest or not one.args or one.args[0] not in body.instructions:
            break
        one = body.instructions[one.args[0]]
    return one.op_name


def _most(buffers, inner) -> list:
    """The buffers alive at the worst moment; inner: {place: those of a loop's own peak}."""
    at = {place for place, _ in buffers} | set(inner)
    best, most = [], -1.0
    starts = sorted(buffers, key=lambda x: x[0])
    alive, i = [], 0
    for place in sorted(at):
        while i < len(starts) and starts[i][0] <= place:
            alive.append(starts[i][1])
            i += 1
        alive = [b for b in alive if b.last >= place]
        total = sum(b.size for b in alive) + sum(b.size for b in inner.get(place, ()))
        if total > most:
            best, most = alive + inner.get(place, []), total
    return best


def _flat(value) -> list:
    if value is None:
        return []
    if isinstance(value, Buffer):
        return [value]
    return [b for v in value for b in _flat(v)]


def _element(value, k):
    if value is None:
        return None
    found = value[k] if k < len(value) else None
    return found if isinstance(found, list) else [found]


def _arrays(kind) -> list:
    """[(type with dimensions, layout)] of a type's arrays."""
    return re.findall(r"\b([a-z]\w*\[[\d,]*\])(\{[^}]*\})?", kind)


def _size(kind, dims, layout) -> float:
    """Bytes in the device's main memory; 0 for another memory space. Tiles are filled up."""
    if re.search(r"S\([1-9]\d*\)", layout):
        return 0.0
    tile = re.search(r":T\((\d+),(\d+)\)", layout)
    if tile and len(dims) > 1:
        order = [int(x) for x in re.findall(r"^\{([\d,]*)", layout)[0].split(",")]
        padded = list(dims)
        for axis, n in zip(order, (int(tile[2]), int(tile[1])), strict=False):
            padded[axis] = -(-padded[axis] // n) * n
        kind = f"{kind.split('[')[0]}[{','.join(map(str, padded))}]"
    return hlo_text.nbytes(kind)
