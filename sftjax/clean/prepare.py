"""The training rows of a config: cleaned, then parted from validation."""

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sftjax.clean.report import summary, write_rejects, write_report
from sftjax.clean.rules import Finding, find_once
from sftjax.clean.split import Subset, split
from sftjax.config import ConfigError
from sftjax.data import open_source
from sftjax.data.mixing import stream
from sftjax.data.records.sources import RecordSource
from sftjax.data.token_store import store_key
from sftjax.tasks import Task


class Prepared(NamedTuple):
    """The rows of a config, and the task that encodes them."""

    train: RecordSource
    validation: Subset | None  # rows held out of data.train
    task: Task  # encodes both
    notes: list[str]  # what was done, a line each
    removed: dict[int, Finding]  # by row of data.train: what cleaning took out


def training_rows(config: ConfigDict, task: Task, cache_dir: Path | str, workdir: Path | str | None = None) -> Prepared:
    """The rows of data.train as data.clean and data.split want them.

    Of a stream, only the first rows of its shards: see `data.stream.sample`. cache_dir: where what cleaning found is
    kept, so that a restart does not look again. workdir: where the rejects and the report of cleaning are written; None
    = not at all.
    """
    d, notes, held_out, removed = config.data, [], None, {}
    if d.split.share and d.validation:
        raise ConfigError(
            "data.split.share takes validation rows from data.train, but data.validation is set too: keep one of them"
        )
    source: RecordSource
    source = stream.sample(d.train) if d.streaming else open_source(d.train, d.limit)
    if d.augment and not task.varies:
        raise ConfigError(
            f"data.augment={d.augment}: variants are of images; of texts, write a file of them, as"
            " experiments/augment does"
        )
    options = clean_options(config, task) if d.clean.rules else {}
    if d.clean.rules or d.split.share:
        source, task, form = task.prepared(source)
    if d.clean.rules:
        key = store_key(source, task, d.max_length, d.overlong)
        findings = find_once(cache_dir, key, source, tuple(d.clean.rules), **options)
        notes.append(summary(findings))
        if workdir is not None:
            rejects, report = Path(workdir) / "rejects.jsonl", Path(workdir) / "clean_report.html"
            write_rejects(rejects, source, findings)
            write_report(report, source, findings, d.train, options["form"])
            notes[-1] += f"; see {rejects} and {report.name}"
        source, removed = Subset(source, findings.kept), findings.removed
    if d.split.share:
        by = dict(group_by=d.split.group_by, stratify_by=d.split.stratify_by, skip=d.on_error == "skip")
        source, held_out = split(source, d.split.share, form=_reading(form), **by)
        notes.append(f"{len(held_out):,} of {len(source) + len(held_out):,} rows held out")
    return Prepared(source, held_out, task, notes, removed)


def clean_options(config: ConfigDict, task: Task) -> dict[str, Any]:
    """The keywords of `find` that the config sets, for sources as Task.prepared gives them."""
    d, c = config.data, config.data.clean
    evaluation = [open_source(paths) for paths in (d.validation, d.test) if paths]
    _, encoder, form = task.prepared(None)

    def count_tokens(records, wheres):
        return [encoder.length(example) for example in encoder.examples(records, wheres)]

    return dict(
        form=_reading(form),
        near=c.near,
        ngram=c.ngram,
        evaluation=[task.prepared(source)[0] for source in evaluation],
        max_tokens=c.max_tokens or d.max_length,
        count_tokens=count_tokens if task.tokenizer is not None else None,  # nothing to count by
        suspects=c.suspects,
        remove_suspects=c.remove_suspects,
    )


def _reading(form):
    """Of the keywords of to_conversation those that say how to read a record."""
    return {key: form[key] for key in ("fields", "roles") if key in form}
