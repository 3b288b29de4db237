"""Two configs, row by row: which tokens does the one feed or train, and the other not?"""

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from sftjax import tasks
from sftjax.data import DataError
from sftjax.data.mixing import spec as mix
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.inspect_data.rows import Part, Wanted, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def compare(
    parts: Sequence[Part], config: ConfigDict, other: ConfigDict, wanted: Wanted
) -> dict[str, Any]:
    """The rows of `parts` in which `other` would feed or train other tokens.

    Returns: {"comparison": counts over all rows wanted, "differences": the first of each source}.
    """
    other = other.copy_and_resolve_references()
    if not (other.data.tokenizer or other.model.path):
        other.data.tokenizer = config.data.tokenizer or config.model.path
    tokenizers = [t for t in (load_tokenizer(config), load_tokenizer(other)) if t is not None]
    if len(tokenizers) < 2:
        raise DataError("--against compares tokens, and this task has no tokenizer", kind="setting")
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    # Ids of two vocabularies say nothing about each other: then tokens are compared by their text.
    words = [_Words(tokenizer) for tokenizer in tokenizers]
    keys = [np.array, np.array] if vocabularies[0] == vocabularies[1] else words
    counts = Counter(rows=0, differ=0, other_tokens=0, trained_here=0, trained_there=0)
    differences = []
    for part in parts:
        shown = 0
        for a, b in _both(part, other, tokenizers[1], wanted.start):
            if not wanted.takes(a):
                continue
            (ids, weights), (ids_there, weights_there) = fed = _fed(a), _fed(b)
            same = np.array_equal(keys[0](ids), keys[1](ids_there))
            differ = not same or not np.array_equal(weights, weights_there)
            here, there = (int(np.count_nonzero(w)) for w in (weights, weights_there))
            counts.update(rows=1, differ=differ, other_tokens=not same)
            counts.update(trained_here=here, trained_there=there)
            if differ and shown < wanted.n:
                shown += 1
                differences.append(_difference(part.name, (a, b), fed, keys, words))
    names = [tokenizer.name_or_path for tokenizer in tokenizers]
    comparison = dict(counts) | dict(tokenizers=names if keys is words else [])
    return dict(comparison=comparison, differences=differences)


def _both(part, other, there, start):
    """Each row as its own config has it, and as the other one would."""
    alone = {s.name: s.config for s in mix.sources(other)} if other.data.sources else {}
    theirs = part._replace(config=alone.get(part.name, other))
    theirs = theirs._replace(task=tasks.make(theirs.config, there))
    rows = range(len(part.source))[start:]
    return zip(encode(part, rows), _blamed(encode(theirs, rows)), strict=True)


def _blamed(rows):
    try:
        yield from rows
    except DataError as error:
        raise DataError(f"--against: {error}", kind=error.kind) from None


class _Words(dict):
    """ids -> the text of each; a mapping that fills itself."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def __missing__(self, i: int) -> str:
        self[i] = self.tokenizer.decode([i])
        return self[i]

    def __call__(self, ids: np.ndarray) -> list[str]:
        return [self[i] for i in ids.tolist()]


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
    a, b = (list(key(ids)) for key, (ids, _) in zip(keys, fed, strict=True))
    tokens = []

    def add(mark, side, i, *weights: float | None):
        word = words[side][i]
        tokens.append(dict(mark=mark, token=word, id=i, here=weights[0], there=weights[1]))

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
