"""The directory of checkpoints: which steps are there, what seals them, what is set aside, what is deleted.

files.json of a checkpoint has the size and checksum of every file in it. The checksum is zlib's CRC-32, which finds
accidents, releases the GIL and is twice as fast as SHA (1.8 GB/s a thread against 0.7). It does not keep out somebody
who forges a checkpoint.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sftjax.errors import CheckpointError, NotFoundError
from sftjax.files import read_json, read_object

PARTS = ("state/_METADATA", "extra/metadata")
# Names under which nothing whole lies: of a save, of a deletion, and of Orbax's own saves.
LEFT_BEHIND = (".saving-*", ".deleting-*", "*.orbax-checkpoint-tmp*")
NAME = "files.json"
THREADS = 4  # files read at a time
PIECE = 1 << 22  # bytes


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


def set_aside(directory: Path, step: int) -> str:
    """Rename a damaged checkpoint, so that it counts no more; returns its new name."""
    name, n = f"{step}.damaged", 1
    while (directory / name).exists():
        n += 1
        name = f"{step}.damaged-{n}"
    os.rename(directory / str(step), directory / name)
    sync(directory)
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


# ---- the seal ------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Write files.json, once every file is read back and on the disk itself. Raises: OSError."""
    paths = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda path: measure(path, sync=True), paths))
    known = {str(path.relative_to(folder)): entry for path, entry in zip(paths, found, strict=True)}
    with open(folder / NAME, "w", encoding="utf-8") as f:
        json.dump({"checksum": "crc32", "files": known}, f, indent=0, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    for directory, *_ in os.walk(folder):
        sync(Path(directory))


def damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the files of a checkpoint, on one line; "" = nothing.

    part, parts: of several processes each reads the files of its part, and all look at the names.
    """
    if not (folder / NAME).exists():
        return f"{NAME} is missing"
    try:
        said = read_json(folder / NAME, CheckpointError)["files"]
        known = {str(name): (int(size), int(checksum)) for name, (size, checksum) in said.items()}
    except (CheckpointError, ValueError, TypeError, KeyError, AttributeError):
        return f"{NAME} is damaged"
    there = {str(path.relative_to(folder)) for path in _files(folder)}
    wrong = {name: "is missing" for name in known.keys() - there}
    wrong |= {name: "does not belong there" for name in there - known.keys()}
    names = sorted(known.keys() & there)[part::parts]

    def compare(name):
        try:
            size, checksum = measure(folder / name)
        except OSError as e:
            return f"cannot be read: {e.strerror or e}"
        if size != known[name][0]:
            return f"has {size:,} bytes instead of {known[name][0]:,}"
        return "" if checksum == known[name][1] else "has another checksum"

    with ThreadPoolExecutor(THREADS) as pool:
        wrong |= {n: text for n, text in zip(names, pool.map(compare, names), strict=True) if text}
    lines = [f"{name} {text}" for name, text in sorted(wrong.items())]
    return ", ".join(lines[:3]) + (f", and {len(lines) - 3} more" if len(lines) > 3 else "")


def sync(directory: Path) -> None:
    """Have a folder's names on the disk. Raises: OSError."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder) -> list[Path]:
    """All files below a folder but files.json."""
    return [path for path in sorted(folder.rglob("*")) if path != folder / NAME and not path.is_dir()]


def measure(path: Path, sync: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = checksum = 0
    with open(path, "rb") as f:
        while piece := f.read(PIECE):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
        if sync:
            os.fsync(f.fileno())
    return size, checksum
