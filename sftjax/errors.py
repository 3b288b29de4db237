"""What a user has to mend: every mistake that we can name is an error class of this file.

`exits.run` prints a UserError as one message, without a traceback. Any other error is a bug, of ours or of a library,
and keeps its traceback. Each class also derives from the built-in one that fits it, so that code which catches a
ValueError or an OSError goes on working.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

MESSAGE = 1800  # characters that are shown of a message, about
_LONG = re.compile(r"\S{300,}")


def shortened(message: str) -> str:
    """A message that quotes a file's or a user's text of any length, without most of that text.

    What has no blanks is cut first; then the middle: its beginning has the place, its end the fix.
    """
    if len(message) <= MESSAGE:
        return message
    message = _LONG.sub(lambda match: f"{match[0][:200]}…{match[0][-60:]}", message)
    if len(message) <= MESSAGE:
        return message
    left, right = message[: MESSAGE * 2 // 3], message[-MESSAGE // 3 :]
    return f"{left} … ({len(message) - len(left) - len(right):,} characters) … {right}"


class UserError(Exception):
    """What the user has to mend. The message says where, what is wrong and what to write."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class ConfigError(UserError, ValueError):
    """A config file, key or value that is wrong; the message says where and what to write."""


class ModelError(UserError, ValueError):
    """A model's config.json that we can't build, or a model that can't do what is asked."""


class WeightsError(UserError, ValueError):
    """Weights that are absent, damaged, or not those the model needs."""


class MeshError(UserError, ValueError):
    """A mesh, or an array on it, that cannot be laid out as asked."""


class TargetError(UserError, ValueError):
    """A target that does not exist, or that this machine can't compile for."""


class MetricError(UserError, TypeError):
    """A metric of the user's own loss that is not one number."""


class NotFoundError(UserError, FileNotFoundError):
    """A model, a file or a checkpoint that is not where the user says it is."""


class WriteError(UserError, OSError):
    """A place that can't be written."""


@contextlib.contextmanager
def writing(what: str, path: Path | str) -> Iterator[None]:
    """The system's errors inside become a WriteError; `what` is the option that names `path`."""
    try:
        yield
    except OSError as e:
        raise WriteError(f"{what} {path} cannot be written: {e.strerror or e}") from None


class LockedError(UserError, RuntimeError):
    """A workdir in which another run goes on; the message says which, and where its lock lies."""


class Stopped(KeyboardInterrupt):  # code that handles all errors lets this one through
    """A run that was asked to stop, and has; the message says where it stands."""

    status = 75  # the exit status, EX_TEMPFAIL of sysexits.h: the same command goes on later


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read; the message names the place and the fix."""


class DivergenceError(UserError, ArithmeticError):
    """A run whose losses, gradients or parameters are not finite, or far above what they were."""


class OutOfMemory(UserError, RuntimeError):
    """The devices' memory does not hold a step; the message says what may."""


class ProcessError(UserError, RuntimeError):
    """Processes of one run that did not find one another."""


class DataError(UserError, ValueError):
    """Data that can't be used, by its parts; the message names the file, the row and the fix.

    Attributes:
      where: the file and row, "file.jsonl:17", as the source's `where` gives it; the file alone if no single row is to
        blame; "" if a setting is.
      kind: a short name of the mistake, by which rows are counted.
      problem: what is wrong.
      fix: what to do about it; "" where the problem says that already.
      subject: what of the row is wrong, as it is written in a count: a field's name, in quotes.
    """

    def __init__(
        self, problem: str, fix: str = "", *, where: str | Path = "", kind: str = "", subject: str = ""
    ) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix
        self.where, self.kind, self.subject = str(where), kind, subject

    @property
    def reason(self) -> str:
        """The message without the place."""
        return f"{self.problem}; {self.fix}" if self.fix else self.problem

    @property
    def label(self) -> str:
        """The kind in words, for a count of rows: "missing field: 'completion'"."""
        words = self.kind.replace("_", " ") or "another reason"
        return f"{words}: {self.subject}" if self.subject else words

    def __str__(self) -> str:
        return shortened(f"{self.where}: {self.reason}" if self.where else self.reason)
