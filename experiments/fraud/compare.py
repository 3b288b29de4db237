"""Models of scikit-learn on the same rows, and the table of all results in README.md.

    python experiments/fraud/compare.py [runs/fraud_data [runs]]

The table has what runs/fraud_0 to fraud_2 and fraud_shuffled_0 to fraud_shuffled_2 have measured on
test.jsonl, their means, and, where it is there, runs/fraud_text (of other rows). Gradient boosting
has two settings; both are shown, with what validation.jsonl says of them. Errors are those of a
bootstrap over test rows, or, of the mean of three seeds, the standard deviation of the seeds.
"""

import json
import sys
from pathlib import Path

import numpy as np

from sftjax.evaluation import metrics
from sftjax.files import load_python, write_atomic

HERE = Path(__file__).parent
SEEDS = 3
BEGIN, END = "<!-- written by compare.py -->", "<!-- end -->"
task = load_python(str(HERE / "task.py"), "task")
NAMES = task.Fraud.metrics
BOOSTING = {
    "gradient boosting, defaults": {},
    "gradient boosting, slower (rate 0.05, 15 leaves, L2 1)": dict(
        learning_rate=0.05, max_leaf_nodes=15, l2_regularization=1.0
    ),
}


def arrays(path):
    """(numbers [n, NUMBERS], categories [n, CATEGORIES], labels [n]), as the task reads them."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    wheres = [f"{path}:{i}" for i in range(1, len(lines) + 1)]
    found = (example.arrays for example in task.Fraud().examples(lines, wheres))
    return tuple(np.stack(x) for x in zip(*found, strict=True))


def one_hot(numbers, categories, mean, std):
    parts = [np.eye(len(k))[categories[:, i]] for i, k in enumerate(task.CATEGORIES.values())]
    return np.concatenate([(numbers - mean) / std, *parts], 1)


def scikit_learn(data):
    """{model: {set: its scores [n] of fraud}}."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    x, c, y = data["train"]
    mean, std = x.mean(0), x.std(0)
    own = [len(task.NUMBERS) + i for i in range(len(task.CATEGORIES))]  # of categories
    linear = LogisticRegression(max_iter=2000).fit(one_hot(x, c, mean, std), y)
    give = lambda model, rows: model.predict_proba(rows)[:, 1]  # noqa: E731
    found = {"logistic regression": {k: give(linear, one_hot(x, c, mean, std)) for k, (x, c, _) in data.items()}}
    for name, how in BOOSTING.items():
        trees = HistGradientBoostingClassifier(categorical_features=own, random_state=0, **how)
        trees.fit(np.concatenate([x, c], 1), y)
        both = {k: np.concatenate([x, c], 1) for k, (x, c, _) in data.items()}
        found[name] = {k: give(trees, rows) for k, rows in both.items()}
    return found


def measured(workdir, name):
    """({metric: value}, {metric: standard error}) that a run has measured of a set at its end."""
    result = json.loads((Path(workdir) / "result.json").read_text())["after"]
    pick = lambda of: {k: of[f"{name}/{k}"] for k in NAMES if f"{name}/{k}" in of}  # noqa: E731
    return pick(result["losses"]), pick(result["errors"])


def line(what, values, errors=None, extra=""):
    cells = [f"{values[k]:.3f}" + (f" ± {errors[k]:.3f}" if errors else "") if k in values else "" for k in NAMES]
    return f"| {what}{extra} | {' | '.join(cells)} |"


def table(data, runs):
    """The lines of the table."""
    y = data["test"][2]
    lines = ["| test.jsonl | AUROC | average precision | precision at recall 0.5 |"]
    lines += ["|---|---|---|---|", line("all alike", task.scores(y, np.zeros(len(y))))]
    for name, given in scikit_learn(data).items():
        values = task.scores(y, given["test"])
        some = lambda at, s=given["test"]: task.scores(y[at], s[at])  # noqa: E731
        seen = task.scores(data["validation"][2], given["validation"])["average_precision"]
        extra = f" (average precision on validation.jsonl {seen:.3f})"
        lines.append(line(name, values, metrics.bootstrap(some, len(y)), extra))
    for what, start in (("MLP", "fraud"), ("MLP, shuffled labels", "fraud_shuffled")):
        paths = [runs / f"{start}_{i}" for i in range(SEEDS)]
        seeds = {i: measured(p, "test") for i, p in enumerate(paths) if (p / "result.json").exists()}
        lines += [line(f"{what}, seed {i}", *found) for i, found in seeds.items()]
        if len(seeds) > 1:
            each = {k: np.array([values[k] for values, _ in seeds.values()]) for k in NAMES}
            mean, spread = ({k: of(v) for k, v in each.items()} for of in (np.mean, _spread))
            lines.append(line(f"**{what}, mean of {len(seeds)} seeds**", mean, spread))
    if (runs / "fraud_text/result.json").exists():
        values, errors = measured(runs / "fraud_text", "text_test")
        few = " (2,000 rows to train, 2,000 to test)"
        lines.append(line("MiniLM on texts", values, errors, few))
    return lines


def _spread(values):
    return np.std(values, ddof=1)


def main(data="runs/fraud_data", runs="runs", readme=HERE / "README.md"):
    """Write the table into a README, between its two marks, and return its lines."""
    sets = {k: arrays(Path(data) / f"{k}.jsonl") for k in ("train", "validation", "test")}
    lines = table(sets, Path(runs))
    print("\n".join(lines))
    text = Path(readme).read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_atomic(readme, "\n".join([before + BEGIN, *lines, END + rest.split(END)[1]]))
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:3])
