"""Documents longer than a row may be, and what lengths there are."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BARS = "·▁▂▃▄▅▆▇█"


def fit(
    tokens: np.ndarray, weights: np.ndarray, max_length: int, overlong: str, bos: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pieces (tokens, weights) of at most `max_length` tokens in which something is trained.

    The first token of a piece has nothing before it that could predict it, so it doesn't count. weights: float32 [n],
    of each token itself; not shifted. max_length: 0 = no limit. overlong: as of `build_store`, "error" as "drop". bos:
    the id that begins a text; truncate_prompt keeps it.
    """
    kept: list[Any] = [slice(None)]
    if max_length and len(tokens) > max_length:
        kept = _CUTS[overlong](tokens, weights, max_length, bos)
    return [(tokens[at], weights[at]) for at in kept if weights[at][1:].any()]


def _truncate_prompt(tokens, weights, limit, bos):
    """Cut what follows the last trained token, then the prompt's beginning, then the end."""
    trained = np.flatnonzero(weights[1:]) + 1
    if not len(trained):
        return []
    kept = int(tokens[0] == bos)
    too_many = max(trained[-1] + 1, limit) - limit
    cut = min(too_many, trained[0] - 1)  # one stays before the first trained token, to predict it
    return [np.r_[:kept, kept + cut : cut + limit]]


_CUTS: dict[str, Callable[..., list]] = dict(  # to the places of each piece
    truncate_end=lambda tokens, weights, limit, bos: [slice(limit)],
    truncate_prompt=_truncate_prompt,
    drop=lambda *_: [],
    split=lambda tokens, weights, limit, bos: [slice(at, at + limit) for at in range(0, len(tokens), limit)],
    error=lambda *_: [],  # the caller has raised
)
OVERLONG = tuple(_CUTS)


def describe(lengths: Sequence[int]) -> dict:
    """{"percentiles": {"p5": n, ..., "max": n}, "histogram": [[at most, documents], ...]}, whose bounds double."""
    at = (5, 25, 50, 75, 95, 99)
    values = np.percentile(lengths, at, method="higher").astype(int).tolist()
    percentiles = {f"p{p}": n for p, n in zip(at, values, strict=True)}
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    histogram = [[2**b, n] for b, n in enumerate(np.bincount(bins).tolist()) if b >= bins.min()]
    return dict(percentiles=percentiles | {"max": int(max(lengths))}, histogram=histogram)


def percentiles(report: dict) -> str:
    """The percentiles of a store's report in one line."""
    return "  ".join(f"{name} {n:,}" for name, n in report["lengths"]["percentiles"].items())


def histogram(report: dict) -> str:
    """The histogram of a store's report in one line of bars."""
    bins, total = report["lengths"]["histogram"], report["examples"]
    most = max(n for _, n in bins)
    return "  ".join(f"≤{bound} {BARS[-(-8 * n // most)]} {n / total:.0%}" for bound, n in bins)


def lines(report: dict) -> list[str]:
    """What a store's report says of lengths and of the rows lost, for a terminal."""
    lost = [(report["truncated"], "truncated"), (report["split"], "split")]
    lost += [(report["pieces_dropped"], "pieces dropped: no_trained_token")]
    lost += [(n, f"dropped: {reason}") for reason, n in report["dropped"].items()]
    lost += [(n, f"skipped: {reason}") for reason, n in report["skipped"].items()]
    texts = [f"{n:,} {what}" for n, what in lost if n]
    return [f"tokens each: {percentiles(report)}", histogram(report)] + (["; ".join(texts)] if texts else [])
