"""Classification of texts: one label of several, or any number of them.

It is read from a body's first or last token. A document may be a pair of texts.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from sftjax import losses
from sftjax.data.records.sources import Source
from sftjax.data.token_store import Tally
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation import metrics
from sftjax.hf.heads import stored_labels
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.models.base import Model
from sftjax.tasks.base import EvalFn, Scores, Task, read_model
from sftjax.tasks.texts import Labelled, Texts
from sftjax.terminal import columns

MAJORITY = 0.9  # a share of one label from which on a warning proposes class weights
NEEDED = (
    "data.labels is empty, and the model names none: list the labels' names in order, such as"
    " ('negative', 'positive'), or give {value in the file: name}"
)


class Labels:
    """Names in order, and which of them a value in a file means.

    given: names; then a whole number in a file is an index, a text a name (or, where no label is called so, an index
    written out). Or {value in the file: name}.
    """

    def __init__(self, given: Mapping[Any, str] | Sequence[str]) -> None:
        self.given = given
        if hasattr(given, "items"):
            self.by_value = {str(value): name for value, name in given.items()}
            self.names = tuple(dict.fromkeys(self.by_value.values()))
        else:
            self.names = tuple(given)
            self.by_value = {str(i): name for i, name in enumerate(self.names)}
            self.by_value |= {name: name for name in self.names}
        texts = {n for n in self.names if isinstance(n, str) and n}
        if not 2 <= len(self.names) == len(texts):
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
        for text in texts:
            if text in self.by_value:
                return self.names.index(self.by_value[text])
        raise DataError(
            f"label {value!r} is unknown; expected one of {', '.join(map(repr, self.by_value))}",
            "correct the row, or name the label in data.labels",
            where=where,
            kind="unknown_label",
        )


class LabelTally(Tally):
    """Counts the labels too."""

    task: "Classification"

    def __init__(self, task: "Classification", max_length: int, overlong: str) -> None:
        super().__init__(task, max_length, overlong)
        self.labels = Counter[int]()

    def count(self, pieces: Sequence[tuple[np.ndarray, ...]]) -> None:
        """As of Tally; counts the label of each document."""
        super().count(pieces)
        for _, weights, targets, *_ in pieces:
            self.labels.update(self.task.counted(targets, weights))

    def report(self, skipped: Mapping[str, int]) -> dict:
        """As of Tally, with labels: {name: number of documents}."""
        names = self.task.labels.names
        return super().report(skipped) | dict(labels={name: self.labels[i] for i, name in enumerate(names)})


class Classification(Texts):
    """labels: see Labels; of the others see Texts."""

    head: str = "document"
    loss = staticmethod(losses.classification)
    tallies = LabelTally
    cleaned: ClassVar[bool] = True  # cleaning and splitting read a text and one label
    options: ClassVar[tuple[str, ...]] = ("kind", "focal_gamma", "label_smoothing", "class_weights")
    metrics: tuple[str, ...] = ("accuracy", "f1")

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        labels: Mapping[Any, str] | Sequence[str],
        names: Mapping[str, str] | None = None,
        reads: str = "first",
    ) -> None:
        super().__init__(tokenizer, names, reads)
        self.labels = Labels(labels)

    @classmethod
    def arguments(cls, config: ConfigDict) -> dict[str, Any]:
        """The model's labels where data.labels names none, and the token that it reads."""
        hf = read_model(config.model).source.config
        if not (given := config.data.labels or stored_labels(hf, cls.head)):
            raise ConfigError(NEEDED)
        return super().arguments(config) | {"labels": given}

    # ---- data ----

    def read_wanted(self, record: dict, where: str) -> Any:
        """The index of the record's label."""
        return self.labels.index(self.field(record, "label", where), where)

    def note(self, wanted: Any) -> str:
        """The label's name."""
        return f"label {self.labels.names[wanted]}"

    def key(self) -> list:
        """As of Texts, and the labels."""
        return [*super().key(), self.labels.by_value]

    def counted(self, targets: np.ndarray, weights: np.ndarray) -> Iterable[int]:
        """The labels of a document, from its arrays [n]."""
        return targets[weights > 0].tolist()

    def prepared(self, source: Source | None) -> tuple[Any, Task, dict]:
        """The source as Pairs of a text and its label's name, and the task that reads these."""
        if self.names["pair"] or not self.cleaned:
            return super().prepared(source)
        names = {"text": "prompt", "label": "completion"}
        return Pairs(source, self), type(self)(self.tokenizer, self.labels.names, names, self.reads), {}

    def summary(self, report: dict) -> str:
        """The numbers of examples and tokens, and each label's share."""
        return f"{report['examples']:,} examples, {report['tokens']:,} tokens; {self.facts(report)['labels']}"

    def labelled(self, report: dict) -> int:
        """How many labels a store has, at least 1; of several labels a text: how many texts."""
        return max(sum(report["labels"].values()), 1)

    def facts(self, report: dict) -> dict[str, str]:
        """Each label's share of what is labelled."""
        total = self.labelled(report)
        return {"labels": ", ".join(f"{name} {n / total:.1%}" for name, n in report["labels"].items())}

    def warnings(self, report: dict) -> Iterable[str]:
        """Of labels without an example, and of one that most examples have."""
        counts, total = report["labels"], self.labelled(report)
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
        reads = "image" if self.head == "image" else "text"
        return read_model(section, reads, labels=self.labels.names, head=self.head, **changes)

    def own(self, options: dict) -> dict[str, Any]:
        """As of Task, with a weight for each label."""
        return super().own(options) | {"class_weights": self.class_weights(options["class_weights"])}

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
        loss_fn = self.loss(model, predictions=True)
        return lambda params, batch, model_state=None: loss_fn(params, batch, None, model_state)

    def score(self, loss: float, predictions: dict[str, np.ndarray], **how: Any) -> Scores:
        """What METRICS has for labels, and the confusion matrix (rows: wanted, columns: given).

        An answer that is not finite is wrong, and counted as "not_finite".
        """
        real = predictions["weights"] > 0
        wanted, given, scores = (predictions[k][real] for k in ("wanted", "given", "scores"))
        found = metrics.labels(wanted, given, self.labels.names, scores, **how)
        right = np.take_along_axis(scores, wanted[:, None], 1)[:, 0]
        return found._replace(rows={**found.rows, "loss": -np.log(np.maximum(right, 1e-38))})

    # ---- for people ----

    def shown(self, result: dict, questions: list, n: int) -> str:
        """The confusion matrices after the run."""
        tables = result["after"].get("tables", {})
        return "\n\n".join(
            f"  {name}, after: wanted in rows, given in columns\n{confusion_text(table)}"
            for name, table in tables.items()
            if name.endswith("/confusion")
        )


class MultiLabel(Classification):
    """Any number of labels for a text: a list of them, or one text of names with commas."""

    cleaned = False
    loss = staticmethod(losses.multi_label)
    options = ("kind", "focal_gamma", "class_weights")
    metrics = ("f1", "f1_micro", "accuracy")

    def labelled(self, report: dict) -> int:
        """As of Classification."""
        return max(report["documents"], 1)

    def read_wanted(self, record: dict, where: str) -> tuple[int, ...]:
        """The indices of the record's labels."""
        given = self.field(record, "label", where)
        given = [x.strip() for x in given.split(",")] if isinstance(given, str) else given
        if not isinstance(given, (list, tuple)):
            raise DataError(
                f"the labels are {given!r:.200}, expected a list of them, [] for none", where=where, kind="wrong_type"
            )
        found = sorted(self.labels.index(x, where) for x in given if x != "")
        if len(set(found)) < len(found):
            raise DataError(
                f"the labels {given!r:.200} name one twice; a 0 or 1 for each label is not read",
                "list the names, or the numbers, of those that the text has",
                where=where,
                kind="wrong_value",
            )
        return tuple(found)

    def placed(self, n: int, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
        """Each label's index + 1 at a token of its own, from the first on.

        Of a document with more labels than tokens the last labels are lost; see `examples`.
        """
        weights, targets = super().placed(n, 0)
        some = [i + 1 for i in wanted][:n]
        targets[: len(some)] = some
        return weights, targets

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Labelled]:
        """As of Texts. Raises: DataError for more labels than tokens."""
        found = super().examples(records, wheres)
        for one, where in zip(found, wheres, strict=True):
            if len(one.wanted) > len(one.tokens):
                problem = f"{len(one.wanted)} labels for a text of {len(one.tokens)} tokens"
                raise DataError(problem, "take the row out", where=where, kind="too_many_labels")
        return found

    def note(self, wanted: Any) -> str:
        """The labels' names."""
        return f"labels {', '.join(self.labels.names[i] for i in wanted) or 'none'}"

    def counted(self, targets: np.ndarray, weights: np.ndarray) -> Iterable[int]:
        """The labels of a document, from its arrays [n]."""
        return (targets[targets > 0] - 1).tolist()

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """As of Classification; an export says that its labels are not one of several."""
        return super().load_model(section, problem="multi_label_classification", **changes)

    def score(self, loss: float, predictions: dict[str, np.ndarray], **how: Any) -> Scores:
        """What is measured of labels of which a row has any number."""
        real = predictions["weights"] > 0
        wanted, scores = (predictions[k][real] for k in ("wanted", "scores"))
        return metrics.multi_labels(wanted > 0, scores, self.labels.names, **how)


class Pairs:
    """The records of a source as {"prompt": text, "completion": name of the label}."""

    def __init__(self, source: Source | None, task: Classification) -> None:
        self.source: Any = source  # None where only the form of the records is asked for
        self.task = task

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict:
        record, where = self.source[i], self.source.where(i)
        label = self.task.labels.names[self.task.read_wanted(record, where)]
        return {"prompt": self.task.read(record, where)[0], "completion": label}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def fingerprint(self) -> str:
        """That of the source, and the settings with which it is read."""
        return f"{self.source.fingerprint()} {self.task.key()}"


def confusion_text(table: dict) -> str:
    """A confusion matrix as aligned lines."""
    head = ["", *table["labels"]]
    rows = [head, *([n, *row] for n, row in zip(table["labels"], table["rows"], strict=True))]
    return textwrap.indent(columns(rows, range(len(head))), "  ")
