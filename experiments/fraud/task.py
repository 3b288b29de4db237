"""A table with numbers and categories, and a rare label: an MLP of one's own, as a task in a file.

A record has the columns of NUMBERS and CATEGORIES, and `fraud`, 0 or 1. Categories are embedded;
numbers are normalised by mean and standard deviation of the training rows, which are the model's
model_state, so that a checkpoint measures other rows by the same two.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sftjax.data.packing.pack import FixedRows
from sftjax.data.token_store import Tally
from sftjax.errors import ConfigError, DataError
from sftjax.evaluation import metrics
from sftjax.params import Param
from sftjax.step import Loss
from sftjax.tasks import Example, Scores, Task

NUMBERS = ("amount", "hour", "age", "account_days", "distance_km", "payments_last_hour")
SKEWED = ("amount", "account_days", "distance_km")  # read as log(1 + x)
CATEGORIES = {
    "country": ("DE", "FR", "GB", "ES", "IT", "NL", "US", "BR"),
    "shop": ("grocery", "fuel", "travel", "electronics", "fashion", "gaming", "jewellery"),
    "channel": ("chip", "contactless", "online", "phone"),
}
EMBED, WIDTHS = 8, (128, 64)  # of each category; of the hidden layers
DROPOUT = 0.2  # of what each hidden layer gives
RECALL = 0.5  # of the fraud that is to be found


class Model:
    """Parameters and model_state as abstract trees, and the forward pass."""

    def __init__(self, mean, std):
        """mean, std: float [NUMBERS], of the training rows' numbers."""
        normal, he, zeros = (
            jax.nn.initializers.normal(0.3),
            jax.nn.initializers.he_normal(),
            jax.nn.initializers.zeros,
        )
        embed = {name: {"w": Param((len(known), EMBED), (None, None), normal)} for name, known in CATEGORIES.items()}
        sizes = (len(NUMBERS) + EMBED * len(CATEGORIES), *WIDTHS, 1)
        layers = {
            str(i): {"w": Param((n, m), (None, None), he), "b": Param((m,), (None,), zeros)}
            for i, (n, m) in enumerate(itertools.pairwise(sizes))
        }
        self.abstract = {"embed": embed, "layers": layers}
        given = lambda x: lambda _, shape, dtype: jnp.asarray(x, dtype)  # noqa: E731
        moments = {"mean": mean, "std": std}
        self.state = {k: Param((len(NUMBERS),), (None,), given(v)) for k, v in moments.items()}

    def apply(self, params, model_state, numbers, categories, rng=None):
        """Logits of fraud [B] of numbers [B, NUMBERS] and categories [B, CATEGORIES]."""
        x = [(numbers - model_state["mean"]) / model_state["std"]]
        x += [params["embed"][name]["w"][categories[:, i]] for i, name in enumerate(CATEGORIES)]
        x = jnp.concatenate(x, 1)
        for i in range(len(WIDTHS)):
            layer = params["layers"][str(i)]
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
            if rng is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(rng, i), 1 - DROPOUT, x.shape)
                x = jnp.where(kept, x / (1 - DROPOUT), 0.0)
        last = params["layers"][str(len(WIDTHS))]
        return (x @ last["w"] + last["b"])[:, 0]


class Fraud(Task):
    """See the module's text. loss.class_weights: "", "balanced", or two numbers: "1,20"."""

    layout = FixedRows(
        (
            ("numbers", (len(NUMBERS),), np.float32),
            ("categories", (len(CATEGORIES),), np.int32),
            ("fraud", (), np.float32),
        )
    )
    columns = {
        "numbers": ("float32", (len(NUMBERS),)),
        "categories": ("int32", (len(CATEGORIES),)),
        "fraud": ("float32", ()),
    }
    metrics = ("auroc", "average_precision", "precision_at_recall")
    counts: ClassVar = ("examples",)
    options: ClassVar = ("class_weights",)
    mean, std = np.zeros(len(NUMBERS)), np.ones(len(NUMBERS))  # once the training rows are known
    share = 0.5  # of fraud, in them

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Example]:
        """The arrays of each record."""
        return [self._example(*pair) for pair in zip(records, wheres, strict=True)]

    def _example(self, record, where):
        numbers = [_number(record, name, where) for name in NUMBERS]
        categories = [_category(record, name, where) for name in CATEGORIES]
        label = _field(record, "fraud", where)
        if label not in (0, 1):
            problem = f"field 'fraud' is {label!r:.200}, expected 0 or 1"
            raise DataError(problem, where=where, kind="wrong_value")
        arrays = np.float32(numbers), np.int32(categories), np.float32(label)
        text = ", ".join(f"{k} {record[k]}" for k in (*NUMBERS, *CATEGORIES))
        return Example(arrays, text=text, note=f"fraud {int(label)}")

    def fields_read(self, record: dict) -> set[str]:
        return {*NUMBERS, *CATEGORIES, "fraud"} & set(record)

    def key(self) -> list:
        return [type(self).__name__, NUMBERS, SKEWED, CATEGORIES]

    def tally(self, max_length: int, overlong: str) -> Tally:
        """A Tally that sums the numbers too."""
        return ColumnTally(self, max_length, overlong)

    def saw(self, reports: Sequence[dict]) -> None:
        """The reports of the training rows, and of no others: what numbers are normalised by."""
        n, total, squares, fraud = (
            np.sum([r[k] for r in reports], 0) for k in ("documents", "number_sums", "number_squares", "fraud")
        )
        self.mean = total / n
        std = np.sqrt(np.maximum(squares / n - self.mean**2, 0.0))
        self.std = np.where(std > 1e-6 * np.maximum(np.abs(self.mean), 1e-6), std, 1.0)
        self.share = fraud / n

    def summary(self, report: dict) -> str:
        n, fraud = report["documents"], report["fraud"]
        return f"{n:,} rows, {fraud:,} ({fraud / n:.2%}) of them fraud"

    # ---- model and loss ----

    def load_model(self, section: Any, **changes: Any) -> Model:
        return Model(self.mean, self.std)

    def class_weights(self, text: str) -> tuple[float, float]:
        """The weights of 0 and of 1. Raises: ConfigError."""
        if not text:
            return 1.0, 1.0
        if text == "balanced":
            if not 0 < self.share < 1:
                raise ConfigError("loss.class_weights='balanced': the training rows have one class")
            return 0.5 / (1 - self.share), 0.5 / self.share
        try:
            weights = tuple(float(x) for x in text.split(","))
        except ValueError:
            weights = ()
        if len(weights) != 2 or not all(0 <= x < math.inf for x in weights) or not sum(weights):
            raise ConfigError(
                f"loss.class_weights={text!r}: expected 'balanced', or a number of 0 or more for 0"
                " and for 1, such as '1,20'"
            )
        return weights

    def _loss(self, model, params, batch, rng, model_state, weights):
        real = batch["weights"] > 0
        logits = model.apply(params, model_state, batch["numbers"], batch["categories"], rng)
        each = optax.sigmoid_binary_cross_entropy(logits, batch["fraud"])
        w = jnp.where(real, jnp.where(batch["fraud"] > 0, weights[1], weights[0]), 0.0)
        counts = {"examples": (jnp.sum(batch["weights"]), None)}
        total = jnp.sum(jnp.where(real, each, 0.0) * w)
        return Loss(total, jnp.sum(w), counts, state=model_state), logits

    def loss_fn(self, model: Model, options: dict, sources: Sequence[str] = ()):
        """Binary cross-entropy, each row weighed by its class."""
        weights = self.class_weights(options["class_weights"])
        return lambda params, batch, rng, model_state: self._loss(model, params, batch, rng, model_state, weights)[0]

    # ---- evaluation ----

    def eval_fn(self, model: Model, options: dict):
        """The plain loss, whatever the weights in training, and the logits."""

        def evaluate(params, batch, model_state):
            loss, logits = self._loss(model, params, batch, None, model_state, (1.0, 1.0))
            return loss, dict(given=logits, wanted=batch["fraud"], weights=batch["weights"])

        return evaluate

    def score(self, loss: float, predictions: dict, groups: Sequence | None = None, errors: bool = False) -> Scores:
        """With errors also standard errors, and what a score that knows nothing gets."""
        wanted, given = _real(predictions)
        if not errors:
            return Scores(scores(wanted, given))
        some = lambda at: scores(wanted[at], given[at])  # noqa: E731
        found = metrics.bootstrap(some, len(wanted), groups)
        nothing = {"all alike": scores(wanted, np.zeros(len(wanted)))}
        return Scores(scores(wanted, given), {}, found, nothing)


class ColumnTally(Tally):
    """Sums the numbers, their squares and the labels too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums, self.fraud = np.zeros((2, len(NUMBERS))), 0

    def count(self, pieces):
        super().count(pieces)
        if pieces:
            numbers = np.stack([numbers for numbers, _, _ in pieces]).astype(np.float64)
            self.sums += numbers.sum(0), (numbers**2).sum(0)
            self.fraud += sum(int(fraud) for _, _, fraud in pieces)

    def report(self, skipped):
        total, squares = self.sums.tolist()
        own = dict(number_sums=total, number_squares=squares, fraud=self.fraud)
        return super().report(skipped) | own


def _field(record, name, where):
    if name not in record:
        problem = f"no field {name!r}; the row has {', '.join(map(repr, record)) or 'none'}"
        raise DataError(problem, "give every row all columns", where=where, kind="missing_field")
    return record[name]


def _number(record, name, where):
    x = _field(record, name, where)
    least, skewed = (0.0, " of 0 or more") if name in SKEWED else (-math.inf, "")
    plain = isinstance(x, (int, float)) and not isinstance(x, bool)
    if not plain or not (least <= x and abs(x) < 1e30):
        problem = f"field {name!r} is {x!r:.200}, expected a finite number{skewed}"
        raise DataError(problem, where=where, kind="wrong_value")
    return math.log1p(x) if skewed else x


def _category(record, name, where):
    x, known = _field(record, name, where), CATEGORIES[name]
    if x not in known:
        problem = f"field {name!r} is {x!r:.200}, expected one of {', '.join(known)}"
        raise DataError(problem, "add it to CATEGORIES", where=where, kind="wrong_value")
    return known.index(x)


def _real(predictions):
    """(labels, scores) of the rows that are there; a score that is not finite is the lowest."""
    real = predictions["weights"] > 0
    wanted, given = (predictions[k][real].astype(np.float64) for k in ("wanted", "given"))
    return wanted, np.where(np.isfinite(given), given, -1e30)


def precision_at_recall(wanted, given, recall=RECALL):
    """The best precision of all thresholds at which at least this share of the ones is found."""
    from sklearn.metrics import precision_recall_curve

    precision, found, _ = precision_recall_curve(wanted, given)
    return float(precision[found >= recall].max())


def scores(wanted, given) -> dict[str, float]:
    """What a score [N] is worth for labels [N] of 0 and 1; {} where one of them is not there."""
    from sklearn import metrics as sk

    if len(np.unique(wanted)) < 2:
        return {}
    return {
        "auroc": float(sk.roc_auc_score(wanted, given)),
        "average_precision": float(sk.average_precision_score(wanted, given)),
        "precision_at_recall": precision_at_recall(wanted, given),
    }
