"""Classification of texts: one label of several, read from a body's first or last token.

Each document of a packed row has its own label, at the token that the class is read from; every
other token has weight 0. So a batch is that of a language model whose targets are not shifted.
"""

import functools
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sftjax import losses
from sftjax.data.masking.conversation import Asked, read_field
from sftjax.data.packing.pack import Layout, TokenRows
from sftjax.data.records.protocols import RecordSource
from sftjax.data.records.sources import Source
from sftjax.data.token_store import Tally
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation import metrics
from sftjax.models.base import Model
from sftjax.tasks.base import EvalFn, LossFn, Scores, Task, read_model
from sftjax.terminal import columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("text", "sentence", "content", "review", "prompt", "input")  # usual names, in this order
LABELS = ("label", "labels", "class", "completion", "output")
MAJORITY = 0.9  # a share of one label from which on a warning proposes class weights


class Labelled(NamedTuple):
    """One text with its label."""

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]: 1 at the token that the class is read from, else 0
    targets: np.ndarray  # int32 [n]: the label's index there, else 0
    text: str
    note: str  # the label, for people to read
    spans: Sequence[tuple[int, int]] = ()

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three arrays [n], in the order of Classification.columns."""
        return self.tokens, self.weights, self.targets


class Labels:
    """Names in order, and which of them a value in a file means.

    given: names; then a whole number in a file is an index, a text a name (or, where no label is
    called so, an index written out). Or {value in the file: name}.
    """

    def __init__(self, given: Mapping[Any, str] | Sequence[str]) -> None:
        self.given = given
        if isinstance(given, Mapping) or hasattr(given, "items"):
            self.by_value = {str(value): name for value, name in given.items()}
            self.names = tuple(dict.fromkeys(self.by_value.values()))
        else:
            self.names = tuple(given)
            self.by_value = {str(i): name for i, name in enumerate(self.names)}
            self.by_value |= {name: name for name in self.names}
        wrong = [n for n in self.names if not isinstance(n, str) or not n]
        if wrong or len(set(self.names)) < len(self.names) or len(self.names) < 2:
            raise ConfigError(
                f"data.labels={given!r}: expected two or more different names, such as"
                " ('negative', 'positive'), or {0: 'negative', 1: 'positive'}"
            )

    def index(self, value: Any, where: str) -> int:
        """The index of a value. Raises: DataError for one that means no label."""
        texts = [str(value)]
        if isinstance(value, bool):
            texts += [str(value).lower(), str(int(value))]
        elif isinstance(value, float) and value.is_integer():
            texts.append(str(int(value)))
        name = next((self.by_value[t] for t in texts if t in self.by_value), None)
        if name is None:
            expected = ", ".join(map(repr, self.by_value))
            raise DataError(
                f"label {value!r} is unknown; expected one of {expected}",
                "correct the row, or name the label in data.labels",
                joint=": ",
                where=where,
                kind="unknown_label",
            )
        return self.names.index(name)


class Classification(Task[Labelled]):
    """tokenizer: a fast one; its special tokens surround each text as it wants them.

    names: the record's own names of text and label ("" = found by their usual ones; several with
    "|": the first that a record has). reads: "first" | "last": the token of a text from which its
    class is read.
    """

    layout: Layout = TokenRows(shifted=False)
    columns: Mapping[str, tuple[str, None]] = {
        "tokens": ("int32", None),
        "weights": ("float32", None),
        "targets": ("int32", None),
    }
    metrics = ("accuracy", "f1")
    counts = ("cells", "tokens", "trained_tokens")

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        labels: Mapping[Any, str] | Sequence[str],
        names: dict | None = None,
        reads: str = "first",
    ) -> None:
        self.tokenizer, self.labels, self.reads = tokenizer, Labels(labels), reads
        self.names = {"text": "", "label": ""} | dict(names or {})

    @classmethod
    def of(
        cls, config: ConfigDict, tokenizer: "PreTrainedTokenizerBase | None"
    ) -> "Classification":
        """The task of a config, with the model's labels where data.labels names none."""
        d = config.data
        if d.overlong == "split":
            raise ConfigError(
                "data.overlong='split' would give the pieces of a text its label; set"
                " truncate_end, truncate_prompt, drop or error"
            )
        model, given = read_model(config.model), d.labels
        given = given if given else model.source.labels
        if not given:
            raise ConfigError(
                "data.labels is empty, and the model names none: list the labels' names in order,"
                " such as ('negative', 'positive'), or give {value in the file: name}"
            )
        _check_options(config.loss)
        names = {key: d.fields[key] for key in ("text", "label")}
        return cls(tokenizer, given, names, model.reads)

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Labelled]:
        """Each record's text, tokenised, with its label at the token that is read."""
        pairs = [self._read(r, where) for r, where in zip(records, wheres, strict=True)]
        encoded = self.tokenizer([text for text, _ in pairs])["input_ids"]
        rows = zip(encoded, pairs, wheres, strict=True)
        return [self._example(ids, *pair, where) for ids, pair, where in rows]

    def _example(self, ids, text, label, where) -> Labelled:
        if not ids:
            problem = f"the text {text!r} has no token"
            raise DataError(problem, "take the row out", where=where, kind="empty_text")
        at = 0 if self.reads == "first" else len(ids) - 1
        weights, targets = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32)
        weights[at], targets[at] = 1.0, label
        note = f"label {self.labels.names[label]}"
        return Labelled(np.array(ids, np.int32), weights, targets, text, note)

    def _read(self, record, where) -> tuple[str, int]:
        text = self._field(record, "text", TEXTS, where)
        if not isinstance(text, str) or not text.strip():
            problem = f"field {self._name(record, 'text', TEXTS)!r} is {text!r}, expected text"
            raise DataError(problem, where=where, kind="empty_text")
        return text, self.labels.index(self._field(record, "label", LABELS, where), where)

    def _field(self, record, kind, usual, where):
        name = self._name(record, kind, usual)
        if name is None:
            asked = self.names[kind] or " | ".join(usual)
            raise DataError(
                f"no {kind}: none of the fields {asked}; the row has"
                f" {', '.join(map(repr, record)) or 'none'}",
                f"set data.fields.{kind}",
                joint=": ",
                where=where,
                kind="missing_field",
                subject=repr(kind),
            )
        return read_field(record, name, where)

    def _name(self, record, kind, usual) -> str | None:
        names = self.names[kind].split("|") if self.names[kind] else usual
        names = [name.strip() for name in names]
        there = (n for n in names if n in record or "{" in n or n.partition(".")[0] in record)
        return next(there, None)

    def fields_read(self, record: dict) -> set[str]:
        """The keys that the text and the label are made of."""
        asked = Asked(record)
        for kind, usual in (("text", TEXTS), ("label", LABELS)):
            if self._name(record, kind, usual) is not None:
                self._field(asked, kind, usual, "")
        return set(record) & asked.read

    def key(self) -> list:
        """The fields' names, the labels, the token read and the special tokens."""
        special = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        return ["classification", self.names, self.labels.by_value, self.reads, special]

    def kept(self, example: Labelled, max_length: int, overlong: str) -> list[np.ndarray]:
        """A long text loses words at its end or its beginning, never its special tokens."""
        n, (before, after) = len(example.tokens), self.special_ends
        places = np.arange(n)
        if not max_length or n <= max_length:
            return [places]
        room = max_length - before - after
        if overlong not in ("truncate_end", "truncate_prompt") or room < 1:
            return []
        cut = slice(before + room, n - after)
        if overlong == "truncate_prompt":
            cut = slice(before, n - after - room)
        return [np.delete(places, cut)]

    @functools.cached_property
    def special_ends(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before a text, and after it."""
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        before, after = (len(list(itertools.takewhile(bool, some))) for some in (mask, mask[::-1]))
        return before, after

    def cut(self, example: Labelled, max_length: int, overlong: str) -> list[tuple]:
        """(tokens, weights, targets), each [n], with the label at the piece's own end."""
        pieces = []
        for at in self.kept(example, max_length, overlong):
            tokens, weights, targets = (x[at] for x in example.arrays)
            read = 0 if self.reads == "first" else -1  # where a token was cut off, of the new end
            weights, targets = np.zeros_like(weights), np.zeros_like(targets)
            weights[read], targets[read] = 1.0, example.targets.max()
            pieces.append((tokens, weights, targets))
        return pieces

    def tally(self, max_length: int, overlong: str) -> "LabelTally":
        """A Tally that counts the labels too."""
        return LabelTally(self, max_length, overlong)

    def prepared(self, source: Source | None) -> tuple[Any, "Classification", dict]:
        """The source as Pairs of a text and its label's name."""
        return Pairs(source, self), self.canonical(), {}

    def canonical(self) -> "Classification":
        """The task that reads the text from "prompt" and the label from "completion"."""
        names = {"text": "prompt", "label": "completion"}
        return Classification(self.tokenizer, self.labels.names, names, self.reads)

    def summary(self, report: dict) -> str:
        """The numbers of examples and tokens, and each label's share."""
        shares = self.facts(report)["labels"]
        return f"{report['examples']:,} examples, {report['tokens']:,} tokens; {shares}"

    def facts(self, report: dict) -> dict[str, str]:
        """Each label's share of the documents."""
        total = max(report["documents"], 1)
        shares = (f"{name} {n / total:.1%}" for name, n in report["labels"].items())
        return {"labels": ", ".join(shares)}

    def warnings(self, report: dict) -> Iterable[str]:
        """Of labels without an example, and of one that most examples have."""
        counts, total = report["labels"], max(report["documents"], 1)
        if absent := [name for name, n in counts.items() if not n]:
            yield f"no example has the label {', '.join(absent)}: see data.labels"
        name, n = max(counts.items(), key=lambda x: x[1])
        if n > MAJORITY * total:
            yield (
                f"{n / total:.1%} of the examples have the label {name}: accuracy says little, see"
                " f1; loss.class_weights='balanced' weighs labels alike"
            )

    # ---- model and loss ----

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The body of model.path, without weights, with a head of a row for each label."""
        return read_model(section, labels=self.labels.names, **changes)

    def loss_fn(self, model: Model, options: dict, sources: Sequence[str] = ()) -> LossFn:
        """losses.classification with the options of the config's section `loss`."""
        return losses.classification(
            model,
            label_smoothing=options["label_smoothing"],
            class_weights=self.class_weights(options["class_weights"]),
            sources=sources,
        )

    def class_weights(self, text: str) -> tuple[float, ...]:
        """() for none, or a weight for each label. Raises: ConfigError."""
        if not text:
            return ()
        if text == "balanced":
            return self._balanced
        try:
            weights = tuple(float(x) for x in text.split(","))
        except ValueError:
            weights = ()
        if len(weights) != len(self.labels.names) or min(weights, default=-1) < 0:
            raise ConfigError(
                f"loss.class_weights={text!r}: expected 'balanced', or a number of 0 or more for"
                f" each of {', '.join(self.labels.names)}, separated by commas"
            )
        return weights

    _balanced: tuple[float, ...] = ()

    def saw(self, reports: Sequence[dict]) -> None:
        """The reports of the training stores: what 'balanced' weights are made of."""
        counts = sum((Counter(r["labels"]) for r in reports), Counter())
        total, k = sum(counts.values()), len(self.labels.names)
        each = [counts.get(name, 0) for name in self.labels.names]
        self._balanced = tuple(total / (k * n) if n else 0.0 for n in each)

    # ---- evaluation ----

    def eval_fn(self, model: Model, options: dict) -> EvalFn:
        """The plain loss, whatever the weights in training, and what is wanted and given."""
        loss_fn = losses.classification(model, predictions=True)
        return lambda params, batch, model_state=None: loss_fn(params, batch, None)

    def score(self, loss: float, predictions: dict[str, np.ndarray]) -> Scores:
        """What METRICS has for labels, and the confusion matrix (rows: wanted, columns: given).

        An answer that is not finite is wrong, and counted as "not_finite".
        """
        return self._scores(predictions, errors=False)

    def final_scores(
        self, loss: float, predictions: dict[str, np.ndarray], groups: Sequence | None = None
    ) -> Scores:
        """The same, with standard errors, and what the most frequent label scores."""
        return self._scores(predictions, errors=True, groups=groups)

    def _scores(self, predictions, errors, groups=None) -> Scores:
        real = predictions["weights"] > 0
        wanted, given, scores = (predictions[k][real] for k in ("wanted", "given", "scores"))
        found = metrics.labels(wanted, given, self.labels.names, scores, groups, errors)
        right = np.take_along_axis(scores, wanted[:, None], 1)[:, 0]
        rows = {**found.rows, "loss": -np.log(np.maximum(right, 1e-38))}
        return Scores(found.values, found.tables, found.errors, found.baselines, rows)

    # ---- for people ----

    def shown(self, result: dict, questions: list, n: int) -> str:
        """The confusion matrices after the run."""
        tables = result["after"].get("tables", {})
        return "\n\n".join(
            f"  {name}, after: wanted in rows, given in columns\n{confusion_text(table)}"
            for name, table in tables.items()
            if name.endswith("/confusion")
        )


class LabelTally(Tally):
    """Counts the labels too."""

    task: Classification

    def __init__(self, task: Classification, max_length: int, overlong: str) -> None:
        super().__init__(task, max_length, overlong)
        self.labels = Counter[int]()

    def count(self, pieces: Sequence[tuple[np.ndarray, ...]]) -> None:
        """As of Tally; counts the label of each document."""
        super().count(pieces)
        self.labels.update(int(targets[weights > 0][0]) for _, weights, targets in pieces)

    def report(self, skipped: Mapping[str, int]) -> dict:
        """As of Tally, with labels: {name: number of documents}."""
        names = self.task.labels.names
        return super().report(skipped) | dict(
            labels={name: self.labels[i] for i, name in enumerate(names)}
        )


class Pairs(RecordSource):
    """The records of a source as {"prompt": text, "completion": name of the label}."""

    def __init__(self, source: Source | None, task: Classification) -> None:
        self.source: Any = source  # None where only the form of the records is asked for
        self.task = task

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict:
        text, label = self.task._read(self.source[i], self.source.where(i))
        return {"prompt": text, "completion": self.task.labels.names[label]}

    def where(self, i: int) -> str:
        """The file and row of record i, for errors."""
        return self.source.where(i)

    @property
    def readers(self) -> list:
        """The readers of the source's files."""
        return self.source.readers

    def fingerprint(self) -> str:
        """That of the source, and the settings with which it is read."""
        return f"{self.source.fingerprint()} {self.task.key()}"


def confusion_text(table: dict) -> str:
    """A confusion matrix as aligned lines."""
    head = ["", *table["labels"]]
    rows = [head, *([n, *row] for n, row in zip(table["labels"], table["rows"], strict=True))]
    return textwrap.indent(columns(rows, range(len(head))), "  ")


# Keys of the config's section `loss` that a classification takes; the others must be as they come.
OPTIONS = ("label_smoothing", "class_weights", "chunk_tokens")


def _check_options(section) -> None:
    for key, plain in dict(normalise="tokens", z_loss=0.0, dft=False, load_balance=0.0).items():
        if section[key] != plain:
            raise ConfigError(
                f"loss.{key}={section[key]!r} belongs to task='causal_lm'; of a classification"
                f" only {', '.join(OPTIONS)} may be set"
            )
