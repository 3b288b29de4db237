"""Ranking: which of a query's candidates stand before which others.

A record has a query, its candidates and the relevance of each, numbers of 0 or more:
{"query": text, "candidates": [text, ...], "relevance": [number, ...]}. The model, an encoder with a
head of one number, reads the query with each candidate and gives a score. All candidates of a query
lie in one row, each in a segment of its own, so that none sees another, and `groups` says of each
token which query it belongs to: a loss needs all scores of a query.

Pairwise and Listwise are the two tasks, which differ in their loss alone.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import losses
from sftjax.data.packing.pack import Field, TokenRows
from sftjax.data.token_store import Tally
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation import metrics
from sftjax.models import encoder
from sftjax.tasks.base import Scores, read_model
from sftjax.tasks.texts import Texts

TOP = 10  # of NDCG: the ranks that count
LARGEST = float(np.finfo(np.float32).max)


# ---- losses: float32 [groups] of a row's candidates, and whether a group has one -----------------


def pairwise(scores, relevance, groups, n):
    """RankNet (Burges et al., ICML 2005): mean of log(1 + exp(s_j - s_i)) over pairs y_i > y_j.

    All arrays are of one row's candidates, [N]; group 0 is none. A query whose candidates are all
    of one relevance has no pair, and counts for nothing.
    """
    ordered = (groups[:, None] == groups) & (groups > 0) & (relevance[:, None] > relevance)
    each = jnp.where(ordered, jax.nn.softplus(scores - scores[:, None]), 0.0)
    total = jax.ops.segment_sum(jnp.sum(each, 1), groups, n)
    pairs = jax.ops.segment_sum(jnp.sum(ordered, 1, dtype=jnp.float32), groups, n)
    return total / jnp.maximum(pairs, 1.0), pairs > 0


def listwise(scores, relevance, groups, n):
    """ListNet of top one (Cao et al., ICML 2007): -sum_i softmax(y)_i log softmax(s)_i.

    The softmax is over the candidates of a query, y are their relevances and s their scores.
    """
    wanted = jnp.exp(_log_softmax(relevance, groups, n))
    each = jnp.where(groups > 0, -wanted * _log_softmax(scores, groups, n), 0.0)
    there = jax.ops.segment_max((groups > 0).astype(jnp.int32), groups, n) > 0
    return jax.ops.segment_sum(each, groups, n), there


def _log_softmax(x, groups, n):
    top = jax.lax.stop_gradient(jax.ops.segment_max(x, groups, n))
    x = x - top[groups]
    return x - jnp.log(jax.ops.segment_sum(jnp.exp(x), groups, n))[groups]


LOSSES = {"pairwise": pairwise, "listwise": listwise}


def ranking(model, kind, predictions=False, sources=()):
    """The loss of a Batch by a row of LOSSES: a mean over queries. sources: as of losses.causal_lm.

    predictions: return (Loss, {"wanted", "given", "overlap", "weights", "first"}, each [B, S]) in
    place of the Loss; first is 1 at a query's first token.
    """

    def of_row(given, targets, weights, segments, groups):
        # Two tokens at least are a candidate's, so half a row's tokens bound their number.
        n = given.shape[0] // 2 + 1
        where = jnp.where(weights > 0, segments, 0)
        sums = [jax.ops.segment_sum(jnp.where(where > 0, x, 0), where, n) for x in (given, targets)]
        of = jax.ops.segment_max(jnp.where(where > 0, groups, 0), where, n)
        each, counts = LOSSES[kind](*sums, jnp.maximum(of, 0), n)
        return each[groups], counts[groups]

    def loss_fn(params, batch, rng, model_state=None):
        logits, weights, _ = losses.read(model, params, batch, rng)
        given, groups = logits[..., 0], batch["groups"]
        rows = (given, batch["targets"], weights, batch["segments"], groups)
        each, counts = jax.vmap(of_row)(*rows)
        first = (groups > 0) & (groups != jnp.pad(groups, ((0, 0), (1, 0)))[:, :-1])
        one = (first & counts).astype(jnp.float32)
        loss = losses.summed(batch, each, one, sources)
        if not predictions:
            return loss
        out = {"wanted": batch["targets"], "given": given, "first": first.astype(jnp.int32)}
        return loss, out | {k: batch[k] for k in ("overlap", "weights")}

    return loss_fn


# ---- metrics of one query ------------------------------------------------------------------------


def ndcg(relevance, scores, k=TOP):
    """NDCG of the first k ranks, as scikit-learn's ndcg_score: gains are the relevances themselves.

    Equal scores share what their ranks add up to (the mean over all their orders). 0 where nothing
    is relevant.
    """
    relevance = np.asarray(relevance, np.float64)
    ranks = np.arange(len(relevance))
    discount = np.where(ranks < k, 1 / np.log2(ranks + 2), 0.0)
    which, counts = _ties(scores)
    mean = np.bincount(which, relevance) / counts
    best = np.sort(relevance)[::-1] @ discount
    return float(np.repeat(mean, counts) @ discount / best) if best > 0 else 0.0


def reciprocal_rank(relevance, scores):
    """1 / rank of the first candidate whose relevance is not 0; 0 where there is none.

    Of equal scores it is the mean over all their orders.
    """
    which, counts = _ties(scores)
    hits = np.bincount(which, np.asarray(relevance) > 0).astype(int)
    before = 0
    for t, m in zip(counts.tolist(), hits.tolist(), strict=True):
        if m:  # the first of the m is at the j-th of t places in so many of the orders:
            chance = (math.comb(t - j, m - 1) / math.comb(t, m) for j in range(1, t - m + 2))
            return sum(p / (before + j) for j, p in enumerate(chance, 1))
        before += t
    return 0.0


def _ties(scores):
    """(for each score the place of its value among all, highest first; how often each is there)."""
    _, which, counts = np.unique(-np.asarray(scores, np.float64), return_inverse=True, return_counts=True)
    return which, counts


METRICS = {"ndcg10": ndcg, "mrr": reciprocal_rank}


def measured(queries, groups=None, errors=False):
    """Scores of queries, each an array [3, candidates] of relevances, scores and overlaps of words.

    groups: as of metrics.standard_error. A score that is not finite counts as the lowest.
    """
    lost = sum(int((~np.isfinite(q[1])).sum()) for q in queries)
    given = [np.where(np.isfinite(q[1]), q[1], -np.inf) for q in queries]
    columns = {"": given, "random order": [np.zeros(q.shape[1]) for q in queries]}
    columns["word overlap"] = [q[2] for q in queries]
    found = {
        what: {
            name: np.array([of(q[0], s) for q, s in zip(queries, scores, strict=True)]) for name, of in METRICS.items()
        }
        for what, scores in columns.items()
    }
    means = {what: {k: float(v.mean()) for k, v in some.items()} for what, some in found.items()}
    values, rows = means.pop(""), found.pop("")
    values |= {"not_finite": float(lost)} if lost else {}
    spread = {k: metrics.standard_error(v, groups) for k, v in rows.items()} if errors else {}
    return Scores(values, {}, spread, means, rows)


# ---- how candidates lie in a row -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupRows(TokenRows):
    """Queries one after the other in a row, each with all its candidates.

    An example is (tokens, weights, targets, candidates, overlap[, types]), each [n]; candidates
    are 1, 2, ... in order. Each candidate is a segment with positions of its own.
    """

    def spec(self, rows, width):
        """As of TokenRows, with the query and the overlap of words of each token's candidate."""
        more = {"groups": np.int32, "overlap": np.float32}
        own = {k: Field((rows, width), kind, ("batch", "seq")) for k, kind in more.items()}
        return super().spec(rows, width) | own

    def fill(self, row, examples, pieces):
        """Write the queries one after the other into a row."""
        at = segment = 0
        for group, (doc, start, stop) in enumerate(pieces, 1):
            cells = slice(at, at + stop - start)
            tokens, weights, targets, candidates, overlap, *types = (x[start:stop] for x in examples[doc])
            sizes = np.bincount(candidates)[1:]
            values = self.document(tokens, weights, targets, *types)
            starts = np.cumsum(sizes) - sizes
            values["positions"] = np.arange(len(tokens)) - np.repeat(starts, sizes)
            values |= {"segments": segment + candidates, "groups": group, "overlap": overlap}
            for name, own in values.items():
                row[name][cells] = own
            segment, at = segment + len(sizes), cells.stop


class Ranked(NamedTuple):
    """A query with its candidates, one after the other."""

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]: 1 at each candidate's first token
    targets: np.ndarray  # float32 [n]: its relevance there
    candidates: np.ndarray  # int32 [n]: 1, 2, ...
    overlap: np.ndarray  # float32 [n]: at its first token the share of the query's words it has
    types: np.ndarray | None
    inner: np.ndarray  # bool [n]: is the token of the candidate's own text
    text: str
    note: str
    wanted: tuple[float, ...]
    spans: Sequence[tuple[int, int]] = ()

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        own = (self.tokens, self.weights, self.targets, self.candidates, self.overlap)
        return own if self.types is None else (*own, self.types)


@dataclasses.dataclass(frozen=True)
class Ranker(encoder.Model):
    """An encoder whose positions begin anew with each candidate: a row may be longer than they."""

    def check_length(self, length: int, what: str) -> None:
        """A row's length does not matter; `Ranking.examples` looks at each candidate's."""


# ---- the task ------------------------------------------------------------------------------------


class Ranking(Texts):
    """See Texts; the names are of "prompt" (the query), "text" (candidates), "label" (relevance).

    positions: the most tokens of a query with one candidate; 0 = any number.
    """

    usual: ClassVar = {
        "prompt": ("query", "question"),
        "text": ("candidates", "passages", "documents"),
        "label": ("relevance", "relevances", "labels"),
    }
    target = np.float32
    options = ()
    metrics = tuple(METRICS)
    kind: ClassVar[str]  # a row of LOSSES

    def __init__(self, tokenizer: Any, names: Any = None, reads: str = "first", positions: int = 0):
        super().__init__(tokenizer, names, reads)
        self.positions = positions
        self.typed = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
        self.layout = GroupRows(shifted=False, target=self.target, types=self.typed)
        kinds = dict(tokens="int32", weights="float32", targets="float32", candidates="int32")
        kinds |= {"overlap": "float32"} | ({"types": "uint8"} if self.typed else {})
        self.columns = {name: (kind, None) for name, kind in kinds.items()}

    @classmethod
    def arguments(cls, config: Any) -> dict[str, Any]:
        """As of Texts, and the model's positions. Raises: ConfigError."""
        d = config.data
        if d.streaming or d.sources:
            key = "data.streaming" if d.streaming else "data.sources"
            raise ConfigError(
                f"{key}: a row's segments are candidates here, not documents, so neither streams"
                " nor several sources are read; join the files, and set data.train"
            )
        if d.fields.pair:
            raise ConfigError(f"data.fields.pair is nothing that task={config.task!r} reads")
        if d.overlong == "truncate_prompt":
            raise ConfigError(
                "data.overlong='truncate_prompt' would cut the query; set truncate_end (cuts the"
                " longest candidates), drop or error"
            )
        c = _encoder(config.model).config
        positions = c.max_positions if c.learned_positions else 0
        return super().arguments(config) | {"positions": positions}

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Any]:
        """Each record's query with each of its candidates, tokenised, one after the other."""
        rows = list(zip(records, wheres, strict=True))
        read = [(self.text(r, "prompt", where), *self._read(r, where)) for r, where in rows]
        pairs = [(query, text) for query, texts, _ in read for text in texts]
        encoded = self.tokenizer([q for q, _ in pairs], [c for _, c in pairs])
        out, at = [], 0
        for (query, texts, wanted), where in zip(read, wheres, strict=True):
            out.append(self._joined(encoded, at, query, texts, wanted, where))
            at += len(texts)
        return out

    def _read(self, record, where):
        """(candidates, relevances) of a record. Raises: DataError."""
        texts, given = (self.field(record, kind, where) for kind in ("text", "label"))
        name, label = (self.name(record, kind) for kind in ("text", "label"))
        if not isinstance(texts, list) or len(texts) < 2:
            problem = f"field {name!r} is {texts!r:.200}, expected a list of two or more texts"
            raise DataError(problem, where=where, kind="wrong_type")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                problem = f"field {name!r}: candidate {i} is {text!r:.200}, expected text"
                raise DataError(problem, where=where, kind="empty_text")
        if not isinstance(given, list) or len(given) != len(texts):
            problem = (
                f"field {label!r} is {given!r:.200}, expected a list of {len(texts)} numbers, one for each of {name!r}"
            )
            raise DataError(problem, where=where, kind="wrong_type")
        for i, x in enumerate(given):
            number = isinstance(x, (int, float)) and not isinstance(x, bool)
            if not (number and 0 <= x <= LARGEST):
                problem = f"field {label!r}: number {i} is {x!r:.200}, expected one of 0 or more"
                raise DataError(problem, where=where, kind="wrong_value")
        return texts, tuple(map(float, given))

    def _joined(self, encoded, at, query, texts, wanted, where):
        parts, k = range(at, at + len(texts)), len(texts)
        ids = [encoded["input_ids"][i] for i in parts]
        inner = [np.array([x == 1 for x in encoded.sequence_ids(i)], bool) for i in parts]
        for i, (tokens, own) in enumerate(zip(ids, inner, strict=True)):
            if not own.any() or own.all():
                problem = f"the {'query' if own.any() else f'candidate {i}'} has no token"
                raise DataError(problem, "take the row out", where=where, kind="empty_text")
            if 0 < self.positions < len(tokens):
                problem = (
                    f"the query with candidate {i} has {len(tokens)} tokens, and the model {self.positions} positions"
                )
                raise DataError(problem, "shorten the text", where=where, kind="too_long")
        sizes = [len(x) for x in ids]
        firsts = np.cumsum(sizes) - sizes
        weights, targets, overlap = (np.zeros(sum(sizes), np.float32) for _ in range(3))
        weights[firsts], targets[firsts] = 1.0, wanted
        overlap[firsts] = [word_overlap(query, text) for text in texts]
        types = None
        if self.typed:
            types = np.concatenate([encoded["token_type_ids"][i] for i in parts]).astype(np.uint8)
        tokens = np.concatenate(ids).astype(np.int32)
        candidates = np.repeat(np.arange(1, k + 1), sizes).astype(np.int32)
        shown = " | ".join([query, *texts])
        note = f"relevance {', '.join(f'{x:g}' for x in wanted)}"
        inner = np.concatenate(inner)
        arrays = (tokens, weights, targets, candidates, overlap, types)
        return Ranked(*arrays, inner, shown, note, wanted)

    def kept(self, example: Any, max_length: int, overlong: str) -> list[np.ndarray]:
        """The longest candidates lose words at their ends, all down to one length."""
        places = np.arange(len(example.tokens))
        if not max_length or len(places) <= max_length:
            return [places]
        sizes = np.bincount(example.candidates)[1:]
        most = max(n for n in range(max_length) if np.minimum(sizes, n).sum() <= max_length)
        cut = []
        for i, size in enumerate(sizes.tolist(), 1):
            own = np.flatnonzero((example.candidates == i) & example.inner)
            if size - most >= len(own) or overlong == "drop":
                return []
            cut.append(own[len(own) - max(size - most, 0) :])
        return [np.delete(places, np.concatenate(cut))]

    def cut(self, example: Any, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of what is kept."""
        kept = self.kept(example, max_length, overlong)
        return [tuple(x[at] for x in example.arrays) for at in kept]

    def tally(self, max_length: int, overlong: str) -> Tally:
        """A Tally that counts queries without an order too."""
        return LevelTally(self, max_length, overlong)

    def warnings(self, report: dict):
        """Of queries that say nothing of an order."""
        if n := report["level"]:
            yield (
                f"{n} of {report['documents']} queries have candidates of one relevance alone, and"
                " say nothing of their order"
            )

    # ---- model and loss ----

    def load_model(self, section: Any, **changes: Any) -> Ranker:
        """The encoder of model.path with a head of one number."""
        own = dict(labels=("relevance",), head="document", problem="regression")
        model = _encoder(section, **own, **changes)
        return Ranker(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})

    def loss_fn(self, model: Any, options: dict, sources: Sequence[str] = ()):
        """See ranking."""
        return ranking(model, self.kind, sources=sources)

    # ---- evaluation ----

    def eval_fn(self, model: Any, options: dict):
        """The same loss, with relevances and scores."""
        loss_fn = ranking(model, self.kind, predictions=True)
        return lambda params, batch, model_state=None: loss_fn(params, batch, None)

    def score(self, loss: float, predictions: dict, **how: Any) -> Scores:
        """NDCG and MRR, means over queries."""
        flat = {k: v.reshape(-1) for k, v in predictions.items()}
        there = flat["weights"] > 0
        columns = np.stack([flat[k][there] for k in ("wanted", "given", "overlap")]).astype(float)
        query = np.cumsum(flat["first"])[there]  # queries lie one after the other
        queries = np.split(columns, np.flatnonzero(np.diff(query)) + 1, axis=1)
        return measured(queries, **how)


class Pairwise(Ranking):
    """Learns from the pairs of a query's candidates; see pairwise."""

    kind = "pairwise"


class Listwise(Ranking):
    """Learns from all candidates of a query at once; see listwise."""

    kind = "listwise"


class LevelTally(Tally):
    """Counts the queries whose candidates are all of one relevance too."""

    level = 0

    def count(self, pieces):
        super().count(pieces)
        self.level += sum(np.ptp(targets[w > 0]) == 0 for _, w, targets, *_ in pieces)

    def report(self, skipped):
        return super().report(skipped) | dict(level=int(self.level))


def word_overlap(query: str, candidate: str) -> float:
    """The share of the query's different words that the candidate has."""
    asked, there = (set(re.findall(r"\w+", text.lower())) for text in (query, candidate))
    return len(asked & there) / max(len(asked), 1)


def _encoder(section, **changes):
    model = read_model(section, **changes)
    if not isinstance(model, encoder.Model):
        raise ConfigError(
            f"model.path={section.path}: a ranking is read by an encoder such as BERT, and this is none; name one"
        )
    return model
