"""Steps that went wrong: not finite, or with a loss far above those before it.

The step itself has skipped the update of one that is not finite. Here it is counted and written down, with metrics that
were fetched for the log anyway, and so a log interval late: docs/runs.md.
"""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sftjax import params as params_lib
from sftjax.errors import CheckpointError, DivergenceError, writing
from sftjax.files import finite
from sftjax.step import TrainState
from sftjax.terminal import warn
from sftjax.training.checkpoint import Checkpointer
from sftjax.training.data import Feed
from sftjax.training.log import say

WINDOW, FEWEST = 128, 32  # losses that a spike is held against, at most and at least
ROLLBACKS = 3  # in one run
SHOWN = 10  # bad steps that have a line each; the others are counted


class Health:
    """Watches the metrics of every step. What `record` gives goes into the checkpoint.

    Attributes:
      state: skipped (updates), spikes, rollbacks; lag, by how many updates the optimizer is behind the step, as skipped
        ones and those rolled back do not count in it.
      ill: (what the config wants done, message), once too many bad steps came in a row; else None.
      sound: was the last step that was seen finite; else no checkpoint is made.
    """

    def __init__(self, section: ConfigDict, workdir: Path, feed: Feed, state: Mapping | None = None) -> None:
        """section: the config's `train`."""
        self.feed, self.path = feed, workdir / "suspects.jsonl"
        self.most, self.spike = section.bad_steps, section.spike
        self.how = dict(nonfinite=section.on_nonfinite, spike=section.on_spike)
        self.state = dict(state or dict(skipped=0, spikes=0, rollbacks=0, lag=0))
        self.losses = deque[float](self.state.pop("losses", ()), WINDOW)
        self.streak, self.trouble = self.state.pop("streak", (0, ""))
        self.sound = True
        self.ill: tuple[str, str] | None = None

    def see(self, first: int, window: Sequence[dict[str, Any]]) -> None:
        """Take the metrics of the steps from `first` on; each gets the `lag` before it."""
        for step, metrics in enumerate(window, first):
            if "lag" in metrics:
                continue
            metrics["lag"] = self.state["lag"]
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            self.sound = not metrics["skipped"] and math.isfinite(loss)
            if not self.sound:
                self.state["skipped"] += 1
                self.state["lag"] += 1
                self._bad(step, "nonfinite", loss, norm, "its update was skipped")
            elif over := self._over(loss):
                self.state["spikes"] += 1
                self._bad(step, "spike", loss, norm, f"expected less than {over:.4g}")
            else:
                self.streak = 0
                self.losses.append(loss)

    def record(self) -> dict[str, Any]:
        """All that a resumed run judges its steps by, as JSON holds it."""
        return self.state | {"losses": list(self.losses), "streak": [self.streak, self.trouble]}

    def _over(self, loss) -> float:
        """The limit that a loss is over; 0 where it is not."""
        if not self.spike or len(self.losses) < FEWEST:
            return 0.0
        limit = fmean(self.losses) + self.spike * pstdev(self.losses)
        return limit if loss > limit else 0.0

    def _bad(self, step, reason, loss, norm, what):
        self.streak, self.trouble = self.streak + 1 if self.trouble == reason else 1, reason
        how = self.how[reason]
        if self.streak >= self.most and how != "log" and not self.ill:
            self.ill = (how, self._message(step))
        line = finite({"step": step, "reason": reason, "loss": loss, "grad_norm": norm})
        line["documents"] = self.feed.documents(step)
        if jax.process_index() == 0:
            with writing("the file", self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            if self.state["skipped"] + self.state["spikes"] <= SHOWN:
                name = "not finite" if reason == "nonfinite" else "a spike"
                text = f"step {step} is {name}: loss {loss:.4g}, gradient norm {norm:.4g}; {what}"
                warn(f"{text}; its documents are in {self.path}")

    def mend(self, state: TrainState, step: int, target: TrainState, checkpoints: Checkpointer) -> TrainState:
        """Roll back: the newest checkpoint's state as that of `step`; the data after it come next.

        state: the present one, whose buffers are given up. target: see Checkpointer.restore. Raises: DivergenceError
        where the config says stop, or this can't be done (again).
        """
        assert self.ill, "only after too many bad steps"
        newest, (how, message) = checkpoints.latest_step(), self.ill
        if how == "stop":
            end(message, checkpoints)
        if newest is None or self.state["rollbacks"] == ROLLBACKS:
            why = "there is no checkpoint" if newest is None else f"it was, {ROLLBACKS} times"
            end(f"{message}\nIt can't be rolled back: {why}.", checkpoints)
        at = state.step.copy()
        jax.tree.map(lambda x: x.delete(), state if checkpoints.frozen else dataclasses.replace(state, frozen=None))
        restored, extra = checkpoints.restore(target, state.frozen)
        self.state["rollbacks"] += 1
        self.state["lag"] = step - newest + extra["health"]["lag"]
        self.streak, self.ill, self.losses, self.sound = 0, None, deque(maxlen=WINDOW), True
        say("rollback", f"to step {newest}; it goes on with the data after step {step}")
        return dataclasses.replace(restored, step=at)

    def finish(self, step: int, checkpoints: Checkpointer) -> None:
        """Raises: DivergenceError if the last step was not finite, or a stop was still to come."""
        if self.ill or not self.sound:
            end(self.ill[1] if self.ill else self._message(step), checkpoints)

    def may_save(self, step: int, state: TrainState) -> bool:
        """Is nothing to be mended, and all of the last step and its state finite; says if not."""
        if self.ill:
            return False
        what = "its loss or gradient"
        if self.sound:
            names = not_finite(state)
            if not names:
                return True
            what = f"{', '.join(names[:3])} of its state"
        warn(f"no checkpoint of step {step}: {what} is not finite")
        return False

    def check(self, state: TrainState, what: str) -> None:
        """Raises: DivergenceError if any number of the state is not finite; see `not_finite`."""
        if names := not_finite(state):
            raise DivergenceError(f"{what}: not finite in {len(names)} arrays: {', '.join(names[:5])}")

    def _message(self, step):
        counts = f"{self.state['skipped']} of {step} updates were skipped"
        if self.trouble == "spike":
            what = f"the losses of {self.streak} steps in a row are far above those before"
        else:
            what = f"the loss or gradient is not finite in {self.streak} steps in a row"
        return (
            f"step {step}: {what}; {counts}. The documents are in {self.path}.\n"
            "Nothing is exported, and the checkpoints are of finite states. Lower optim.lr, set optim.clip, look at the"
            " documents, or set train.on_nonfinite (on_spike) to rollback; --debug.nan names the first operation that"
            " makes a NaN."
        )


def end(message: str, checkpoints: Checkpointer) -> NoReturn:
    """Raise DivergenceError, once the save under way, which is of a finite state, is on disk."""
    try:
        checkpoints.wait()
    except CheckpointError as e:
        warn(e)
    raise DivergenceError(message)


def not_finite(tree: Any) -> list[str]:
    """The names of a tree's arrays of floats that hold a number which is not finite."""
    named = {name: x for name, x in params_lib.named_leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)}
    return [name for name, ok in jax.device_get(_finite(named)).items() if not ok]


@jax.jit  # here, so that it is compiled once and not at every save
def _finite(named):
    return {name: jnp.isfinite(x).all() for name, x in named.items()}
