"""What cleaning leaves behind: the clean rows, the rejects with reasons, one readable page."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sftjax.clean.rules import RULES, Findings, sides
from sftjax.data.records.rejects import record
from sftjax.data.records.sources import RecordSource
from sftjax.errors import DataError, writing

EXCERPT = 160  # characters of a text on the page; the rejects file has the whole row


def summary(findings: Findings) -> str:
    """One line: what was removed, and why."""
    counts = [f"{n} {rule}" for rule, n in findings.counts().items() if rule in findings.removes]
    reasons = f" ({', '.join(counts)})" if counts else ""
    return f"{len(findings.removed):,} of {findings.rows:,} rows removed{reasons}"


def write_rejects(path: Path | str, source: RecordSource, findings: Findings) -> None:
    """Every removed row as a JSON line: place, reason, note, the row it clashes with, itself."""
    lines = (
        dict(where=source.where(i), reason=f.rule, note=f.note, other=f.other) | {"record": record(source, i)}
        for i, f in findings.removed.items()
    )
    _write(path, map(_line, lines))


def _line(value) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def write_records(path: Path | str, source: RecordSource, rows: Iterable[int]) -> None:
    """The records at `rows` to a .jsonl or .parquet file, in order. Raises: DataError."""
    path = Path(path)
    records = (source[i] for i in rows)
    if path.suffix == ".jsonl":
        _write(path, map(_line, records))
    elif path.suffix == ".parquet":
        _write_parquet(path, list(records))
    else:
        raise DataError(f"--out={path}: expected a name that ends in .parquet or .jsonl", kind="setting")


def _write_parquet(path, records):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for record in records for name in record)
    try:
        rows = pa.table({name: pa.array([r.get(name) for r in records]) for name in names})
        with writing("the file", path):
            pq.write_table(rows, path)
    except (pa.ArrowException, UnicodeError, TypeError) as error:
        raise DataError(
            f"these rows fit no Parquet table: {error}", "write them to a .jsonl file", where=path, kind="bad_table"
        ) from None


def write_report(
    path: Path | str, source: RecordSource, findings: Findings, title: str, form: Mapping[str, Any] | None = None
) -> None:
    """The findings as one HTML page, rule by rule with every row. form: of `to_conversation`."""
    from sftjax.reports import html  # training that cleans nothing draws no page

    counts, kept = findings.counts(), len(findings.kept)
    totals = [("rows", findings.rows, ""), ("kept", kept, "")]
    totals += [(rule, counts[rule], "removed" if rule in findings.removes else "reported only") for rule in counts]
    rules = []
    for rule in counts:
        found = [f for f in findings.found if f.rule == rule]
        rows = [(source.where(f.row), f.note, f.other, *_excerpts(source, f.row, form or {})) for f in found]
        about = " ".join((RULES[rule].__doc__ or "").partition("\n\n")[0].split())
        rules.append(dict(name=rule, about=about, rows=rows))
    _write(path, [html.render("clean.html.jinja", title=title, totals=totals, rules=rules)])


def _excerpts(source, i, form):
    """(prompt, answer) in short; of a row that can't be read, its JSON."""
    try:
        texts = sides(source, i, form)[:2]
    except DataError:
        texts = (_line(record(source, i)).rstrip(), "")
    return [t if len(t) <= EXCERPT else t[: EXCERPT - 1] + "…" for t in texts]


def _write(path, texts):
    """A lone surrogate, which is damage that gets here, is written as its escape."""
    with writing("the file", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(texts)
