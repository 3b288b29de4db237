"""Which files of a folder are data: their splits and configurations, as on the Hugging Face hub.

A split's name is matched by whole parts of a path: "train" is in "train-00000-of-00001.parquet" and in "train/0.jsonl",
not in "training_notes.jsonl" or "pretrain.jsonl".
"""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from sftjax.data.records.images import below, is_image
from sftjax.data.records.readers import COMPRESSED, READERS
from sftjax.errors import DataError
from sftjax.files import read_object

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
# What `datasets` writes beside the data.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SHARD = re.compile(r"(.+?)-\d+-of-\d+(?:-[0-9a-f]+)?")  # train_sft-00000-of-00003-a3ecf92756993583

Files = dict[str, list[Path]]  # by split; "" of those that no split claims


def kind(path: PurePath) -> str:
    """The suffix that says how a file is read: ".parquet", ".jsonl.gz"."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffixes[-1:]).lower()


def data_files(folder: Path) -> list[Path]:
    """All data files below a folder; of one that `datasets` saved, those that it names."""
    found: dict[Path, None] = {}
    saved = functools.cache(_saved)
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.name in METADATA or kind(path) not in READERS or path.is_dir():
            continue
        own = saved(path.parent)
        found |= dict.fromkeys([path] if own is None else own)
    return list(found)


def _saved(folder) -> list[Path] | None:
    """The files that `save_to_disk` names, in order; None of a folder that it did not write."""
    state = read_object(folder / "state.json")
    named = state.get("_data_files")
    if not isinstance(named, list):
        return None
    if state.get("_indices_data_files"):
        problem = "a saved data set with a mapping of indices, which is not read"
        raise DataError(problem, "save it again after flatten_indices()", where=folder, kind="unreadable")
    names = [f.get("filename") for f in named if isinstance(f, dict)]
    files = [folder / PurePath(name).name for name in names if isinstance(name, str)]
    if missing := [f for f in files if not f.is_file()]:
        raise DataError(f"state.json names {missing[0].name}, which is not there", where=folder, kind="no_file")
    return files


# --- splits -------------------------------------------------------------------------------------


def split_of(path: PurePath) -> str:
    """Which split a path tells, relative to its data set; "" if it tells none."""
    stem = path.name.partition(".")[0]
    shard = SHARD.fullmatch(stem)
    if shard and _keyword(shard[1]):
        return shard[1]
    return next(filter(None, map(_keyword, (stem, *path.parts[-2::-1]))), "")


def _keyword(part):
    return next((w for w in re.split(r"[^a-z]+", part.lower()) if w in SPLITS), "")


def is_of(path: PurePath, split: str) -> bool:
    """Is a path, relative to its data set, of this split?"""
    stem = path.name.partition(".")[0]
    if split in path.parts[:-1] or split_of(path) == split:
        return True
    if shard := SHARD.fullmatch(stem):
        return shard[1] == split
    edges = ["[^\\W_]" if c.isdigit() else r"[^\W\d_]" for c in (split[0], split[-1])]
    return bool(re.search(rf"(?<!{edges[0]}){re.escape(split)}(?!{edges[1]})", stem))


# --- configurations -----------------------------------------------------------------------------


def configurations(folder: Path, files: Sequence[Path], guess: bool = False) -> dict[str, Files]:
    """{name: files by split} of a data set's configurations; {} where it names none.

    They stand in README.md, or in dataset_infos.json and are folders. guess: folders in which files have the same names
    are configurations, too.
    """
    if named := _of_card(folder, files):
        return named
    relative = {f: f.relative_to(folder) for f in files}
    names = [name for name in read_object(folder / "dataset_infos.json") if name]
    by_name = {n: [f for f in files if n in relative[f].parts[:-1]] for n in names}
    if len(names) > 1 and all(by_name.values()):
        return {name: {"": own} for name, own in by_name.items()}
    tops = dict.fromkeys(p.parts[0] for p in relative.values() if len(p.parts) > 1)
    by_top = {t: [f for f in files if relative[f].parts[0] == t] for t in tops}
    below = [{relative[f].parts[1:] for f in own} for own in by_top.values()]
    together = sum(map(len, by_top.values())) == len(files)
    twice = any(a & b for n, a in enumerate(below) for b in below[:n])
    if guess and together and twice and not any(map(_keyword, tops)):
        return {name: {"": own} for name, own in by_top.items()}
    return {}


def _of_card(folder, files) -> dict[str, Files]:
    """What the head of README.md says."""
    from huggingface_hub import metadata_load  # only folders with a card need it

    card = folder / "README.md"
    try:
        head: Any = metadata_load(card) if card.is_file() else None
    except Exception:  # no YAML, or a form of it that we do not know: as if there were none
        head = None
    entries = head.get("configs") if isinstance(head, dict) else None
    found: dict[str, Files] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("config_name"), str):
            found[entry["config_name"]] = _of_entry(folder, files, entry)
    return found


def _of_entry(folder, files, entry) -> Files:
    given, below = entry.get("data_files"), entry.get("data_dir")
    base = f"{below.strip('/')}/" if isinstance(below, str) else ""
    if given is None:
        return {"": [f for f in files if f.relative_to(folder).as_posix().startswith(base)]}
    found: Files = {}
    for one in given if isinstance(given, list) else [given]:
        split, patterns = "train", one
        if isinstance(one, dict):
            split, patterns = str(one.get("split", "train")), one.get("path", [])
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            rule = glob_rule((base + str(pattern)).removeprefix("./").rstrip("/"))
            found.setdefault(split, []).extend([f for f in files if rule.match(f.relative_to(folder).as_posix())])
    return found


def glob_rule(pattern: str) -> re.Pattern[str]:
    """A glob of the hub as a regular expression: `*` stays in a folder, `**` does not; a folder means all in it."""
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    body = "".join(special.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    return re.compile(rf"{body}(?:/.*)?\Z")


# --- what is asked for --------------------------------------------------------------------------


def chosen(repo: str, folder: Path, asked: str) -> list[Path]:
    """The files of a hub data set for "config", "config/split", "split" or "" (train).

    Raises: DataError, which lists what there is, if that is not told or not there.
    """
    files = data_files(folder)
    named = configurations(folder, files, guess=True)
    first, _, split = asked.partition("/")
    if len(named) > 1:
        if first not in named:
            what = f"no configuration {first!r}" if first else "it has several configurations"
            raise DataError(
                f"{what}; the configurations are: {', '.join(named)}",
                f"write {repo}:CONFIGURATION or {repo}:CONFIGURATION/SPLIT",
                where=repo,
                kind="no_configuration",
            )
        own = named[first]
    else:
        only, own = next(iter(named.items()), ("default", {"": files}))
        if split and first != only:
            problem = f"no configuration {first!r}; its only one is {only!r}"
            raise DataError(problem, where=repo, kind="no_configuration")
        if not split and not (first == only and first not in own and not _split(folder, own, first)):
            split = first
    found = _split(folder, own, split or "train", plain=not split)
    if not found:
        names = [f.relative_to(folder).as_posix() for part in own.values() for f in part]
        splits = sorted(filter(None, own)) or sorted(names)[:8]
        problem = f"no file of split {split or 'train'!r}; it holds: {', '.join(splits)}"
        raise DataError(problem, where=repo, kind="no_file")
    return found


def _split(folder, own: Files, split, plain=False) -> list[Path]:
    """The files of a split; plain: where no file is of it, those that tell no split."""
    if split in own or "" not in own:
        return own.get(split, [])
    relative = {f: f.relative_to(folder) for f in own[""]}
    if plain:
        told = {f: split_of(path) for f, path in relative.items()}
        wanted = split if split in told.values() else ""
        return [f for f in told if told[f] == wanted]
    return [f for f, path in relative.items() if is_of(path, split)]


def of_folder(folder: Path) -> list[Path]:
    """All data files of a folder of the user's. Raises: DataError if they are of several sets."""
    files = data_files(folder)
    if not files and any(map(is_image, below(folder))):
        return [folder]  # of images, see records/images.py
    if not files:
        raise DataError(f"no data file in this folder (known: {', '.join(READERS)})", where=folder, kind="no_file")
    named = [name for name, own in configurations(folder, files).items() if any(own.values())]
    if len(named) > 1:
        problem = f"{folder} holds several configurations ({_some(named)})"
        raise DataError(problem, "name the folder or the files to use", kind="mixed_splits")
    if len({split_of(f.relative_to(folder)) for f in files}) > 1:
        problem = f"{folder} holds several splits ({_some(f.name for f in files)})"
        raise DataError(problem, "name the files to use", kind="mixed_splits")
    return files


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(dict.fromkeys(names))[:8])
