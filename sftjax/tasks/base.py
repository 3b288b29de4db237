"""What one kind of supervised task answers; nothing else of it is known elsewhere.

A task of your own is a class derived from Task in a file of yours, named in the config as
`task="path/to/file.py:ClassName"`; see experiments/custom_task.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sftjax import hf
from sftjax.data.packing.pack import CAUSAL, Layout
from sftjax.data.records.rejects import unread
from sftjax.data.records.sources import Source
from sftjax.data.token_store import Tally
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation import metrics
from sftjax.evaluation.metrics import Scores
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.models.base import Model
from sftjax.parallel.processes import to_host
from sftjax.step import Loss

LossFn = Callable[..., Loss]  # (params, batch, rng[, model_state]) -> Loss
# (params, batch[, model_state]) -> (Loss, {name: array with the rows of the batch in front})
EvalFn = Callable[..., tuple[Loss, dict[str, jax.Array]]]
# A task's own model, what its load_model gives: as a rule a models.base.Model, and no less than its `abstract` and
# `state`.
TaskModel = Any


class Example(NamedTuple):
    """An example; one of arrays of fixed shapes has no tokens to show."""

    arrays: tuple[np.ndarray, ...]
    text: str = ""
    spans: Sequence[tuple[int, int]] = ()
    note: str = ""
    tokens: np.ndarray = np.zeros(0, np.int32)
    weights: np.ndarray = np.zeros(0, np.float32)


class Task:
    """One kind of supervised task: from a record to an example, a loss, and a score.

    layout: how examples lie in the rows of a batch, which is the batch's schema.
    columns: {name: (dtype, shape)} of an example's arrays; shape None is one value a token. metrics: what is measured
    of each validation set, beside "loss"; eval.best is one of them. lower: those of which a lower value is the better
    one.
    counts: those of a step's metrics that are counts, of which the log shows rates.
    options: the keys of the config's section `loss` that the task reads; None: it may read all. loss: the function of
    sftjax.losses that `loss_fn` is made with.
    tokenizer: a fast Hugging Face tokenizer, or None where a task reads none.
    """

    layout: Layout = CAUSAL
    columns: Mapping[str, tuple[str, tuple[int, ...] | None]] = {}
    metrics: tuple[str, ...] = ()
    lower: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    counts: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...] | None] = None
    loss: ClassVar[Callable[..., Any]]
    tokenizer: Any = None
    varies: ClassVar[bool] = False  # data.augment is the task's own, and not of texts
    tallies: ClassVar[type[Tally]] = Tally  # what cuts and counts the examples of a source
    beside: tuple[str, ...] = ()  # fields that evaluation reads: eval.choices, eval.group

    @classmethod
    def of(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> "Task":
        """The task of a config. tokenizer: None where the config names none."""
        task = cls()
        task.tokenizer = tokenizer
        return task

    # ---- data: from records to examples ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list:
        """The example of each record. wheres: file and row of each, for errors.

        One has arrays, in the order of `columns`, a text for people to read, and spans, the characters of it that are
        trained; also tokens and weights where it has any, see Example.

        Raises: DataError for a record that cannot be an example.
        """
        raise NotImplementedError

    def fields_read(self, record: dict) -> set[str]:
        """The record's keys that `examples` reads; the others it leaves out."""
        raise NotImplementedError

    def left_out(self, record: dict, example: Any) -> Iterable[str]:
        """What the record holds and the example does not, in words that are counted by source."""
        return unread(record, {*self.fields_read(record), *self.beside})

    def key(self) -> list:
        """All settings, as JSON holds them, that change what `examples` gives of a record."""
        return [type(self).__name__]

    def length(self, example: Any) -> int:
        """Its number of tokens; 1 for an example of fixed shapes."""
        return 1 if self.layout.fixed else len(example.arrays[0])

    def tokens_of(self, arrays: tuple[np.ndarray, ...]) -> int:
        """How many tokens the arrays of an example, or a piece of one, hold; 1 of fixed shapes."""
        return 1 if self.layout.fixed else len(arrays[0])

    def cut(self, example: Any, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of what becomes of an example, each of at most max_length tokens (0 = all)."""
        return [example.arrays]

    def kept(self, example: Any, max_length: int, overlong: str) -> list[np.ndarray]:
        """What `cut` keeps, as the places of the tokens of each piece in the example."""
        return [np.arange(0 if self.layout.fixed else self.length(example))]

    def tally(self, max_length: int, overlong: str) -> Tally:
        """One of `tallies`, for a store or a part of it."""
        return self.tallies(self, max_length, overlong)

    def prepared(self, source: Source | None) -> tuple[Any, "Task", dict]:
        """(source, task, form): the source as cleaning and splitting read it.

        task encodes its records; form: the keywords with which `to_conversation` reads them. Raises: DataError where a
        task's records are no texts.
        """
        raise DataError(
            f"data.clean and data.split read texts, and {type(self).__name__} has none",
            "leave them out",
            kind="setting",
        )

    def answers_only(self) -> "Task":
        """The task that trains nothing but the last answers of records in the form of `canonical`."""
        raise DataError(
            "data.clean.rules: label_suspects asks a language model how likely the answers are:"
            f" {type(self).__name__} has none",
            kind="setting",
        )

    def summary(self, report: dict) -> str:
        """A line on what a store's report says is trained."""
        return f"{report['examples']:,} examples"

    def facts(self, report: dict) -> dict[str, str]:
        """{what: text} of a store's report that inspect shows beside the counts of tokens."""
        return {}

    def warnings(self, report: dict) -> Iterable[str]:
        """What a person should know of a store before training."""
        return ()

    def nothing_left(self, first: tuple[str, Any] | None, report: dict, max_length: int) -> str:
        """Why a store has no document. first: (where, example), or None."""
        lost = report["dropped"] | report["skipped"]
        return f"no example is left of {sum(lost.values())} rows ({counted(lost)})"

    def opened(self, report: dict) -> None:
        """Told the report of each store as it is opened, before rows are made of any."""

    def saw(self, reports: Sequence[dict]) -> None:
        """Told the reports of the training data's stores, before the loss is made."""

    # ---- model and loss ----

    def load_model(self, section: ConfigDict, **changes: Any) -> TaskModel:
        """The Model, without weights, of the config's section `model`; see models.base.Model.

        changes: fields of the model's own config, such as remat and split.
        """
        raise NotImplementedError

    def loss_fn(self, model: TaskModel, options: dict, sources: Sequence[str] = ()) -> LossFn:
        """The loss of training: `loss` with what is its own of the config's section `loss`.

        sources: the names of several sources; the batch says in `sources` which is whose.
        """
        return self.loss(model, **self.own(options), sources=sources)

    def own(self, options: dict) -> dict[str, Any]:
        """What `loss` takes of the config's section `loss`."""
        return {k: options[k] for k in self.options or () if k in options}

    def exported(self, params: Any, model_state: Any) -> Any:
        """The parameters as an export holds them, which knows no model_state."""
        return params

    # ---- evaluation ----

    def eval_fn(self, model: TaskModel, options: dict) -> EvalFn:
        """(params, batch, model_state) -> (Loss, predictions) in one forward pass.

        predictions: {name: array with the rows of the batch in front}, for `score`.
        """
        loss_fn = self.loss_fn(model, options)

        def evaluate(params, batch, model_state=None):
            state = () if model_state is None else (model_state,)
            return loss_fn(params, batch, None, *state), {}

        return evaluate

    def held(self, predictions: dict[str, jax.Array], final: bool) -> dict[str, np.ndarray]:
        """What is kept of a batch's predictions for `score`; final: at the beginning and the end of a run."""
        return {k: to_host(v) for k, v in predictions.items()}

    def score(
        self, loss: float, predictions: dict[str, np.ndarray], *, groups: Sequence | None = None, errors: bool = False
    ) -> Scores:
        """What a set scores, by its mean loss and the predictions of all its rows.

        errors: with standard errors and baselines: at the beginning and the end of a run. groups: what each document
        shares with others, which are not independent of it.
        """
        return Scores({})

    def lower_is_better(self, metric: str) -> bool:
        """metric: "<set>/<metric>", as eval.best names it."""
        name = metric.rpartition("/")[2]
        return name in self.lower or metrics.lower_is_better(name)

    generates: ClassVar[bool] = False  # data.test is questions, answered by generating text

    def questions(self, source: Source, shots: Callable[[int, dict], Sequence[dict]] | None = None) -> list:
        """What is asked of each record of data.test; where `generates`.

        shots: gives the training records that stand as examples before that of a number and record.
        """
        raise NotImplementedError

    def answers(
        self, model: TaskModel, params: Any, questions: list, groups: Sequence | None = None, **options: Any
    ) -> dict:
        """{"<score>": number, "answers": list of text}; options: as of generate.generate.

        Also, as of Scores, "errors", "baselines" and "tables" where it has them.
        """
        raise NotImplementedError

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a generated answer; the export lists them."""
        return []

    # ---- for people ----

    def shown(self, result: dict, questions: list, n: int) -> str:
        """Text under the table of results: n samples, a confusion matrix."""
        return ""

    def write_answers(self, path: Path, questions: list, before: dict, after: dict) -> None:
        """Every question with its answers, as JSON lines; where `generates`."""

    def try_it(self, section: ConfigDict, export: Path) -> str:
        """A command that uses the exported model; "" for none. section: the config's `data`."""
        return ""


READERS = {"text": "texts", "image": "images", "image_text": "images with texts"}


def read_model(section: ConfigDict, reads: str = "text", **changes: Any) -> Model:
    """hf.load_model of the config's section `model`. Raises: ConfigError where it names none.

    reads: a key of READERS; a model that reads what the task does not is refused too.
    """
    if not section.path:
        raise ConfigError("model.path is empty; give a Hugging Face directory or a hub id")
    model = hf.load_model(section.path, **changes)
    kinds = {"vision": "image_text", "image_size": "image"}
    found = next((kind for name, kind in kinds.items() if hasattr(model.config, name)), "text")
    if found != reads:
        raise ConfigError(f"model.path={section.path}: the model reads {READERS[found]}, the task {READERS[reads]}")
    return model


def perplexity(loss: float) -> float:
    """exp(loss), a number even where it is too large for one."""
    return math.exp(min(loss, 700.0))


def counted(counts: dict) -> str:
    """Counts by reason in words: "3 too_long, 1 bad_json"; "none" for {}."""
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) or "none"
