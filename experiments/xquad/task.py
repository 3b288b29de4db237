"""Extractive question answering: where in a context the answer to a question begins and ends.

It is a task of its own in a file, as one of yours would be.

A record has a question, a context and answers as SQuAD has them: {"text": [...], "answer_start":
[...]}, or a list of {"text", "answer_start"}; none of them for a question without an answer. With
data.overlong="split" a long context is cut into windows that overlap; a window without the answer
is taught to say so, by pointing to its first token.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sftjax import losses, parallel
from sftjax.data.records.sources import Source
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation import metrics
from sftjax.evaluation.generation import BUCKET
from sftjax.models.base import Model
from sftjax.parallel import processes
from sftjax.tasks.base import EvalFn, LossFn, read_model
from sftjax.tasks.causal_lm import CausalLM
from sftjax.tasks.texts import Labelled, Texts

CONTEXTS, ANSWERS = ("context", "passage", "text"), ("answers", "answer")
OVERLAP = 3  # a window shares this part of its tokens, a third, with the one before
LONGEST = 30  # tokens of an answer, at most


SPAN_START, SPAN_END, IN_SPAN = 1, 2, 4  # bits of a target


def span(model, sources=()):
    """Cross-entropy of where an answer begins and ends, over the documents of a Batch.

    A target has the bits IN_SPAN at the tokens of a document between which the choice is, and
    SPAN_START and SPAN_END at those that are right. A document's loss is the mean of the two, and
    its weight stands at one of its tokens. sources: as of classification.
    """

    def loss_fn(params, batch, rng):
        logits, weights, _ = losses.read(model, params, batch, rng)
        targets, segments = batch["targets"], batch["segments"]
        logits = jnp.where((targets & IN_SPAN)[..., None] != 0, logits, -1e30)
        lse = jax.vmap(_log_sum_exp)(logits, segments)  # [B, S, 2], of each token's document
        right = jnp.stack([targets & SPAN_START, targets & SPAN_END], -1) != 0
        at_right = jnp.sum(jnp.where(right, lse - logits, 0.0), -1) / 2
        each = jax.vmap(_over_document)(at_right, segments)
        return losses.summed(batch, each, weights, sources)

    return loss_fn


def _log_sum_exp(x, segments):
    n = len(segments) + 1
    top = jax.ops.segment_max(x, segments, n)[segments]
    top = jax.lax.stop_gradient(top)
    return top + jnp.log(jax.ops.segment_sum(jnp.exp(x - top), segments, n)[segments])


def _over_document(x, segments):
    return jax.ops.segment_sum(x, segments, len(segments) + 1)[segments]


class Wanted(NamedTuple):
    """An answer as tokens: first and last; -1 where there is none, as is the start of a context."""

    first: int
    last: int
    context: tuple[int, int]  # the context's first token, and one past its last
    offsets: np.ndarray  # int32 [n, 2]: the characters of each token of the context
    answers: tuple[str, ...]  # all that are right; () for none


class Asked(NamedTuple):
    """A question of data.test."""

    prompt: np.ndarray  # its tokens, for people to read
    answer: str
    example: Labelled
    context: str


class ExtractiveQA(Texts):
    """See Texts; the names are of "question", "text" (the context) and "label" (the answers)."""

    usual: ClassVar = {"question": ("question", "query"), "text": CONTEXTS, "label": ANSWERS}
    whole = False
    options = ()
    generates = True  # data.test is questions, whose answers are texts

    def __init__(self, tokenizer: Any, names: Any = None, asked: Sequence[str] = ("squad_em", "token_f1")) -> None:
        super().__init__(tokenizer, names)
        self.asked = tuple(asked)

    @classmethod
    def arguments(cls, config: ConfigDict) -> dict[str, Any]:
        """The fields' names, and the metrics of answers. Raises: ConfigError."""
        e, fields = config.eval, config.data.fields
        metrics.check(e.metrics, "texts")
        plain = dict(draws=1, shots=0, choices="", answer="")
        wrong = [k for k, value in plain.items() if e[k] != value]
        if wrong or "choice" in e.metrics:
            key = f"eval.{wrong[0]}" if wrong else "eval.metrics: choice"
            raise ConfigError(f"{key} is of answers that a model generates; leave it out")
        names = {"question": fields.prompt, "text": fields.text, "label": fields.label}
        return {"names": names, "asked": e.metrics}

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Labelled]:
        """Each record's question and context, tokenised, with the tokens of the first answer."""
        rows = list(zip(records, wheres, strict=True))
        kinds = ("question", "text")
        questions, contexts = ([self.text(r, k, where) for r, where in rows] for k in kinds)
        answers = [self._answers(r, c, where) for (r, where), c in zip(rows, contexts, strict=True)]
        encoded = self.tokenizer(questions, contexts, return_offsets_mapping=True)
        out = []
        for i, where in enumerate(wheres):
            ids, of = np.array(encoded["input_ids"][i], np.int32), encoded.sequence_ids(i)
            own = np.flatnonzero(np.array([x == 1 for x in of]))
            if not len(own):
                raise DataError("the context has no token", where=where, kind="empty_text")
            wanted = _wanted(own, np.array(encoded["offset_mapping"][i]), answers[i], where)
            types = np.array(encoded["token_type_ids"][i], np.uint8) if self.typed else None
            weights, targets = _placed(np.arange(len(ids)), wanted)
            text, note = f"{questions[i]} | {contexts[i]}", f"answers {list(wanted.answers)}"
            out.append(Labelled(ids, weights, targets, types, text, note, wanted))
        return out

    def _answers(self, record, context, where) -> list[tuple[str, int]]:
        """(text, first character) of each answer; [] for a question without one."""
        name = self.name(record, "label")
        given = record.get(name) if name in record else self.field(record, "label", where)
        given = {"text": [], "answer_start": []} if given is None else given
        parts = given if isinstance(given, list) else [given]
        plain = all(isinstance(x, dict) for x in parts)
        if plain and isinstance(given, list):
            given = {k: [x.get(k) for x in given] for k in ("text", "answer_start")}
        texts, starts = (given.get(k) if plain else None for k in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            problem = f"field {name!r} is {given!r:.200}, expected lists 'text' and 'answer_start'"
            raise DataError(problem, where=where, kind="wrong_type")
        for text, start in zip(texts, starts, strict=True):
            there = context[start : start + len(text)] if _is_place(text, start) else None
            if there != text:
                raise DataError(
                    f"the answer {text!r:.100} is not at character {start!r} of the context, where"
                    f" {there!r:.100} stands",
                    "correct answer_start, or take the row out",
                    where=where,
                    kind="wrong_span",
                )
        return list(zip(texts, starts, strict=True))

    def kept(self, example: Labelled, max_length: int, overlong: str) -> list[np.ndarray]:
        """The context loses words at an end, or is cut into windows; the question stays whole."""
        n, (start, stop) = len(example.tokens), example.wanted.context
        before, inner, after = np.split(np.arange(n), [start, stop])
        room = max_length - len(before) - len(after)
        if not max_length or n <= max_length:
            return [np.arange(n)]
        if room < 2 or overlong == "drop":
            return []
        step = max(room - room // OVERLAP, 1)
        windows = [inner[i : i + room] for i in range(0, len(inner) - room + step, step)]
        if overlong != "split":
            windows = [inner[:room] if overlong == "truncate_end" else inner[-room:]]
        return [np.concatenate([before, window, after]) for window in windows]

    def cut(self, example: Labelled, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of each piece; of one that has lost its answer only where it is a window."""
        pieces = []
        for at in self.kept(example, max_length, overlong):
            weights, targets = _placed(at, example.wanted)
            lost = example.wanted.first >= 0 and targets[0] & SPAN_START
            types = () if example.types is None else (example.types[at],)
            if overlong == "split" or not lost:
                pieces.append((example.tokens[at], weights, targets, *types))
        return pieces

    # ---- model and loss ----

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The encoder of model.path with a head of spans."""
        return read_model(section, head="span", **changes)

    def loss_fn(self, model: Model, options: dict, sources: Sequence[str] = ()) -> LossFn:
        """See span."""
        return span(model, sources=sources)

    def eval_fn(self, model: Model, options: dict) -> EvalFn:
        """The same loss."""
        loss_fn = span(model)
        return lambda params, batch, model_state=None: (loss_fn(params, batch, None), {})

    # ---- answers ----

    def questions(self, source: Source, shots: Any = None) -> list[Asked]:
        """What is asked of each record."""
        found = []
        for i in range(len(source)):
            record, where = source[i], source.where(i)
            [example] = self.examples([record], [where])
            asked = example.tokens[: example.wanted.context[0]]
            answer = next(iter(example.wanted.answers), "")
            found.append(Asked(asked, answer, example, self.text(record, "text", where)))
        return found

    def answers(
        self,
        model: Model,
        params: Any,
        questions: list,
        groups: Sequence | None = None,
        *,
        batch_size: int = 64,
        mesh: Any = None,
        said: Any = lambda done, of: None,
        **unused: Any,
    ) -> dict:
        """{"answers": texts, "<metric>": value, "errors", "rows"}: of each the likeliest span.

        A context longer than the model's positions is read in windows. Where the questions have
        some without an answer, "" is an answer too. What counts is the best of all references.
        """
        longest = model.config.max_positions if model.config.learned_positions else 1024
        longest = min(longest, 384)  # windows of the usual size
        windows = [(i, at) for i, asked in enumerate(questions) for at in self.kept(asked.example, longest, "split")]
        scored = _scored(model, params, questions, windows, batch_size, mesh, said)
        nothing = any(not q.example.wanted.answers for q in questions)
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
        for (i, at), logits in zip(windows, scored, strict=True):
            best[i] = max(best[i], _best_span(questions[i], at, logits, nothing), key=lambda x: x[0])
        given = [text for _, text in best]
        wanted = [q.example.wanted.answers or ("",) for q in questions]
        found = metrics.texts(self.asked, wanted, given, groups=groups, errors=True)
        beside = {"errors": dict(found.errors), "rows": dict(found.rows), "baselines": {}}
        return {"answers": given, **found.values, **beside}

    # ---- for people ----

    shown = CausalLM.shown
    write_answers = CausalLM.write_answers


def _is_place(text, start) -> bool:
    return isinstance(text, str) and bool(text) and type(start) is int and start >= 0


def _wanted(own, offsets, answers, where) -> Wanted:
    first = last = -1
    if answers:
        text, start = answers[0]
        inside = [i for i in own if offsets[i][0] < start + len(text) and offsets[i][1] > start]
        if not inside:
            problem = f"the answer {text!r:.100} has no token of its own"
            raise DataError(problem, "take the row out", where=where, kind="wrong_span")
        first, last = inside[0], inside[-1]
    context = (int(own[0]), int(own[-1]) + 1)
    texts = tuple(text for text, _ in answers)
    return Wanted(int(first), int(last), context, offsets[own].astype(np.int32), texts)


def _placed(at, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Weights and targets of the tokens at these places; the first stands for no answer."""
    weights, (start, stop) = np.zeros(len(at), np.float32), wanted.context
    weights[0] = 1.0
    targets = np.where((at >= start) & (at < stop), IN_SPAN, 0).astype(np.int32)
    targets[0] = IN_SPAN
    whole = wanted.first >= 0 and {wanted.first, wanted.last} <= set(at.tolist())
    for place, bit in ((wanted.first, SPAN_START), (wanted.last, SPAN_END)):
        targets[int(np.flatnonzero(at == place)[0]) if whole else 0] |= bit
    return weights, targets


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, batch):
    return model.class_logits(params, model.hidden(params, batch), segments=batch["segments"])


def _scored(model, params, questions, windows, size, mesh, said) -> list[np.ndarray]:
    """The logits [n, 2] of each window, computed with others of about its length."""
    out: list[Any] = [None] * len(windows)
    order = sorted(range(len(windows)), key=lambda w: len(windows[w][1]))
    shards = parallel.axis_size(mesh, parallel.RULES["batch"]) if mesh else 1
    size = -(-min(size, max(len(windows), 1)) // shards) * shards
    put = (lambda x: jax.device_put(x, parallel.named(mesh))) if mesh else np.asarray
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = -(-len(windows[rows[-1]][1]) // BUCKET) * BUCKET
        batch = {k: np.zeros((size, width), np.int32) for k in ("tokens", "segments")}
        if questions[0].example.types is not None:
            batch["token_types"] = np.zeros((size, width), np.int32)
        for row, w in enumerate(rows):
            i, at = windows[w]
            example, here = questions[i].example, (row, slice(0, len(at)))
            batch["tokens"][here], batch["segments"][here] = example.tokens[at], 1
            if example.types is not None:
                batch["token_types"][here] = example.types[at]
        found = processes.to_host(_logits(model, params, {k: put(x) for k, x in batch.items()}))
        for row, w in enumerate(rows):
            out[w] = found[row, : len(windows[w][1])]
        said(start + len(rows), len(order))
    return out


def _best_span(asked: Asked, at, logits, nothing) -> tuple[float, str]:
    """(score, text) of a window's likeliest answer."""
    start, stop = asked.example.wanted.context
    own = np.flatnonzero((at >= start) & (at < stop))
    first, last = (logits[own, k].astype(np.float64) for k in (0, 1))
    apart = np.arange(len(own)) - np.arange(len(own))[:, None]
    sums = np.where((apart >= 0) & (apart < LONGEST), first[:, None] + last, -np.inf)
    i, j = np.unravel_index(int(sums.argmax()), sums.shape)
    none = float(logits[0].sum())
    if nothing and none > sums[i, j]:
        return none, ""
    offsets = asked.example.wanted.offsets[at[own] - start]
    return float(sums[i, j]), asked.context[offsets[i][0] : offsets[j][1]]
