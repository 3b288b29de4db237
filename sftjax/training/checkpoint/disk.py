"""The directory of checkpoints: which steps are there, what is set aside, what is deleted."""

import contextlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sftjax.errors import CheckpointError, NotFoundError
from sftjax.files import read_object
from sftjax.training.checkpoint import seal

PARTS = ("state/_METADATA", "extra/metadata")
# Names under which nothing whole lies: of a save, of a deletion, and of Orbax's own saves.
LEFT_BEHIND = (".saving-*", ".deleting-*", "*.orbax-checkpoint-tmp*")


def steps(directory: Path) -> dict[int, str]:
    """{step: what it lacks, "" = nothing} of all numbered folders, ascending; of no directory, none."""
    names = [d.name for d in directory.iterdir()] if directory.is_dir() else []
    found = dict[int, str]()
    for step in sorted(int(name) for name in names if name.isdecimal()):
        absent = [part for part in PARTS if not (directory / str(step) / part).exists()]
        found[step] = f"{', '.join(absent)} is missing" if absent else ""
    return found


def complete(directory: Path) -> list[int]:
    """The steps that lack nothing, ascending; one still being written is not among them."""
    return [step for step, lacks in steps(directory).items() if not lacks]


def best(directory: Path, among: Sequence[int], metric: str, lower: bool) -> int | None:
    """The step that scores best, of equals the latest; None where none was measured."""
    scores = dict[int, float]()
    for step in among:
        measured = read_object(directory / str(step) / "metrics" / "metrics")
        with contextlib.suppress(KeyError, TypeError, ValueError):  # it tracked another one
            scores[step] = float(measured[metric])
    known = [step for step, score in scores.items() if not math.isnan(score)]
    return max(known, key=lambda step: (-scores[step] if lower else scores[step], step), default=None)


def find(directory: Path, step: str, metric: str = "", lower: bool = True) -> int:
    """The step that "latest", "best" (by a metric: is less of it better) or a number names. Raises: NotFoundError."""
    whole = complete(directory)
    there = f"; complete steps in {directory}: {whole or 'none'}"
    if step == "latest" and whole:
        return whole[-1]
    if step.isdecimal() and int(step) in whole:
        return int(step)
    if step == "best":
        if not metric:
            raise NotFoundError(f"--step=best: the run has no eval.best to choose by{there}")
        found = best(directory, whole, metric, lower)
        if found is not None:
            return found
    raise NotFoundError(f"--step={step} is no checkpoint{there}; or take latest or best")


def sweep(directory: Path) -> None:
    """Delete what a killed run has left of saves and deletions."""
    for pattern in LEFT_BEHIND:
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def commit(written: Path, final: Path) -> None:
    """Seal a checkpoint that is written, and give it its number. Raises: OSError."""
    seal.seal(written)
    os.rename(written, final)
    seal.sync(final.parent)


def set_aside(directory: Path, step: int) -> str:
    """Rename a damaged checkpoint, so that it counts no more; returns its new name."""
    name, n = f"{step}.damaged", 1
    while (directory / name).exists():
        n += 1
        name = f"{step}.damaged-{n}"
    os.rename(directory / str(step), directory / name)
    seal.sync(directory)
    return name


def remove(directory: Path, unwanted: Sequence[int]) -> None:
    """Delete checkpoints, the number first; what can't be deleted is left to the next start."""
    for step in unwanted:
        hidden = directory / f".deleting-{step}"
        os.rename(directory / str(step), hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def none_is_whole(directory: Path, wrong: Mapping[int, str]) -> CheckpointError:
    """The error that says of every checkpoint why it can't be used."""
    lines = "\n".join(f"  step {step}: {text}" for step, text in sorted(wrong.items()))
    return CheckpointError(
        f"no checkpoint in {directory} can be used:\n{lines}\nNothing was changed. Put back intact"
        f" copies of their files, or move these folders away to begin again from step 0."
    )


def check_writable(directory: Path | str) -> None:
    """Create `directory` and a file in it. Raises: CheckpointError if that fails."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"sftjax")
    except OSError as e:
        raise CheckpointError(
            f"cannot write to {directory}: {e.strerror or e}. Choose a workdir on a disk that is writable and not full."
        ) from e


def reason(error: Exception) -> str:
    """An error on one line; of tensorstore's, which go on for pages, what the system said."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    text = (str(error).strip().splitlines() or [""])[0]
    named = not isinstance(error, (OSError, CheckpointError))
    return f"{type(error).__name__}: " * named + text[:300]
