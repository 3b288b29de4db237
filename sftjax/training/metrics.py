"""What a run reports: metrics.jsonl, TensorBoard, a progress line, speed and memory."""

import json
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sftjax.errors import MetricError, writing
from sftjax.files import check_regular, finite, parse_object, write_atomic
from sftjax.terminal import printable, show, warn
from sftjax.training.trackers import Tracker


class Writer:
    """Metrics to <workdir>/metrics.jsonl, <workdir>/tensorboard/ and one line on stderr.

    metrics.jsonl has one JSON object a line: "step" and numbers; NaN and infinities are null. start_step: the step a
    resumed run goes on from; what a killed run wrote of later ones is dropped. Processes other than 0 write nothing. On
    a terminal the line is a bar.
    """

    def __init__(
        self,
        workdir: Path | str,
        total_steps: int,
        tensorboard: bool = True,
        start_step: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._total, self._start = total_steps, start_step
        self._file = self._board = self._bar = None
        self._trackers = trackers
        if jax.process_index() != 0:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # also without what is no line of ours
            write_atomic(path, "".join(line for line, at in read_lines(path) if at["step"] <= start_step))
        self._file = path.open("a", 1, encoding="utf-8")  # by lines: a killed run keeps them
        if tensorboard:
            from sftjax.training.tensorboard import Board  # slow to import, not always wanted

            self._board = Board(Path(workdir) / "tensorboard", start_step + 1)
        self._started = time.monotonic()
        if sys.stderr.isatty():
            form = "step {n_fmt}/{total_fmt} |{bar:20}| {postfix}"
            self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, bar_format=form)

    def write(self, step: int, values: Mapping) -> None:
        """Record {name: number} of one step; arrays of one element count as numbers."""
        if self._file is None:
            return
        values = {name: _number(name, value) for name, value in values.items()}
        line = finite(values)
        with writing("the file", self._file.name):
            self._file.write(json.dumps({"step": int(step), **line}, allow_nan=False) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add(name, value, int(step))
        for tracker in self._trackers:
            tracker.write(int(step), {k: v for k, v in line.items() if v is not None})
        self._show(int(step), values)

    def flush(self) -> None:
        """Have everything in the files: what is killed after this has no gap before it."""
        for written in (self._board, self._file):
            if written is not None:
                written.flush()

    def close(self) -> None:
        """End the progress line and close the files; nothing is written after it."""
        for open_one in (self._bar, self._board, self._file):
            if open_one is not None:
                open_one.close()
        self._file, self._board, self._bar, self._trackers = None, None, None, ()

    def _show(self, step, values):
        """The few values a person watches; of a validation line, its first four."""
        watched = {"loss": "loss {:.4f}", "lr": "lr {:.2e}", "tokens_per_s": "tok/s {:,.0f}"}
        parts = [form.format(values[name]) for name, form in watched.items() if name in values]
        text = "  ".join(parts or [f"{k} {v:.4g}" for k, v in list(values.items())[:4]])
        done, left = step - self._start, self._total - step
        if done > 0 and left > 0:
            text += f"  eta {tqdm.format_interval((time.monotonic() - self._started) / done * left)}"
        if self._bar is None:
            show(f"step {step}/{self._total}  {text}", file=sys.stderr)
        else:
            self._bar.n = step
            self._bar.set_postfix_str(printable(text))  # also redraws


def _number(name, value):
    try:
        return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError) as e:
        raise MetricError(f"metric {name!r} is {value!r}; expected one number") from e


def read_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(text, object) of every line that is ours; what is none is said, but for a torn last one."""
    check_regular(path, MetricError)
    damaged = list[int]()
    with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith("\n"):  # the last one, as a kill leaves it
                break
            if (parsed := _line(line)) is None:
                damaged.append(number)
            else:
                yield line, parsed
    if damaged:
        lines = f"{len(damaged)} line{'s are' if len(damaged) > 1 else ' is'}"
        warn(f"{path}: {lines} damaged and left out, first line {damaged[0]}")


def _line(text) -> dict | None:
    parsed = parse_object(text)
    if type(parsed.get("step")) is not int:
        return None
    plain = (type(v) in (int, float) and abs(v) < 1e300 for v in parsed.values() if v is not None)
    return parsed if all(plain) else None


# Peak dense bf16 TFLOP/s of one JAX device, by parts of its device_kind; the first match counts.
PEAK_TFLOPS = (
    ("tpu v6 lite|tpu v6e", 918),
    ("tpu v5 lite|tpu v5e", 197),
    ("tpu v5", 459),  # v5p
    ("tpu v4", 275),
    ("tpu7x|tpu v7x", 1153.5),  # a chip has 2307 and is two devices to JAX
    ("b200", 2250),
    ("h200|h100", 989),
    ("a100", 312),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device of this jax device_kind; None when unknown."""
    for parts, tflops in PEAK_TFLOPS:
        if re.search(parts, device_kind.lower()):
            return tflops * 1e12
    return None


def mfu(flops_per_step: float, seconds: float, device_kind: str, n_devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None on a device whose peak is not in the table.

    flops_per_step: of the whole global batch, forward and backward without recomputation
    (Chowdhery et al. 2022, PaLM, appendix B). seconds: one step's wall time.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_step / (seconds * n_devices * peak)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes a device needs of a program: arguments, results and temporaries, shared ones once."""
    m: Any = compiled.memory_analysis()  # CompiledMemoryStats: CPUs, GPUs and TPUs have it
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return held + m.temp_size_in_bytes


def peak_memory() -> tuple[int, str]:
    """(bytes, "device"): the most that one has held; else (bytes, "process"), of host memory."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
