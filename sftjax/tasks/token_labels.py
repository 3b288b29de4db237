"""Labels of words: entities, parts of speech. A word's label stands at its first token.

A record has a list of words and a list of as many labels: names such as B-person, or their numbers.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from sftjax.errors import DataError
from sftjax.evaluation import metrics
from sftjax.models.base import Model
from sftjax.tasks.base import EvalFn, Scores
from sftjax.tasks.classification import Classification
from sftjax.tasks.texts import Labelled

WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels")


class TokenLabels(Classification):
    """See Classification."""

    head = "token"
    usual: ClassVar = {"text": WORDS, "label": TAGS}
    whole = cleaned = False
    cuttable = True
    metrics = ("seqeval_f1", "accuracy")

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # Parts of speech are no entities.
        self.entities = all(x == "O" or x[1:2] == "-" for x in self.labels.names)
        self.metrics = TokenLabels.metrics if self.entities else ("accuracy", "f1_words")
        if self.entities:
            metrics.package("seqeval.metrics")  # said now where it is missing

    def read_words(self, record: dict, where: str) -> list[str]:
        """The record's words."""
        words = self.field(record, "text", where)
        if not isinstance(words, list) or not words or not all(isinstance(x, str) for x in words):
            raise DataError(
                f"field {self.name(record, 'text')!r} is {words!r:.200}, expected a list of words",
                where=where,
                kind="wrong_type",
            )
        return words

    def read_wanted(self, record: dict, where: str) -> list[int]:
        """The index of each word's label."""
        labels, n = self.field(record, "label", where), len(self.read_words(record, where))
        if not isinstance(labels, list) or len(labels) != n:
            found = f"{len(labels)} labels" if isinstance(labels, list) else f"{labels!r:.200}"
            raise DataError(
                f"{n} words, and {found} in {self.name(record, 'label')!r}; expected a list with one for each word",
                where=where,
                kind="wrong_length",
            )
        return [self.labels.index(x, where) for x in labels]

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Labelled]:
        """Each record's words, tokenised, with each label at its word's first token."""
        wanted = [self.read_wanted(r, where) for r, where in zip(records, wheres, strict=True)]
        words = [self.read_words(r, where) for r, where in zip(records, wheres, strict=True)]
        encoded = self.tokenizer(words, is_split_into_words=True)
        out = []
        for i, where in enumerate(wheres):
            ids = np.array(encoded["input_ids"][i], np.int32)
            weights, targets = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
            first = dict[int, int]()
            for at, word in enumerate(encoded.word_ids(i)):
                if word is not None:
                    first.setdefault(word, at)
            if not (places := list(first.values())):
                raise DataError("none of the words has a token", "take the row out", where=where, kind="empty_text")
            weights[places], targets[places] = 1.0, [wanted[i][word] for word in first]
            names = [self.labels.names[k] for k in wanted[i]]
            note = " ".join(f"{w}/{n}" for w, n in zip(words[i], names, strict=True) if n != "O")
            lost = len(words[i]) - len(first)
            out.append(Labelled(ids, weights, targets, None, " ".join(words[i]), note, lost))
        return out

    def left_out(self, record: dict, example: Labelled) -> Iterable[str]:
        """As of Task, and words that the tokenizer has no token for."""
        yield from super().left_out(record, example)
        if example.wanted:
            yield "words without a token, which are not trained"

    def cut(self, example: Labelled, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of each piece that has a word."""
        return [x for x in super().cut(example, max_length, overlong) if np.any(x[1])]

    # ---- evaluation ----

    def eval_fn(self, model: Model, options: dict) -> EvalFn:
        """As of Classification, with where each document begins."""
        evaluate = super().eval_fn(model, options)

        def more(params, batch, model_state=None):
            loss, found = evaluate(params, batch, model_state)
            first = (batch["positions"] == 0) & (batch["segments"] > 0)
            return loss, {k: found[k] for k in ("wanted", "given", "weights")} | {"first": first}

        return more

    def score(self, loss: float, predictions: dict[str, np.ndarray], **how: Any) -> Scores:
        """The F1 of entities, and what labels of words score."""
        documents = np.cumsum(predictions["first"].ravel()) - 1
        real = predictions["weights"].ravel() > 0
        wanted, given = (predictions[k].ravel()[real] for k in ("wanted", "given"))
        starts = np.flatnonzero(np.diff(documents[real], prepend=-1))
        names = np.array(["O", *self.labels.names])  # the first of what is not finite
        w, g = ([list(x) for x in np.split(names[some + 1], starts[1:])] for some in (wanted, given))
        tags = metrics.tags(w, g, **how) if self.entities else Scores({})
        found = metrics.labels(wanted, given, self.labels.names)
        values = {"accuracy": found.values["accuracy"], "f1_words": found.values["f1"]}
        values |= {k: v for k, v in found.values.items() if k == "not_finite"}
        [(usual, shown)] = found.baselines.items()
        shown = {"accuracy": shown["accuracy"], "f1_words": shown["f1"]}
        baselines = {usual: {**shown, **tags.baselines.get(usual, {})}}
        tables = {"confusion": found.tables["confusion"], **tags.tables}
        return Scores(tags.values | values, tables, tags.errors, baselines, tags.rows)
