"""A trace of a few training steps, for TensorBoard, XProf or Perfetto."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sftjax.config import ConfigError


class Profiler:
    """Traces some steps, "10-12" or "10", to <workdir>/profile; numbers all of them."""

    def __init__(self, steps: str, workdir: Path, total: int) -> None:
        self.where, text = workdir / "profile", steps
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        self.first, self.last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        self.on = False
        if text and not 1 <= self.first <= self.last <= total:
            raise ConfigError(
                f"profile.steps={text!r}: expected the first and the last step to trace, such as"
                f" '10-12', from 1 to the run's {total}; '' = none"
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the call of step number `step`, the first being 1."""
        if self.first <= step <= self.last and not self.on:
            jax.profiler.start_trace(self.where)
            self.on = True
        with jax.profiler.StepTraceAnnotation("train_step", step_num=step):
            yield

    def end(self, step: int, result: Any) -> None:
        """After step number `step`; `result` is waited for where the trace ends with it."""
        if self.on and step >= self.last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End the trace, if one is on."""
        if self.on:
            jax.profiler.stop_trace()
            self.on = False
