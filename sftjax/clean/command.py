"""Clean a data set, as `sftjax clean --config=FILE --out=clean.parquet --report=page.html` does.

Applies the rules of data.clean (all of them where none is named) to data.train, looking for rows of data.validation and
data.test too. Writes the rows that stay (.parquet or .jsonl), the rejects with their reasons, and a page to read. The
rule label_suspects asks the config's model which answers it finds least likely: it lists them, and removes them with
data.clean.remove_suspects.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax import hf, tasks
from sftjax.clean.prepare import clean_options
from sftjax.clean.report import summary, write_records, write_rejects, write_report
from sftjax.clean.rules import RULES, Findings, find
from sftjax.config import ConfigError
from sftjax.data import open_source
from sftjax.data.masking.conversation import canonical
from sftjax.data.records.sources import RecordSource
from sftjax.evaluation.likelihood import weighted
from sftjax.files import refuse_url
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.models.decoder import Model
from sftjax.terminal import show

LABELS = 20  # at most so many different answers are class labels
BATCH = 16  # rows whose losses are taken at a time


def main(argv: Sequence[str]) -> None:
    """Run the command line of `argv`, without the program's name."""
    config, flags = config_lib.parse(argv, out=None, report="", rejects="")
    clean(config, flags.out, flags.report, flags.rejects)


def clean(config: ConfigDict, out: Path | str, report: Path | str = "", rejects: Path | str = "") -> Findings:
    """Clean data.train into `out`; by default rejects go to out's name with .rejects.jsonl."""
    for what, path in dict(out=out, report=report, rejects=rejects).items():
        refuse_url(f"--{what}", path, ConfigError)
    d, out = config.data, Path(out)
    source = open_source(d.train, d.limit)
    rejects = Path(rejects or out.with_suffix(".rejects.jsonl"))
    rules = tuple(d.clean.rules) or ("all",)
    tokenizer = load_tokenizer(config) if d.tokenizer or config.model.path else None
    task = tasks.make(config, tokenizer)
    read, encoder, form = task.prepared(source)
    options = clean_options(config, task)
    inputs = {Path(r.path).resolve() for s in (source, *options["evaluation"]) for r in s.readers}
    for path in (out, rejects, Path(report or out)):
        if path.resolve() in inputs:
            raise ConfigError(f"{path} is read: write what is cleaned to another file")
    if "label_suspects" in rules:
        asked = (*_load_model(config, tokenizer), encoder, form, d.max_length)
        options["trust"] = lambda rows: trust(read, rows, *asked)
    findings = find(read, rules, **options)
    write_records(out, source, findings.kept)
    write_rejects(rejects, source, findings)
    show(f"{'cleaned':<10}{summary(findings)}")
    if listed := [r for r in findings.counts() if r not in findings.removes]:
        show(f"{'listed':<10}{', '.join(f'{findings.counts()[r]} {r}' for r in listed)}")
    show(f"{'rules':<10}{', '.join(findings.rules)}")
    if idle := [r for r in RULES if r not in findings.rules]:
        show(f"{'not asked':<10}{', '.join(idle)}")
    files: dict[str, Path | str] = dict(kept=out, rejects=rejects)
    if report:
        write_report(report, read, findings, d.train, options["form"])
        files["report"] = report
    for what, file in files.items():
        show(f"{what:<10}{file}")
    return findings


# ---- how far a model trusts the answers it is given ----------------------------------------------


def _load_model(config, tokenizer):
    path = config.model.path
    if not path:
        raise ConfigError("data.clean.rules: label_suspects needs a model: set model.path")
    model, params = hf.load_pretrained(path, dtype=config.model.dtype)
    if max(tokenizer.get_vocab().values()) >= model.config.vocab:
        raise ConfigError(
            f"label_suspects: the tokenizer has more tokens than the model's {model.config.vocab}: "
            "take the model's own (data.tokenizer), and no data.add_tokens"
        )
    return model, params


def trust(
    source: RecordSource,
    rows: Sequence[int],
    model: Model,
    params: dict[str, Any],
    task: tasks.Task,
    form: Mapping[str, Any],
    max_length: int,
) -> np.ndarray:
    """A number for each row, least for the answers that the model finds least likely, float64 [n].

    Where the answers are a few class labels, every label is tried; else it is one loss a row.
    """
    task = task.answers_only()
    records = [canonical(source[i], source.where(i), form) for i in rows]

    def losses_of(records):
        encoded = task.examples(records, [source.where(i) for i in rows])
        # Cut at the front: what counts is the answer, at the end.
        docs = [(e.tokens[-max_length:], e.weights[-max_length:]) for e in encoded]
        return -weighted(model, params, docs, batch_size=BATCH)[0], np.array([weights[1:].sum() for _, weights in docs])

    said = [[r.get("completion"), *(m["content"] for m in r.get("messages", ()))] for r in records]
    answers = [texts[0] if texts[0] is not None else texts[-1] for texts in said]
    labels = sorted(set(answers) - {None})
    if None in answers or not 2 <= len(labels) <= min(LABELS, len(rows) // 10):
        total, tokens = losses_of(records)
        return np.exp(-total / np.maximum(tokens, 1))  # the probability of the average token
    tried = [losses_of([_with_answer(r, label) for r in records])[0] for label in labels]
    return normalised_margin(np.stack(tried, 1), [labels.index(a) for a in answers])


def _with_answer(record, answer):
    if "completion" in record:
        return record | {"completion": answer}
    *before, last = record["messages"]
    return record | {"messages": [*before, last | {"content": answer}]}


def normalised_margin(loss: np.ndarray, given: Sequence[int] | np.ndarray) -> np.ndarray:
    """Trust in class labels, as in confident learning (Northcutt et al. 2021): [n] in [0, 1].

    How far the given label's probability is above the best other one's, each counted from the mean probability of that
    label where it is given: so a model that favours one label does no harm. loss: [n, K], of each row with each of K
    labels as its answer. given: int [n], the label it has.
    """
    loss, given = np.asarray(loss, np.float64), np.asarray(given)
    p = np.exp(loss.min(1, keepdims=True) - loss)
    p /= p.sum(1, keepdims=True)
    p -= [p[given == k, k].mean() if (given == k).any() else 0.0 for k in range(p.shape[1])]
    own = np.take_along_axis(p, given[:, None], 1)[:, 0]
    np.put_along_axis(p, given[:, None], -np.inf, 1)
    return (own - p.max(1) + 2) / 4
