"""Show what is trained: `sftjax inspect --config=FILE [--format=html --out=page.html]`.

For the first 5 rows of each source: the text with its trained spans marked and, under it, each token with its id,
weight, segment and position in a packed row. Then totals over the whole set. Nothing is trained.

  --n=20 --start=100  so many rows of each source, from this one on (the first is 0)
  --set=validation    train | validation | test
  --source=NAME       one source only: a name in data.sources, or the stem of a validation file
  --min_trained=0.1 --max_trained=0.5   rows of whose tokens this share is trained
  --dropped           rows that are lost: to data.clean, to data.overlong, or as nothing is trained
  --dropped=REASON    those lost for one reason
  --format=html       one file for a browser, with filters, to be sent around; also: json
"""

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax.data import DataError, Rows, pack
from sftjax.data.records.images import as_url
from sftjax.errors import writing
from sftjax.evaluation.sets import tokenised
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.inspect_data.rows import Wanted, parts_of, wanted_rows
from sftjax.inspect_data.views import COLUMNS, VIEWS
from sftjax.terminal import show


def main(argv: Sequence[str]) -> None:
    """Run the command line of `argv`, without the program's name."""
    argv = ["--dropped=any" if arg == "--dropped" else arg for arg in argv]
    config, flags = config_lib.parse(argv, format="terminal", set="train", out="", **Wanted()._asdict())
    wanted = Wanted(*(getattr(flags, name) for name in Wanted._fields))
    if flags.format not in VIEWS:
        raise DataError(f"--format={flags.format}: expected {' | '.join(VIEWS)}", kind="setting")
    report = collect(config, wanted, flags.set)
    # Damaged text may hold what UTF-8 can't: shown as its escape.
    page = VIEWS[flags.format](report, not flags.out).encode("utf-8", "backslashreplace")
    if flags.out:
        with writing("--out", flags.out):
            Path(flags.out).write_bytes(page)
        show(f"written to {flags.out}")
        if report["problem"]:
            raise DataError(report["problem"])
    else:
        sys.stdout.write(page.decode("utf-8"))
        if report["problem"]:  # it is in what was shown
            sys.exit(1)


def collect(config: ConfigDict, wanted: Wanted, set: str = "train") -> dict[str, Any]:
    """What the views show, of plain values; the config's tokenizer is read, not its model.

    {"set", "problem": what training would raise, "sources": {name: totals}, "totals", "examples", "warnings"}. Raises:
    DataError for a bad row among those looked at, or an option there is not.
    """
    wanted.check()
    if set not in ("train", "validation", "test"):
        raise DataError(f"--set={set}: expected train | validation | test", kind="setting")
    with _warnings() as warnings, tempfile.TemporaryDirectory() as temporary:
        tokenizer = load_tokenizer(config)
        cache = config.data.cache_dir or temporary  # where training's cache is not named
        parts = parts_of(config, set, wanted.source, tokenizer, cache)
        examples = [e for part in parts for e in _examples(part, wanted, tokenizer)]
        totals, problem = {}, ""
        for part in parts:
            try:
                totals[part.name] = _totals(part, cache)
            except DataError as error:
                problem = str(error)
    name = config.data[set] or config.data.train or ", ".join(part.name for part in parts)
    return dict(
        set=f"{name} (a sample)" if set == "train" and config.data.streaming else name,
        problem=problem,
        sources=totals,
        totals=_sum(totals.values()),
        examples=examples,
        warnings=list(dict.fromkeys(warnings)),
    )


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is logged as a warning meanwhile; where it is shown, it still is."""
    found: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        found.append(record.getMessage())
        return True

    logger = logging.getLogger("sftjax")
    logger.addFilter(note)
    try:
        yield found
    finally:
        logger.removeFilter(note)


def _examples(part, wanted, tokenizer) -> list[dict]:
    """Rows with their tokens, packed as training packs; here only these few."""
    data, rows = part.config.data, list(islice(wanted_rows(part, wanted), wanted.n))
    docs = [(row, indices) for row in rows for indices in row.kept]
    packed = pack([len(indices) for _, indices in docs], data.max_length, data.packing)
    # A token that is cut away has no place.
    places = {id(row): np.full((len(row.example.tokens), 2), None) for row in rows}
    for pieces in packed:
        for segment, (doc, start, stop) in enumerate(pieces, 1):
            row, indices = docs[doc]
            at = indices[start:stop]
            places[id(row)][at, 0], places[id(row)][at, 1] = segment, np.arange(len(at))
    return [_example(part.name, row, places[id(row)].tolist(), tokenizer) for row in rows]


def _example(name, row, places, tokenizer):
    ids, weights = row.example.tokens.tolist(), row.example.weights.tolist()
    image = getattr(row.example, "image", np.zeros(len(ids), np.int32))
    counts = (f"image {i}: {n} tokens" for i, n in enumerate(np.bincount(image)) if i)
    shown = [i for i, n in enumerate(image) if not n or i in (0, len(ids) - 1) or len({*image[i - 1 : i + 2]}) > 1]
    tokens = [  # of an image the first and the last
        dict(zip(COLUMNS, (tokenizer.decode([ids[i]]), ids[i], weights[i], *places[i]), strict=True)) for i in shown
    ]
    return dict(
        source=name,
        where=row.where,
        dropped=row.dropped,
        note="; ".join(filter(None, [row.note, *counts])),
        trained=round(row.trained, 4),
        length=len(ids),
        kept=sum(map(len, row.kept)),
        images=[as_url(data) for data in getattr(row.example, "images", ())],
        text=row.example.text,
        spans=[list(span) for span in row.example.spans],
        tokens=tokens,
    )


def _totals(part, cache):
    data = part.config.data
    store = tokenised(part.source, part.task, part.config, cache)
    layout = part.task.layout
    length, packing = (1, "none") if layout.fixed else (data.max_length, data.packing)
    rows = Rows(store, length, packing, part.config.seed, layout=layout)
    removed = [finding.rule for finding in part.removed.values()]
    return store.report | dict(
        facts=part.task.facts(store.report),
        removed={rule: removed.count(rule) for rule in dict.fromkeys(removed)},
        rows=rows.per_epoch,
        row_length=length,
        packing_efficiency=rows.efficiency,
    )


def _sum(totals) -> dict:
    """The totals of one source, or what can be added up of those of several."""
    first, *others = totals or [{}]
    if not others:
        return first
    counts = ("examples", "documents", "truncated", "split", "tokens", "trained_tokens")
    total = {name: sum(t[name] for t in totals) for name in counts}
    for name in ("removed", "dropped", "skipped"):
        reasons = dict.fromkeys(reason for t in totals for reason in t[name])
        total[name] = {r: sum(t[name].get(r, 0) for t in totals) for r in reasons}
    return total | dict(trained_fraction=total["trained_tokens"] / max(sum(t["targets"] for t in totals), 1))
