"""What a run is: its data, tokenizer, template and model; what differs on resumption."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sftjax.errors import CheckpointError
from sftjax.files import read_json, write_atomic
from sftjax.training.log import warn


def sha256(text: str) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def version(name: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return None


def check_manifest(directory: Path | str, manifest: Mapping) -> None:
    """Claim `directory` for the manifest's identity, or raise CheckpointError if it has another.

    manifest, as JSON holds it: "identity", flat {name: value} of what must not change in one directory, and what
    explains a difference in it: "data" and "evaluation", each {name: facts_of(...)}, "hashes" {name: sha256}, "steps".
    """
    path = Path(directory) / "manifest.json"
    old = read_manifest(path) if path.exists() else {}
    if old:
        _check(directory, old, manifest)
        # What an earlier version did not note is not known, and not refused either.
        manifest = {**manifest, "identity": manifest["identity"] | old["identity"]}
    if jax.process_index() == 0 and old != manifest:
        write_atomic(path, json.dumps(manifest, indent=2))


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest.json. Raises: CheckpointError for one that is torn, with what to do."""
    fix = (
        "Put back an intact copy. If you are sure that data and model are those of the run, delete"
        " it: the next start writes it anew."
    )
    try:
        found = read_json(path, CheckpointError)
    except CheckpointError as e:
        raise CheckpointError(f"{e}. {fix}") from None
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise CheckpointError(f"{path} is damaged: it is no object with an 'identity'. {fix}")
    return found


def _check(directory, old, new):
    was, now = old["identity"], new["identity"]
    if differing := [k for k in sorted(was.keys() & now.keys()) if was[k] != now[k]]:
        lines = changes(old, new)
        if not lines:
            lines = [f"{k}: {was[k]!r} there, {now[k]!r} now" for k in differing]
            if differing == ["tokenised data"]:
                same = "the files, tokenizer and template are the same"
                lines.append(f"{same}: this version of sftjax makes something else of them")
        text = "\n".join(f"  {line}" for line in lines)
        raise CheckpointError(
            f"{directory} holds checkpoints of another run:\n{text}\n"
            "Use another workdir, or put back what differs to resume that run."
        )
    steps = (facts.get("steps") for facts in (old, new))
    before, after = (n if isinstance(n, int) else 0 for n in steps)
    if 0 < after < before:
        raise CheckpointError(
            f"{directory} holds checkpoints of a run of {before} steps, and this one has {after}: train.duration may"
            " grow, not shrink. Set it back, or use another workdir."
        )
    if sets := _compared(old.get("evaluation"), new.get("evaluation")):
        warn("evaluation is by other rows from now on, so its metrics may differ: " + "; ".join(sets))


def changes(old: Mapping, new: Mapping) -> list[str]:
    """A line for each source, and each of "hashes", that differs between two manifests."""
    lines = _compared(old.get("data"), new.get("data"))
    was, now = old.get("hashes"), new.get("hashes")
    if isinstance(was, dict) and isinstance(now, dict):
        lines += [f"{name} is another" for name in sorted(was.keys() & now.keys()) if was[name] != now[name]]
    return lines


def _compared(old, new) -> list[str]:
    """Lines about sources {name: facts}; none where an earlier version noted nothing."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            lines.append(f"{name}: {'new' if name in new else 'not there any more'}")
            continue
        try:
            text = compare(old[name], new[name])
        except (KeyError, TypeError, ValueError, AttributeError):
            text = "what manifest.json says of it is damaged"
        if text:
            lines.append(f"{name}: {text}")
    return lines


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two results of `facts_of`, by file and row; "" = nothing."""
    was, now = ({f["name"]: f for f in facts["files"]} for facts in (old, new))
    before, after = _rows(old), _rows(new)
    if before is None or after is None:
        same = [[f["sha256"] for f in x["files"]] + [x["rows"]] for x in (old, new)]
        return "" if same[0] == same[1] else _by_file(was, now)
    if np.array_equal(before, after):
        return ""
    # Are they all rows of their files, one file after the other?
    whole = all(x["rows"] == sum(f["rows"] for f in x["files"]) for x in (old, new))
    if whole and len(was) > 1:
        parts = _by_file(was, now, _parts(was, before), _parts(now, after))
        return parts or "the same files in another order"
    text = compare_rows(before, after)
    return f"{next(iter(now))}: {text}" if len(now) == 1 else f"{text} ({_by_file(was, now)})"


def compare_rows(old: np.ndarray, new: np.ndarray) -> str:
    """How uint32 [rows], hashes, differ: "42 rows instead of 30, the first difference at row 31"; "" = nothing."""
    n = min(len(old), len(new))
    first = next(iter(np.flatnonzero(old[:n] != new[:n])), n)
    if first == len(old) == len(new):
        return ""
    counts = f"{len(new):,} rows instead of {len(old):,}, " * (len(old) != len(new))
    return f"{counts}the first difference at row {first + 1}"


def _rows(facts) -> np.ndarray | None:
    """The hashes of a source's rows; None where the cache that had them is gone."""
    try:
        return np.load(Path(facts["store"]) / "rows.npy") if facts["store"] else None
    except (OSError, ValueError):
        return None


def _parts(files, rows) -> dict[str, np.ndarray]:
    ends = np.cumsum([f["rows"] for f in files.values()])
    return dict(zip(files, np.split(rows, ends[:-1]), strict=True))


def _by_file(was, now, before=None, after=None) -> str:
    """What differs by file: by rows if they are given for each, else by sizes and hashes."""
    parts = []
    for name in sorted(was.keys() & now.keys()):
        if before and after:
            text = compare_rows(before[name], after[name])
            parts += [f"{name}: {text}"] if text else []
        elif was[name]["rows"] != now[name]["rows"]:
            parts.append(f"{name} has {now[name]['rows']:,} rows instead of {was[name]['rows']:,}")
        elif was[name]["sha256"] != now[name]["sha256"]:
            sizes = f"{was[name]['bytes']:,} bytes there, {now[name]['bytes']:,} now"
            parts.append(f"{name} was edited ({sizes})")
    parts += [f"{name} is new" for name in sorted(now.keys() - was.keys())]
    parts += [f"{name} is not there any more" for name in sorted(was.keys() - now.keys())]
    return "; ".join(parts) or ("" if before else "other rows of the same files")
