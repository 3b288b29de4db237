"""What answers score: one table of metrics, computed by the packages that the field compares with.

scikit-learn measures labels and numbers, sacrebleu, rouge-score and seqeval texts and tags; the extra `metrics` brings
the last three. A metric of your own is a function of (wanted, given), two lists, that returns a number, or a list of
one for each row: "path/to/file.py:function".
"""

import functools
import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sftjax.errors import ConfigError
from sftjax.files import load_python

BINS = 10  # of the confidence, for calibration
RESAMPLES = 100  # of the bootstrap


class Metric(NamedTuple):
    """A row of METRICS."""

    kind: str  # of what: labels | numbers | texts | tags
    what: str
    lower: bool = False  # is a lower value the better one
    share: bool = True  # is it a share, shown in percent


METRICS: dict[str, Metric] = {
    "accuracy": Metric("labels", "share of rows with the right label"),
    "f1": Metric("labels", "mean over the labels of each one's F1 (macro)"),
    "f1_micro": Metric("labels", "F1 of all decisions together"),
    "f1_weighted": Metric("labels", "mean of the labels' F1, weighted by their rows"),
    "precision": Metric("labels", "mean over the labels of each one's precision (macro)"),
    "recall": Metric("labels", "mean over the labels of each one's recall (macro)"),
    "mcc": Metric("labels", "Matthews' correlation of labels wanted and given", share=False),
    "auroc": Metric("labels", "area under the ROC curve, of several labels one against the rest"),
    "ece": Metric("labels", "gap of confidence and accuracy, over ten bins", lower=True),
    "mae": Metric("numbers", "mean absolute error", lower=True, share=False),
    "rmse": Metric("numbers", "root of the mean squared error", lower=True, share=False),
    "r2": Metric("numbers", "share of the variance that is explained", share=False),
    "pearson": Metric("numbers", "linear correlation", share=False),
    "spearman": Metric("numbers", "correlation of ranks", share=False),
    "exact_match": Metric("texts", "share of equal texts, blanks at their ends aside"),
    "squad_em": Metric("texts", "the same without case, punctuation and articles"),
    "token_f1": Metric("texts", "F1 of words in common, normalised as of SQuAD"),
    "number": Metric("texts", "share of equal numbers after the pattern eval.answer"),
    "choice": Metric("texts", "share of questions whose reference is likeliest of the choices"),
    "bleu": Metric("texts", "sacrebleu's BLEU, 0 to 100", share=False),
    "chrf": Metric("texts", "sacrebleu's chrF2, 0 to 100", share=False),
    "rouge1": Metric("texts", "F-measure of single words in common, stemmed"),
    "rouge2": Metric("texts", "F-measure of pairs of words in common, stemmed"),
    "rougeL": Metric("texts", "F-measure of the longest common subsequence, stemmed"),
    "seqeval_f1": Metric("tags", "F1 of whole entities"),
}


class Scores(NamedTuple):
    """What was measured of one evaluation set.

    values: {"accuracy": a number}; they go into every log and table. tables: {"confusion": anything that JSON holds}.
    errors: standard errors of values. baselines: {"always good": {"accuracy": a number}}, what needs no model. rows: of
    metrics that are means, the value of each document, in the order of the predictions; under "weight" how much of the
    mean each is, where that differs. All but values are of the result alone.
    """

    values: dict[str, float]
    tables: Mapping[str, Any] = {}
    errors: Mapping[str, float] = {}
    baselines: Mapping[str, Mapping[str, float]] = {}
    rows: Mapping[str, np.ndarray] = {}


def lower_is_better(name: str) -> bool:
    """Of a row of METRICS; of a function of the user's a higher value is better."""
    return name in METRICS and METRICS[name].lower


def check(names: Sequence[str], kind: str) -> None:
    """Raise ConfigError for a metric that is none of this kind, and no file's function."""
    known = [name for name, metric in METRICS.items() if metric.kind == kind]
    for name in names:
        if ":" in name:
            users(name)
        elif name not in known:
            raise ConfigError(
                f"eval.metrics: {name!r} is no metric of {kind}; there are {', '.join(known)}, and"
                " your own as 'path/to/file.py:function'"
            )


# ---- standard errors -----------------------------------------------------------------------


def standard_error(rows: Sequence[float] | np.ndarray, groups: Sequence | None = None) -> float:
    """Of the mean of rows; NaN for fewer than two rows or groups.

    groups: a value for each row. Rows that share one are not independent: see Miller, "Adding Error Bars to Evals"
    (arXiv 2411.00640), equation 4.
    """
    x = np.asarray(rows, np.float64)
    if groups is None:
        return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
    _, which = np.unique(np.asarray(list(map(str, groups))), return_inverse=True)
    sums = np.bincount(which, x - x.mean()) if len(x) else np.zeros(0)
    return float(np.sqrt((sums**2).sum()) / len(x)) if len(sums) > 1 else float("nan")


def bootstrap(fn: Callable[[np.ndarray], dict[str, float]], n: int, groups: Sequence | None = None) -> dict[str, float]:
    """Standard errors of fn(indices of rows) by drawing rows, or whole groups, with replacement."""
    rng, found = np.random.default_rng(0), list[dict[str, float]]()
    _, which = np.unique(range(n) if groups is None else list(map(str, groups)), return_inverse=True)
    members = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
    for _ in range(RESAMPLES if len(members) > 1 else 0):
        drawn = rng.integers(len(members), size=len(members))
        found.append(fn(np.concatenate([members[i] for i in drawn])))
    # A metric that a draw leaves undefined, as AUROC of one class, says nothing there.
    every = {name: [one[name] for one in found if name in one] for one in found for name in one}
    return {k: float(np.std(v, ddof=1)) for k, v in every.items() if len(v) > 1}


def _spread(fn, rows, groups) -> dict[str, float]:
    """Standard errors of fn(indices): of means over `rows` exactly, of the rest by drawing."""
    exact = {name: standard_error(values, groups) for name, values in rows.items()}
    return bootstrap(fn, len(next(iter(rows.values()))), groups) | exact


# ---- labels --------------------------------------------------------------------------------


def labels(
    wanted: np.ndarray,
    given: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None = None,
    groups: Sequence | None = None,
    errors: bool = False,
) -> Scores:
    """Of indices into names [N]; given is -1 where the answer is no label, which is wrong.

    scores: probabilities [N, C], for AUROC and calibration. errors: standard errors too.
    """
    n = len(wanted)

    def measure(at: Any = slice(None)) -> dict[str, float]:
        return _label_values(wanted[at], given[at], len(names), None if scores is None else scores[at])

    rows = {"accuracy": (wanted == given).astype(np.float64)}
    usual = int(np.bincount(wanted).argmax())
    baseline = _label_values(wanted, np.full(n, usual), len(names), None)
    baselines = {f"always {names[usual]}": {k: baseline[k] for k in ("accuracy", "f1")}}
    lost = float((given < 0).sum())
    values = measure() | ({"not_finite": lost} if lost else {})
    spread = _spread(measure, rows, groups) if errors else {}
    return Scores(values, _label_tables(wanted, given, names, scores), spread, baselines, rows)


def _label_values(wanted, given, classes, scores) -> dict[str, float]:
    from sklearn import metrics as sk

    every: Any = list(range(classes))
    values, options = {}, dict[str, Any](labels=every, zero_division=0.0)
    with warnings.catch_warnings(action="ignore"):  # of labels not there; each value has its rule
        for ending, average in {"_micro": "micro", "_weighted": "weighted", "": "macro"}.items():
            found = sk.precision_recall_fscore_support(wanted, given, average=average, **options)
            values[f"f1{ending}"] = found[2]
        values["precision"], values["recall"] = found[:2]  # the mean over labels, as f1 is
        values["accuracy"] = sk.accuracy_score(wanted, given)
        values["mcc"] = sk.matthews_corrcoef(wanted, given)
        if scores is not None and np.isfinite(scores).all():
            if len(np.unique(wanted)) == classes:  # else it is not defined
                chosen = scores[:, 1] if classes == 2 else scores
                how: Any = dict(multi_class="ovr", average="macro", labels=every)
                values["auroc"] = sk.roc_auc_score(wanted, chosen, **how)
            bins = _bins(wanted, scores)
            values["ece"] = sum(share * abs(mean - right) for share, mean, right in bins)
    return {k: float(values[k]) for k in METRICS if k in values}  # in the table's order


def _bins(wanted, scores) -> list[tuple[float, float, float]]:
    """(share of rows, mean confidence, share right) of each bin of confidence that has rows."""
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == wanted
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    picked = (which == i for i in np.unique(which))
    return [(float(x.mean()), float(confidence[x].mean()), float(right[x].mean())) for x in picked]


def _rates(names, found) -> dict[str, dict]:
    """Of each label what precision_recall_fscore_support found of it."""
    return {
        name: dict(precision=float(p), recall=float(r), f1=float(f), n=int(n))
        for name, p, r, f, n in zip(names, *found, strict=True)
    }


def _per_label(wanted, given, names, **how: Any) -> dict[str, dict]:
    from sklearn.metrics import precision_recall_fscore_support as rates

    return _rates(names, rates(wanted, given, average=None, zero_division=0.0, **how))


def _label_tables(wanted, given, names, scores) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix

    every: Any = range(len(names))
    each = _per_label(wanted, given, names, labels=every)
    rows = confusion_matrix(wanted, given, labels=every).tolist()
    tables: dict[str, Any] = {"confusion": {"labels": list(names), "rows": rows}, "per_label": each}
    if scores is not None and np.isfinite(scores).all():
        keys = ("share", "confidence", "accuracy")
        tables["calibration"] = [dict(zip(keys, x, strict=True)) for x in _bins(wanted, scores)]
    return tables


def multi_labels(
    wanted: np.ndarray, scores: np.ndarray, names: Sequence[str], groups: Sequence | None = None, errors: bool = False
) -> Scores:
    """Of any number of labels a row: wanted bool [N, C], scores [N, C], probabilities.

    A label is given from a probability of one half on; accuracy is the share of rows of which all labels are right. A
    row whose scores are not finite is given none.
    """
    lost = ~np.isfinite(scores).all(1)
    given = np.where(lost[:, None], 0.0, scores) >= 0.5
    values = _multi_values(wanted, given, None if lost.any() else scores)
    values |= {"not_finite": float(lost.sum())} if lost.any() else {}
    rows = {"accuracy": (given == wanted).all(1).astype(np.float64)}
    some = lambda at: _multi_values(wanted[at], given[at], None)  # noqa: E731
    spread = _spread(some, rows, groups) if errors else {}
    usual = np.broadcast_to(wanted.mean(0) >= 0.5, wanted.shape)
    baselines = {"each label's majority": _multi_values(wanted, usual, None)}
    tables = {"per_label": _per_label(wanted.astype(int), given.astype(int), names)}
    return Scores(values, tables, spread, baselines, rows)


def _multi_values(wanted, given, scores) -> dict[str, float]:
    from sklearn import metrics as sk

    values = {"accuracy": float((wanted == given).all(1).mean())}
    rate: Any = functools.partial(sk.f1_score, wanted.astype(int), given.astype(int), zero_division=0.0)
    values |= {"f1": float(rate(average="macro")), "f1_micro": float(rate(average="micro"))}
    both = wanted.any(0) & ~wanted.all(0)  # else a label's curve is not defined
    if scores is not None and both.any():
        values["auroc"] = float(sk.roc_auc_score(wanted[:, both], scores[:, both]))
    return values


# ---- numbers -------------------------------------------------------------------------------


def numbers(wanted: np.ndarray, given: np.ndarray, groups: Sequence | None = None, errors: bool = False) -> Scores:
    """Of numbers [N]; the baseline answers the mean of those wanted.

    Answers that are not finite are counted as "not_finite", and no error is a number then.
    """
    wanted, given = np.asarray(wanted, np.float64), np.asarray(given, np.float64)
    if lost := int((~np.isfinite(given)).sum()):
        return Scores({"mae": np.nan, "rmse": np.nan, "not_finite": float(lost)})
    rows = {"mae": np.abs(wanted - given)}
    some = lambda at: _number_values(wanted[at], given[at])  # noqa: E731
    spread = _spread(some, rows, groups) if errors else {}
    mean = _number_values(wanted, np.full(len(wanted), wanted.mean()))
    baselines = {"the mean": {k: mean[k] for k in ("mae", "rmse")}}
    return Scores(_number_values(wanted, given), {}, spread, baselines, rows)


def _number_values(wanted, given) -> dict[str, float]:
    from scipy import stats
    from sklearn import metrics as sk

    values = dict(mae=sk.mean_absolute_error(wanted, given), rmse=sk.root_mean_squared_error(wanted, given))
    if len(wanted) > 1:
        values["r2"] = sk.r2_score(wanted, given)
        if np.ptp(wanted) and np.ptp(given):  # a correlation with a constant is not defined
            values["pearson"] = stats.pearsonr(wanted, given)[0]
            values["spearman"] = stats.spearmanr(wanted, given)[0]
    return {k: float(v) for k, v in values.items()}


# ---- texts and tags ------------------------------------------------------------------------


def texts(
    names: Sequence[str],
    wanted: Sequence[str | Sequence[str]],
    given: Sequence[str],
    *,
    answer: str = "",
    baselines: Mapping[str, Sequence[str]] | None = None,
    groups: Sequence | None = None,
    errors: bool = False,
) -> Scores:
    """Of answers, by the metrics of these names.

    wanted: the reference of each row, or several: metrics of rows take the best, others the first. answer: the pattern
    before a number, or around its group (`number`); "" = the last number. baselines: other answers to the same
    questions, such as the first sentences. Raises: ConfigError for a package that is not there, or a pattern that is
    none.
    """
    n = len(wanted)
    rows, values, spread = dict[str, np.ndarray](), dict[str, float](), dict[str, float]()

    def measure(name: str, at: Sequence[int]) -> float | np.ndarray:
        w, g = ([x[i] for i in at] for x in (wanted, given))
        return _text_metric(name, w, g, answer)

    for name in names:
        found = measure(name, range(n))
        values[name] = float(np.mean(found))
        if isinstance(found, np.ndarray):
            rows[name] = found
            spread |= {name: standard_error(found, groups)} if errors else {}
        elif errors and ":" not in name:  # a function of the user's may take its time
            some: Any = lambda at, name=name: {name: measure(name, at)}  # noqa: E731
            spread |= bootstrap(some, n, groups)
    others = {what: texts(names, wanted, answers, answer=answer).values for what, answers in (baselines or {}).items()}
    return Scores(values, {}, spread, others, rows)


def _text_metric(name, wanted, given, answer) -> float | np.ndarray:
    """A number for the set, or one for each row."""
    every = [[w] if isinstance(w, str) else w for w in wanted]
    if name in ROWS:
        best = [max(ROWS[name](x, g) for x in some) for some, g in zip(every, given, strict=True)]
        return np.array(best, np.float64)
    wanted = [some[0] for some in every]
    if name == "number":
        w, g = ([number(t, answer) for t in some] for some in (wanted, given))
        if lost := [t for t, x in zip(wanted, w, strict=True) if x is None]:
            raise ConfigError(
                f"eval.answer={answer!r}: {len(lost)} of {len(wanted)} references hold no number"
                f" there, the first of them {lost[0]!r:.120}"
            )
        return np.array([x == y for x, y in zip(w, g, strict=True)], np.float64)
    if name.startswith("rouge"):
        scorer = package("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)
        return np.array([scorer.score(w, g)[name].fmeasure for w, g in zip(wanted, given, strict=True)])
    if name in ("bleu", "chrf"):
        return float(getattr(package("sacrebleu"), f"corpus_{name}")(given, [wanted]).score)
    out = users(name)(wanted, given)
    if np.ndim(out) == 0:
        return float(out)
    if len(out) != len(wanted):
        raise ConfigError(f"eval.metrics: {name} gave {len(out)} values for {len(wanted)} rows")
    return np.asarray(out, np.float64)


def tags(
    wanted: Sequence[Sequence[str]],
    given: Sequence[Sequence[str]],
    groups: Sequence | None = None,
    errors: bool = False,
) -> Scores:
    """Of tags of words, such as B-PER, a list for each row: seqeval's F1 of whole entities.

    rows: of each row the share of right tags. tables: precision, recall and F1 of each type.
    """
    wanted, given = ([list(map(str, row)) for row in some] for some in (wanted, given))
    seqeval = package("seqeval.metrics.sequence_labeling")
    with warnings.catch_warnings(action="ignore"):  # of tags that are no entities'
        found = [[set(seqeval.get_entities(row)) for row in some] for some in (wanted, given)]
        rates = seqeval.precision_recall_fscore_support(wanted, given, average=None)
    kinds = sorted({kind for some in found for row in some for kind, _, _ in row})
    # [rows, 2]: entities that are right, and all that are wanted or given
    counts = np.array([(len(w & g), len(w) + len(g)) for w, g in zip(*found, strict=True)])

    def f1(at: Any = slice(None)) -> dict[str, float]:
        right, total = counts[at].sum(axis=0)
        return {"seqeval_f1": float(2 * right / total) if total else 0.0}

    spread = bootstrap(f1, len(wanted), groups) if errors else {}
    same = [np.mean(np.array(w) == np.array(g)) for w, g in zip(wanted, given, strict=True)]
    rows = {"accuracy": np.array(same), "weight": np.array([*map(len, wanted)], np.float64)}
    return Scores(f1(), {"per_entity": _rates(kinds, rates)}, spread, {"always O": {"seqeval_f1": 0.0}}, rows)


# ---- one answer beside one reference -----------------------------------------------------------


def squad_words(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation compares them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(wanted: str, given: str) -> float:
    """F1 of the words in common."""
    w, g = squad_words(wanted), squad_words(given)
    common = sum((Counter(w) & Counter(g)).values())
    if not w or not g:
        return float(w == g)
    return 2 * common / (len(w) + len(g))


ROWS: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda w, g: w.strip() == g.strip(),
    "squad_em": lambda w, g: squad_words(w) == squad_words(g),
    "token_f1": token_f1,
}
# A sign counts where no word or number stands before it, a comma where it groups thousands.
_NUMBER = r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"


def number(text: str, pattern: str) -> float | None:
    """The number after the last place of a pattern, or in its group; None where there is none."""
    try:
        found = list(re.finditer(pattern, text)) if pattern else []
    except re.error as e:
        raise ConfigError(f"eval.answer={pattern!r} is no regular expression: {e}") from None
    if found:
        last = found[-1]
        text = (last[1] or "") if last.groups() else text[last.end() :]
    numbers = re.findall(_NUMBER, text) if found or not pattern else []
    return float(numbers[0 if pattern else -1].replace(",", "")) if numbers else None


def lead(text: str, n: int) -> str:
    """The first n sentences of a text; a sentence ends at ., ! or ? before a blank."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:n])


# ---- what others bring -------------------------------------------------------------------------


def package(name: str) -> Any:
    """A module of the extra `metrics`. Raises: ConfigError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"this metric needs {name.partition('.')[0].replace('_', '-')}, which is not installed:"
            " pip install 'sftjax[metrics]'"
        ) from None


@functools.cache
def users(name: str) -> Callable[[list, list], Any]:
    """The function that "path/to/file.py:function" names. Raises: ConfigError."""
    path, _, function = name.rpartition(":")
    found = getattr(load_python(path, "eval.metrics"), function, None)
    if not callable(found):
        raise ConfigError(f"eval.metrics: {path} has no function {function}")
    return found
