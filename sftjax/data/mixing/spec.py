"""What the config says of several sources: which they are, and how much each gives, in phases.

A share is a share of tokens, all of them, trained or not: it is what a model reads that is mixed.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax.config import ConfigError
from sftjax.data.packing.rows import Store


class Share(NamedTuple):
    """An entry of data.sources. Of weight, count and replay at most one is given."""

    name: str
    config: ConfigDict  # the run's config, as if this were its only source
    weight: float | None = None  # its share of the tokens, beside the other weights
    count: int = 0  # type: ignore[assignment] # its documents in a cycle; tuple has a method count
    replay: float = 0.0  # its share of all tokens in every phase; the others keep their proportions


def sources(config: ConfigDict) -> list[Share]:
    """The entries of data.sources, or data.train as the only one. Raises: ConfigError."""
    d = config.data
    if d.train and d.sources:
        raise ConfigError("data.train and data.sources are both set; keep one of them")
    if not d.train and not d.sources:
        raise ConfigError("data.train is empty; give a file, a glob or a hub data set id")
    found = [_source(config, i, entry) for i, entry in enumerate(d.sources)] or [Share("train", config)]
    mixing = d.phases or d.temperature != 1 or found[0].count or found[0].replay
    if len(found) == 1 and mixing:
        raise ConfigError("phases, temperature, count and replay mix several data.sources, but there is one")
    names = [s.name for s in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"data.sources: two are called {twice[0]!r}; set their 'name'")
    if sum(s.replay for s in found) >= 1:
        raise ConfigError("data.sources: the replay shares add up to 1 or more")
    return found


def _source(config, i, entry) -> Share:
    what, keys = f"data.sources[{i}]", ("path", "name", *Share._fields[2:], *config_lib.OWN)
    _check_keys(what, entry, keys)
    if not entry.get("path"):
        raise ConfigError(f"{what} has no 'path': a file, a glob or a hub data set id")
    for key in ("path", "name"):
        if not isinstance(entry.get(key, ""), str):
            raise ConfigError(f"{what}: {key}={entry[key]!r}; expected text")
    name = entry.get("name") or Path(entry["path"].split(",")[0]).name.split(".")[0]
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"{what}: set a 'name' of letters, digits, _ and -; {name!r} is none")
    own = _alone(config, what, entry)
    source = Share(name, own, entry.get("weight"), entry.get("count", 0), entry.get("replay", 0.0))
    amounts = dict(weight=source.weight or 0, count=source.count, replay=source.replay)
    given = [key for key, amount in amounts.items() if amount]
    if len(given) > 1:
        raise ConfigError(f"{what} has {given[0]} and {given[1]}; a source has one of them")
    _check_amounts(what, amounts)
    return source


def _alone(config, what, entry):
    """The config as it would be if this entry's rows were all of data.train."""
    alone = config.copy_and_resolve_references()
    alone.data.update(dict(train=entry["path"], sources=(), phases=(), temperature=1.0))
    for key, value in ((k, v) for k, v in entry.items() if k in config_lib.OWN):
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, part_value in inner:
            config_lib.override(alone, f"data.{key}.{part}".rstrip("."), str(part_value), f"{what}: ")
    return alone


def _check_keys(what, entry, known):
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{what} is {entry!r}; expected a dict with {', '.join(known)}")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{what} has an unknown key {key!r}; {hint}")


def _check_amounts(what, amounts):
    for name, value in amounts.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < 2**63:
            raise ConfigError(f"{what}: {name}={value!r}; expected a number, 0 or more")


class Phase(NamedTuple):
    """What each source gives in a cycle."""

    until: str  # the duration at which it ends; "" = with the run
    amounts: np.ndarray  # float64 [sources]: tokens, or documents where counted
    counted: np.ndarray  # bool [sources]


def phases(config: ConfigDict, sources: Sequence[Share], stores: Sequence[Store]) -> list[Phase]:
    """The phases of data.phases, or the one that the sources describe. Raises: ConfigError.

    A cycle has as many tokens as the sources with a weight hold together, divided by the weights; in addition the
    counted documents; and of replay sources what makes their share. Sources without a weight share these tokens by
    (their own tokens) ** (1 / data.temperature), so at temperature 1 a cycle is every document once.
    """
    entries: Sequence[Mapping] = config.data.phases or ({},)
    return [_phase(config, i, entry, sources, stores) for i, entry in enumerate(entries)]


def _phase(config, i, entry, sources, stores):
    what, temperature = f"data.phases[{i}]", config.data.temperature
    last = i == max(len(config.data.phases), 1) - 1
    _check_keys(what, entry, ("until", "weights", "counts"))
    if last == ("until" in entry):
        raise ConfigError(f"{what}: every phase but the last has an 'until', such as '30%'")
    tokens = np.array([store.lengths.sum(dtype=np.int64) for store in stores])
    mean = tokens / [len(store.lengths) for store in stores]
    plain = [s for s in sources if not s.replay]
    weights, counts = entry.get("weights"), entry.get("counts")
    if weights is None and counts is None:
        counts = {s.name: s.count for s in plain if s.count}
        weights = {s.name: s.weight for s in plain if not s.count}
        what = "data.sources" if not config.data.phases else what
    for key, given in (("weights", weights), ("counts", counts)):
        if not isinstance(given or {}, Mapping):
            raise ConfigError(f"{what}: {key}={given!r}; expected {{source: number}}")
    weights, counts = dict(weights or {}), dict(counts or {})
    _check_keys(what, weights | counts, [s.name for s in plain])
    if both := weights.keys() & counts.keys():
        raise ConfigError(f"{what}: {min(both)!r} has a weight and a count; keep one of them")
    if len(unset := [name for name, w in weights.items() if w is None]) == len(weights):
        by_name = {s.name: t for s, t in zip(sources, tokens, strict=True)}
        weights = {name: float(by_name[name]) ** (1 / temperature) for name in weights}
    elif unset:
        raise ConfigError(f"{what}: {unset[0]!r} has no weight, but others do; give all or none")
    elif temperature != 1:
        raise ConfigError(f"data.temperature={temperature} makes weights out of sizes, but {what} sets weights")
    _check_amounts(what, weights | counts)
    column = lambda values: np.array([float(values.get(s.name, 0)) for s in sources])  # noqa: E731
    weight, count = column(weights), column(counts)
    if not (weight + count).any():
        raise ConfigError(f"{what}: no source but those for replay gives anything")
    amounts = tokens[weight > 0].sum() * weight / max(weight.sum(), 1e-300)
    replay = np.array([s.replay for s in sources])
    total = (amounts + count * mean).sum() / (1 - replay.sum())
    amounts = amounts + replay * total
    # Whole tokens: what a source holds is then met exactly, without the next document.
    amounts = np.where(amounts < 1, amounts, np.rint(amounts))
    return Phase(entry.get("until", ""), np.where(count > 0, count, amounts), count > 0)
