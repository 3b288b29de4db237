"""Sequence to sequence: an encoder-decoder reads a source and writes a target of its own.

Summaries, translations, questions answered as text. Sources and targets are packed into rows of their own; see
packing.pack.PairRows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from ml_collections import ConfigDict

from sftjax.data.masking.question import Question
from sftjax.data.packing.pack import NONE, PairRows
from sftjax.data.records.sources import Source
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation.answers import Asking
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.models.base import Model
from sftjax.tasks.answering import Answering
from sftjax.tasks.base import Example, read_model
from sftjax.tasks.texts import TEXTS, Texts
from sftjax.terminal import warn

KINDS = ("text", "label")
TARGETS = ("target", "summary", "answer", "completion", "output", "response")


class Seq2Seq(Answering, Texts):
    """names: as of Texts, the target's under "label"; sizes: the most tokens of both in a row."""

    usual: ClassVar = {"text": ("source", *TEXTS, "document", "article"), "label": TARGETS}
    options = ("normalise", "label_smoothing", "z_loss", "chunk_tokens")
    columns: Mapping[str, Any] = {"tokens": ("int32", None), "targets": ("int32", None)}

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        names: Mapping[str, str] | None = None,
        sizes: tuple[int, int] = (1024, 1024),
        asking: Asking = Asking(),  # noqa: B008, it is a constant
        overlong: str = "truncate_end",  # of a question's source
    ) -> None:
        super().__init__(tokenizer, names)
        self.columns, self.asking, self.overlong = type(self).columns, asking, overlong
        self.layout: Any = PairRows(*sizes)
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise ConfigError("task='seq2seq': the tokenizer has no eos_token, which ends a target")

    @classmethod
    def of(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Self:
        """The task of a config."""
        d, asking, names = config.data, Asking.of(config), cls.arguments(config)["names"]
        if names.pop("pair"):
            raise ConfigError("data.fields.pair is nothing that task='seq2seq' reads")
        if config.eval.shots or "choice" in asking.metrics:
            raise ConfigError("eval.shots and the metric 'choice' are those of task='causal_lm'")
        sizes = (d.max_length, d.max_target_length or d.max_length)
        cut = "truncate_prompt" if d.overlong == "truncate_prompt" else "truncate_end"
        return cls(tokenizer, names, sizes, asking, cut)

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Any]:
        """Of each record the tokens of its source and, trained, those of its target."""
        rows = list(zip(records, wheres, strict=True))
        texts, wanted = ([self.text(row, kind, where) for row, where in rows] for kind in KINDS)
        sources = self.tokenizer(texts)["input_ids"]
        targets = self.tokenizer(text_target=wanted)["input_ids"]
        out, eos = [], self.tokenizer.eos_token_id
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            target = target + [eos] * (target[-1:] != [eos])
            ids = np.array(source, np.int32), np.array(target, np.int32)
            shown = f"{texts[i]} → {wanted[i]}"
            spans = [(len(shown) - len(wanted[i]), len(shown))]
            weights = np.repeat(np.array([0, 1], np.float32), [len(source), len(target)])
            out.append(Example(self.layout.example(*ids), shown, spans, "", np.concatenate(ids), weights))
        return out

    def key(self) -> list:
        """As of Texts, with what a target takes of a row."""
        return [*super().key(), self.layout.source, self.layout.target]

    def kept(self, example: Any, max_length: int, overlong: str) -> list[np.ndarray]:
        """A long source or target loses words at its end or beginning, never its special tokens."""
        before, after = self.special_ends
        # Its target ends with the end of a text, whatever the tokenizer puts around one.
        ended = max(after, int(example.tokens[-1] == self.tokenizer.eos_token_id))
        n, most = _source(example), self.layout.target if max_length else 0
        source = self.places(n, max_length, overlong, (before, after))
        target = self.places(len(example.tokens) - n, most, overlong, (before, ended))
        return [np.concatenate([source[0], n + target[0]])] if source and target else []

    def cut(self, example: Any, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of what is kept of a pair."""
        n, tokens = _source(example), example.tokens
        kept = self.kept(example, max_length, overlong)
        return [self.layout.example(tokens[at[at < n]], tokens[at[at >= n]]) for at in kept]

    def tokens_of(self, arrays: tuple[np.ndarray, ...]) -> int:
        """How many tokens a source and its target have: less than they take of a row."""
        return sum(int(np.count_nonzero(x != NONE)) for x in arrays)

    def summary(self, report: dict) -> str:
        """The numbers of pairs and of tokens."""
        sources = report["tokens"] - report["trained_tokens"]
        targets = report["trained_tokens"]
        return f"{report['examples']:,} pairs, {sources:,} tokens of sources and {targets:,} of targets"

    # ---- model and loss ----

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The encoder-decoder of model.path."""
        model = read_model(section, head="vocabulary", **changes)
        if not model.config.cross:
            raise ConfigError(
                f"model.path={section.path}: task='seq2seq' takes an encoder-decoder such as T5 or"
                " BART, and this is none; train a decoder with task='causal_lm'"
            )
        return model

    # ---- evaluation ----

    def questions(self, source: Source, shots: Callable[[int, dict], Sequence[dict]] | None = None) -> list[Question]:
        """The source of each record, cut as in training."""
        found, long, most = list[Question](), 0, self.layout.source
        rows = [(source[i], source.where(i)) for i in range(len(source))]
        pairs = self.examples([record for record, _ in rows], [where for _, where in rows])
        for (record, where), pair in zip(rows, pairs, strict=True):
            n = _source(pair)
            places = self.places(n, most, self.overlong, self.special_ends)
            if not places:
                problem = f"data.max_length={most} leaves no room for a source"
                raise DataError(problem, "raise it", where=where, kind="too_long")
            long += len(places[0]) < n
            text, wanted = (self.text(record, kind, where) for kind in KINDS)
            found.append(Question(pair.tokens[places[0]], wanted, text, text, self.special_ends[0]))
        if long:
            warn(f"of {len(found)} questions {long} are cut to data.max_length={most} tokens")
        return found

    @property
    def stop_ids(self) -> list[int]:
        """The end of a text."""
        return [] if self.tokenizer is None else [self.tokenizer.eos_token_id]


def _source(example) -> int:
    """How many of an example's tokens are of its source."""
    return int(np.count_nonzero(example.weights == 0))
