"""The loop's log: device metrics are fetched one log interval late, so the loop never waits."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import optax
from ml_collections import ConfigDict

from sftjax import terminal
from sftjax.config import ConfigError
from sftjax.files import finite
from sftjax.parallel import processes
from sftjax.training import metrics
from sftjax.training.data import Feed
from sftjax.training.trackers import Tracker


def say(what: str, text: str) -> None:
    """One labelled line (or several, aligned) on standard output, from process 0 only."""
    if jax.process_index() == 0:
        terminal.show(f"{what:<10}" + text.replace("\n", "\n" + " " * 10))


def warn(text: object) -> None:
    """A warning, from process 0 only."""
    if jax.process_index() == 0:
        terminal.warn(text)


class Log:
    """Collects each step's metrics and writes a line every section.log_every.

    A line holds its last step's loss, gradient norm and so on; over all its steps are <count>_per_s of the task's
    counts (of texts cells, tokens and trained_tokens: all positions, those not of padding, those trained), step_time,
    data_wait (the share of time spent waiting for a batch), mfu, skipped (updates), and of each of several sources
    trained_tokens/<name> and the mean loss/<name> of these; documents/<name> and epochs/<name> are since the run's
    beginning.
    """

    def __init__(
        self,
        section: ConfigDict,
        workdir: Path | str,
        feed: Feed,
        lr: optax.Schedule,
        flops: float,
        start: int,
        window: Sequence[Mapping] = (),
        see: Callable[[int, list[dict]], None] = lambda first, window: None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """section: the config's `train`. window: what `state` was as step `start` was saved. see: as Health.see."""
        if not feed.every(section.log_every, "train.log_every"):
            raise ConfigError("train.log_every is 0; write at least 1 step")
        # Lines of steps after `start`, which a killed run left behind, are dropped.
        board, lines = section.tensorboard, Path(workdir) / "metrics.jsonl"
        if window and lines.exists():  # else the run ended there, and its last line is written
            read = metrics.read_lines(lines)
            window = () if any("lr" in m and m["step"] == start for _, m in read) else window
        self.writer = metrics.Writer(workdir, feed.steps, board, start, trackers)
        self.sources, self.position = feed.names, feed.position
        self.counts = feed.task.counts
        self.due = lambda step: feed.due(step, section.log_every, "train.log_every")
        self.lr, self.flops, self._at, self.see = lr, flops, start, see
        # Not yet written: (step, [metrics on the device], seconds waited, seconds outside of here).
        known = [{k: math.nan if v is None else v for k, v in m.items()} for m in window]
        self._lines, self._window = list[tuple](), list[dict](known)
        self._waited = self._own = 0.0
        self._last = self._left = time.monotonic()

    def step(self, step: int, on_device: dict, waited: float) -> None:
        """Take the metrics of one step, and the seconds that it waited for its batch."""
        self._own += time.monotonic() - self._left
        self._window.append(on_device)
        self._at = step
        self._waited += waited
        if self.due(step):
            self._cut(step)
            while len(self._lines) > 1:
                self._write_line()
        self._left = time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Evaluation and saving inside this are not counted as training time."""
        while self._lines:
            self._write_line()
        self.writer.flush()
        # Wait for the steps still running, so that their time is theirs.
        self._window = jax.device_get(self._window)
        self.see(self._at - len(self._window) + 1, self._window)
        began = time.monotonic()
        yield
        self._left = time.monotonic()
        self._last += self._left - began

    def state(self) -> list[dict[str, float | None]]:
        """The metrics of the steps since the last line, for the checkpoint; None: not finite."""
        return finite([{k: float(v) for k, v in m.items()} for m in jax.device_get(self._window)])

    def close(self, rest: bool = True) -> None:
        """Write the lines left and close. rest: also one of the steps since the last line."""
        if self._window and rest:
            self._cut(self._at)
        while self._lines:
            self._write_line()
        self.writer.close()

    def _cut(self, step):
        self._lines.append((step, self._window, self._waited, self._own))
        self._window, self._waited, self._own = [], 0.0, 0.0

    def _write_line(self):
        step, window, waited, own = self._lines.pop(0)
        window = jax.device_get(window)  # waits until its last step is done
        self.see(step - len(window) + 1, window)
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        lag = window[-1].pop("lag", 0)
        values = {k: float(v) for k, v in window[-1].items() if k not in self.counts}
        values |= self._by_source(window, values) | self.position(step)
        values["lr"] = float(self.lr(step - 1 - lag))  # the rate that this step used
        values["skipped"] = sum(int(m.get("skipped", 0)) for m in window)
        values |= {f"{k}_per_s": sum(float(m[k]) for m in window) / seconds for k in self.counts}
        values["step_time"] = seconds / len(window)
        values["data_wait"] = waited / seconds
        # Here alone the loop waits for the devices, and through them for other processes.
        processes.told(values["step_time"], [waited / len(window), own / len(window)])
        mfu = metrics.mfu(self.flops, values["step_time"], jax.devices()[0].device_kind, jax.device_count())
        values |= {} if mfu is None else {"mfu": mfu}
        values["peak_memory"] = metrics.peak_memory()[0]
        self.writer.write(step, values)

    def _by_source(self, window, values):
        """A source may have no token in a step: its loss is the mean over the window's tokens."""
        out = {}
        for name in self.sources:
            counts = [float(m[f"trained_tokens/{name}"]) for m in window]
            losses = [float(m[f"loss/{name}"]) for m in window]
            out[f"trained_tokens/{name}"] = sum(counts)
            del values[f"loss/{name}"]
            if any(counts):
                out[f"loss/{name}"] = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
        return out
