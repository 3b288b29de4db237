"""The text of scheduled HLO, read: computations, instructions, their shapes and FLOPs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}  # names without a width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation, taken apart."""

    name: str
    type: str
    op: str
    raw: str  # what stands between the parentheses
    rest: str  # the attributes after them

    @functools.cached_property
    def args(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.raw)

    def attribute(self, key: str) -> str:
        """The name after key=, a computation's; "" where there is none."""
        return first(rf"\b{key}=%?([\w.\-]+)", self.rest)

    @property
    def op_name(self) -> str:
        """Where it comes from, as in the source; its own name where nothing says it."""
        return first(r'op_name="([^"]*)"', self.rest) or self.name


@dataclasses.dataclass
class Computation:
    """The instructions of a computation by name, and the name of the one that is its result."""

    instructions: dict = dataclasses.field(default_factory=dict)  # in the order of the schedule
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def find(self, text: str) -> bool:
        """Is there a custom call with this target?"""
        return any(f'custom_call_target="{text}"' in i.rest for i in self if i.op == "custom-call")


def first(pattern: str, text: str) -> str:
    """The group of a pattern's first match in a text; "" where there is none."""
    match = re.search(pattern, text)
    return match[1] if match else ""


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$")
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
_START = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """({name: Computation}, name of the entry)."""
    computations, entry, current, lines = {}, None, None, list[str]()
    for line in text.splitlines():
        head = _HEAD.match(line) if line[:1] not in (" ", "") else None
        if head:
            current = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
            lines = []
        elif current is not None and _END.match(line):
            for text_of_one in lines:
                _read(text_of_one, current)
            current = None
        elif current is not None and _START.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # an attribute may hold line breaks
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; give compiled.as_text()")
    return computations, entry


def _read(line, computation):
    _, root, name, rest = _START.split(line, maxsplit=1)
    rest = re.sub(r"/\*index=\d+\*/", "", rest)
    end = _close(rest, 0) if rest[0] == "(" else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _close(rest, begin)
    one = Instruction(name, kind, rest[:begin], rest[begin + 1 : end - 1], rest[end:])
    computation.instructions[one.name] = one
    if root:
        computation.root = one.name


def _close(text, start) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text[start:]):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.end()
    return len(text)


def shapes(kind: str) -> list:
    """[(type, dimensions)] of a type's arrays."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", kind)
    return [(t, [int(x) for x in dims.split(",") if x]) for t, dims in found]


def nbytes(kind: str) -> float:
    """Bytes of a type's arrays together, without padding."""
    bits = {t: BITS[t] if t in BITS else int(first(r"(\d+)", t)) for t, _ in shapes(kind)}
    return sum(bits[t] / 8 * math.prod(dims) for t, dims in shapes(kind))


def _dims(one, computation):
    return shapes(computation.instructions[one].type)[0][1]


def dot_flops(one: Instruction, computation: Computation) -> float:
    """FLOPs of a dot: two for each product of its sums."""
    contracted = first(r'lhs_contracting_dim(?:s=|ensions":)[{\[]([^}\]]*)', one.rest)
    left = _dims(one.args[0], computation)
    depth = math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))
    return 2 * math.prod(shapes(one.type)[0][1]) * depth


def convolution_flops(one: Instruction, computation: Computation) -> float:
    """Only what meets an element of the input counts, not the padding (nor holes of dilation)."""
    [(left, right, out)] = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    lhs, rhs = (_dims(a, computation) for a in one.args[:2])
    result = shapes(one.type)[0][1]
    window = dict(x.split("=") for x in first(r"window=\{([^}]*)\}", one.rest).split())
    unnamed = dict(size=1, stride=1, pad=0, lhs_dilate=1, rhs_dilate=1)
    flops = 2 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")]
    for d in filter(str.isdigit, out):
        each = (window[k].split("x")[int(d)] if k in window else n for k, n in unnamed.items())
        numbers = [int(str(x).split("_")[0]) for x in each]  # of pad=before_after that before
        flops *= _meets(result[out.index(d)], lhs[left.index(d)], *numbers)
    return flops / int(first(r"batch_group_count=(\d+)", one.rest) or 1)


@functools.cache
def _meets(n_out, n_in, size, stride, pad, dilate, window_dilate) -> int:
    """Pairs of an output position and a window position that meet an input element."""
    out, window = np.arange(n_out)[:, None], np.arange(size)
    places = out * stride + window * window_dilate - pad
    inside = (places >= 0) & (places <= (n_in - 1) * dilate)
    return int(np.count_nonzero(inside & (places % dilate == 0)))


def gemm_flops(one: Instruction, computation: Computation) -> float:
    """A matmul that the GPU compiler gave to cuBLAS; 0 for another custom call."""
    given = "$gemm" in one.rest or "$lt$matmul" in one.rest
    given = given and '"lhs_contracting_dimensions"' in one.rest
    return dot_flops(one, computation) if given else 0.0


def group_size(rest: str) -> int:
    """Devices in one group of a collective, from its attributes; 0 = all of them, none named."""
    if "source_target_pairs" in rest:
        return 2
    if listed := first(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed.split(","))
    if counts := first(r"replica_groups=\[([\d,]+)\]<=", rest):  # groups x devices of a group
        return int(counts.split(",")[-1])
    found = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if found:
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'a', or a part 'a':(1)2 of it
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    return 0


def branches(one: Instruction) -> list:
    """The names of the computations of which a conditional runs one."""
    if found := first(r"branch_computations=\{([^}]*)\}", one.rest):
        return re.findall(r"%([\w.\-]+)", found)
    return [one.attribute("true_computation"), one.attribute("false_computation")]


def index(one: Instruction) -> int:
    """Which element of its tuple a get-tuple-element gives, from 0."""
    return int(first(r"\bindex=(\d+)", one.rest))
