"""Where a step's memory goes: what is held between steps, exactly, and a step's temporaries."""

import re
from typing import TYPE_CHECKING, Any

import jax

from sftjax.plan.hlo_text import first
from sftjax.training import build
from sftjax.training.metrics import peak_bytes

if TYPE_CHECKING:
    from sftjax.plan.compile import Program

GIB = 2**30


def held(program: "Program") -> dict:
    """Bytes a device holds between the steps, exactly: its shards of state and batch."""
    parts = {"parameters": program.state.params, "frozen": program.state.frozen}
    parts |= {"optimizer": program.state.opt_state, "batch": program.batch}
    return {name: build.shard_bytes(tree) for name, tree in parts.items()}


def account(program: "Program", compiled: jax.stages.Compiled) -> tuple[dict[str, float], float]:
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
