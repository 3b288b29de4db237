"""What a run reports: metrics.jsonl, TensorBoard, a progress line, speed, memory and the curve."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tqdm import tqdm

from sftjax.errors import MetricError, writing

# ---- writing -------------------------------------------------------------------------------


class Writer:
    """Metrics to <workdir>/metrics.jsonl, <workdir>/tensorboard/ and one line on stderr.

    metrics.jsonl has one JSON object a line: "step" and numbers; NaN and infinities are null, as
    JSON has neither. start_step: the step a resumed run goes on from; what a killed run wrote of
    later steps is dropped, so that no step appears twice. Processes other than 0 write nothing.
    The progress line is a bar on a terminal, else one plain line per write; progress=False: none.
    """

    def __init__(
        self,
        workdir,
        total_steps: int,
        process_index: int = 0,
        tensorboard: bool = True,
        progress: bool = True,
        start_step: int = 0,
    ):
        self._total, self._start = total_steps, start_step
        self._file = self._board = self._bar = None
        self._progress = progress and process_index == 0
        if process_index != 0:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(path, start_step)
        self._file = path.open("a", buffering=1)  # line by line: a killed run keeps its lines
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, not always wanted

            self._board = SummaryWriter(
                str(Path(workdir) / "tensorboard"), purge_step=start_step + 1
            )
        self._started = time.monotonic()
        if self._progress and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar:20}| {postfix}",
            )

    def write(self, step: int, values: Mapping) -> None:
        """Record {name: number} of one step; arrays of one element count as numbers."""
        if self._file is None:
            return
        values = {name: _number(name, value) for name, value in values.items()}
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing("the file", self._file.name):
            self._file.write(json.dumps({"step": int(step), **line}, allow_nan=False) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._progress:
            self._show(int(step), values)

    def say(self, text: str) -> None:
        """A message on stderr that does not tear the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._progress:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        for open_one in (self._bar, self._board, self._file):
            if open_one is not None:
                open_one.close()
        self._file = self._board = self._bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _show(self, step, values):
        text = progress_text(values) + self._eta(step)
        if self._bar is None:
            self.say(f"step {step}/{self._total}  {text}")
            return
        self._bar.n = step
        self._bar.set_postfix_str(text)  # also redraws

    def _eta(self, step):
        done, left = step - self._start, self._total - step
        if done <= 0 or left <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / done * left
        return f"  eta {tqdm.format_interval(seconds)}"


def progress_text(values: Mapping) -> str:
    """The few values a person watches; of a validation line, its first four."""
    watched = {
        "loss": lambda v: f"loss {v:.4f}",
        "lr": lambda v: f"lr {v:.2e}",
        "tokens_per_s": lambda v: f"tok/s {v:,.0f}",
    }
    parts = [show(values[name]) for name, show in watched.items() if name in values]
    return "  ".join(parts or [f"{k} {v:.4g}" for k, v in list(values.items())[:4]])


def _number(name, value):
    try:
        return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError) as e:
        raise MetricError(f"metric {name!r} is {value!r}; expected one number") from e


def _drop_after(path, step):
    """Rewrite metrics.jsonl without later steps and without a line torn by a kill."""
    if not path.exists():
        return
    kept = [line for line, at in _lines(path) if at["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _lines(path):
    """(text, object) of every whole line."""
    with open(path) as f:
        for line in f:
            try:
                parsed = json.loads(line)
            except json.JSONDecodeError:
                continue
            if line.endswith("\n"):
                yield line, parsed


# ---- speed and memory ----------------------------------------------------------------------

# Peak dense bf16 TFLOP/s of one JAX device, by a part of its device_kind; the first match counts.
PEAK_TFLOPS = (
    ("tpu v6 lite", 918),
    ("tpu v6e", 918),
    ("tpu v5 lite", 197),
    ("tpu v5e", 197),
    ("tpu v5", 459),  # v5p
    ("tpu v4", 275),
    ("tpu7x", 1153.5),  # a chip has 2307 and is two devices to JAX
    ("tpu v7x", 1153.5),
    ("b200", 2250),
    ("h200", 989),
    ("h100", 989),
    ("a100", 312),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device of this jax device_kind; None when unknown."""
    for part, tflops in PEAK_TFLOPS:
        if part in device_kind.lower():
            return tflops * 1e12
    return None


def mfu(flops_per_step: float, seconds: float, device_kind: str, n_devices: int) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None on a device whose peak is not in the table.

    MFU = FLOPs the model needs for a step / (seconds per step x devices x peak bf16 FLOP/s of one)

    flops_per_step: of the whole global batch, forward and backward without recomputation
    (Chowdhery et al. 2022, PaLM, appendix B). seconds: one step's wall time.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_step / (seconds * n_devices * peak)


def peak_memory() -> tuple[int, str]:
    """(bytes, "device" or "process"): the most that one local device has held so far; where the
    backend does not say, as on CPU, the most that this process has held in host memory."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "device"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


# ---- the curve -----------------------------------------------------------------------------


def curve_svg(metrics_jsonl_path, out_path, title: str = "Loss") -> None:
    """Draw "loss" and every "<set>/loss" of a metrics.jsonl over steps, as one SVG file."""
    series: dict[str, list] = {}
    for _, line in _lines(metrics_jsonl_path):
        for name, value in line.items():
            if (name == "loss" or name.endswith("/loss")) and value is not None:
                series.setdefault(name, []).append((line["step"], value))
    Path(out_path).write_text(_svg(series, title))


# Colours that stay apart for colour-blind readers (Okabe and Ito); the first is the train loss.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 440, 64, 20, 48, 52


def _svg(series, title) -> str:
    points = [p for s in series.values() for p in s]
    x_ticks = nice_ticks(min([p[0] for p in points] + [0]), max([p[0] for p in points] + [10]), 8)
    y_ticks = nice_ticks(min([p[1] for p in points] + [0]), max([p[1] for p in points], default=1))

    def x(step):
        share = (step - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value):
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = _axes(x, y, x_ticks, y_ticks, title)
    order = sorted(series, key=lambda name: (name != "loss", name))
    for i, name in enumerate(order):
        parts += _line(series[name], x, y, _COLOURS[i % len(_COLOURS)], marks=name != "loss")
    parts += _legend([(name, series[name][-1][1]) for name in order])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
            f' width="{_WIDTH}" height="{_HEIGHT}" font-family="Helvetica, Arial, sans-serif"'
            ' font-size="13" fill="#333">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers, evenly spaced by 1, 2, 2.5 or 5 x 10^n, that span low..high."""
    rough = (high - low or abs(high) or 1) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def _axes(x, y, x_ticks, y_ticks, title):
    left, right, bottom = x(x_ticks[0]), x(x_ticks[-1]), y(y_ticks[0])
    parts = [f'<text x="{left}" y="28" font-size="16" font-weight="bold">{_escape(title)}</text>']
    for v in y_ticks:
        parts.append(f'<path d="M{left} {y(v)}H{right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 8}" y="{y(v) + 4}" text-anchor="end">{v:g}</text>')
    for v in x_ticks:
        parts.append(f'<path d="M{x(v)} {bottom}v5" stroke="#888"/>')
        parts.append(f'<text x="{x(v)}" y="{bottom + 20}" text-anchor="middle">{v:,.10g}</text>')
    middle = (y(y_ticks[-1]) + bottom) / 2
    return [
        *parts,
        f'<path d="M{left} {bottom}H{right}" stroke="#888"/>',
        f'<text x="{(left + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">step</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">loss</text>',
    ]


def _line(points, x, y, colour, marks):
    """One curve: validation with marks; a long train curve faint, under its running mean."""

    def path(points, style):
        d = "M" + "L".join(f"{x(s)} {y(v)}" for s, v in points)
        return f'<path d="{d}" fill="none" stroke="{colour}" stroke-linejoin="round" {style}/>'

    if marks or len(points) == 1:
        dots = [f'<circle cx="{x(s)}" cy="{y(v)}" r="3.5" fill="{colour}"/>' for s, v in points]
        return [path(points, 'stroke-width="2"'), *dots]
    if len(points) < 100:
        return [path(points, 'stroke-width="2"')]
    window = len(points) // 50
    mean = []
    for i, (step, _) in enumerate(points):
        near = points[max(0, i - window) : i + window + 1]
        mean.append((step, sum(v for _, v in near) / len(near)))
    return [path(points, 'stroke-opacity="0.3"'), path(mean, 'stroke-width="2"')]


def _legend(last):
    """Name and last value of each curve, in a row above the plot, ending at its right edge."""
    parts, right = [], _WIDTH - _RIGHT
    for i, (name, value) in reversed(list(enumerate(last))):
        colour = _COLOURS[i % len(_COLOURS)]
        label = f"{'train' if name == 'loss' else name.removesuffix('/loss')} {value:.4g}"
        left = right - 8 * len(label)  # about the width of a character
        parts += [
            f'<path d="M{left - 28} 24h22" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{left}" y="28">{_escape(label)}</text>',
        ]
        right = left - 44
    return parts


def _escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
