"""Two configs, row by row: which tokens does the one feed or train, and the other not?"""

import difflib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax import tasks
from sftjax.data import DataError
from sftjax.data.mixing import spec as mix
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.inspect_data.rows import Part, Wanted, encode


def compare(
    parts: Sequence[Part], config: ConfigDict, other: ConfigDict, wanted: Wanted
) -> dict[str, Any]:
    """{"comparison", "differences"}: rows in which `other` would feed or train other tokens."""
    other = other.copy_and_resolve_references()
    if not (other.data.tokenizer or other.model.path):
        other.data.tokenizer = config.data.tokenizer or config.model.path
    tokenizers = [t for t in (load_tokenizer(config), load_tokenizer(other)) if t is not None]
    if len(tokenizers) < 2:
        raise DataError("--against compares tokens, and this task has no tokenizer", kind="setting")
    here, there = (tokenizer.get_vocab() for tokenizer in tokenizers)
    # Ids of two vocabularies say nothing about each other: then tokens are compared by their text.
    words = [functools.cache(lambda i, t=t: t.decode([i])) for t in tokenizers]
    keys: Sequence[Callable[[int], int | str]] = [int, int] if here == there else words
    counts = Counter(rows=0, differ=0, other_tokens=0, trained_here=0, trained_there=0)
    alone = {s.name: s.config for s in mix.sources(other)} if other.data.sources else {}
    differences = []
    for part in parts:
        shown, rows = 0, range(len(part.source))[wanted.start :]
        theirs = part._replace(config=alone.get(part.name, other))
        theirs = theirs._replace(task=tasks.make(theirs.config, tokenizers[1]))
        for a, b in zip(encode(part, rows), _blamed(encode(theirs, rows)), strict=True):
            if not wanted.takes(a):
                continue
            (ids, weights), (ids_there, weights_there) = fed = _fed(a), _fed(b)
            same = [*map(keys[0], ids.tolist())] == [*map(keys[1], ids_there.tolist())]
            differ = not same or not np.array_equal(weights, weights_there)
            counts.update(rows=1, differ=differ, other_tokens=not same)
            counts["trained_here"] += int(np.count_nonzero(weights))
            counts["trained_there"] += int(np.count_nonzero(weights_there))
            if differ and shown < wanted.n:
                shown += 1
                differences.append(_difference(part.name, (a, b), fed, keys, words))
    names = [tokenizer.name_or_path for tokenizer in tokenizers]
    comparison = dict(counts) | dict(tokenizers=names if keys is words else [])
    return dict(comparison=comparison, differences=differences)


def _blamed(rows):
    try:
        yield from rows
    except DataError as error:
        raise DataError(f"--against: {error}", kind=error.kind) from None


def _fed(row):
    """The tokens that training gets of a row, and the weight of each as a target."""
    ids, weights = row.example.tokens, row.example.weights.copy()
    at = np.concatenate([*row.kept, np.zeros(0, int)]).astype(int)
    if row.shifted:
        weights[[piece[0] for piece in row.kept]] = 0  # nothing stands before it to predict it
    return ids[at], weights[at]


def _difference(name, rows, fed, keys, words) -> dict:
    tokens = _align(fed, keys, words)
    marks = [token["mark"] for token in tokens]
    sides = [
        dict(
            text=row.example.text,
            spans=[list(span) for span in row.example.spans],
            dropped=row.dropped,
            note=row.note,
            tokens=len(ids),
            trained=int(np.count_nonzero(weights)),
        )
        for row, (ids, weights) in zip(rows, fed, strict=True)
    ]
    return dict(
        source=name,
        where=rows[0].where,
        here=sides[0],
        there=sides[1],
        only_here=marks.count("only-here"),
        only_there=marks.count("only-there"),
        tokens=tokens,
    )


def _align(fed, keys, words) -> list[dict]:
    """Both rows' tokens in one list: {"mark", "token", "id", "here": weight or None, "there"}.

    mark: "only-here" or "only-there" of a token that the other has not, or does not train;
    "weight" of one that both train, but not alike.
    """
    (ids, here), (ids_there, there) = ((i.tolist(), w.tolist()) for i, w in fed)
    a, b = [*map(keys[0], ids)], [*map(keys[1], ids_there)]
    tokens = []

    def add(mark, side, i, mine, other):
        tokens.append(dict(mark=mark, token=words[side](i), id=i, here=mine, there=other))

    for tag, i, stop, j, stop_there in difflib.SequenceMatcher(None, a, b, False).get_opcodes():
        if tag == "equal":
            for at, at_there in zip(range(i, stop), range(j, stop_there), strict=True):
                pair = here[at], there[at_there]
                add(_mark(*pair), 0, ids[at], *pair)
        else:
            for at in range(i, stop):
                add("only-here", 0, ids[at], here[at], None)
            for at in range(j, stop_there):
                add("only-there", 1, ids_there[at], None, there[at])
    return tokens


def _mark(here, there):
    if here == there:
        return ""
    return "only-there" if not here else "only-here" if not there else "weight"
