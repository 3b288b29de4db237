"""Show what is trained: python -m sftjax.inspect_data --config=FILE [--n=5] [--format=html].

For n examples: the rendered text with its trained spans marked, and for each token its id, weight,
segment and position in a packed row. Then totals over the whole set. Nothing is trained.
"""

import html
import json
import sys
import tempfile
from pathlib import Path

from sftjax import config as config_lib
from sftjax import feed, prepare
from sftjax.data import DataError, Rows, build_store, make_batch, open_source, pack
from sftjax.data.chat import encode_batch
from sftjax.data.pipeline import fit, mark_spans
from sftjax.page import cells, page, table

GREEN, PLAIN = "\033[32m", "\033[0m"


def main(argv):
    config, flags = config_lib.parse(argv, n=5, format="terminal", set="train", out="")
    page = inspect(config, flags.n, flags.format, flags.set, color=not flags.out)
    if flags.out:
        Path(flags.out).write_text(page, encoding="utf-8")
        print(f"written to {flags.out}")
    else:
        sys.stdout.write(page)


def inspect(config, n: int = 5, format: str = "terminal", set: str = "train", color=True) -> str:
    """The report as a string.

    Args:
      config: an experiment config; its model is not read, its tokenizer is.
      n: how many examples, from the first.
      format: "terminal" | "json" | "html" (one file, nothing fetched).
      set: "train" | "validation" | "test".

    Raises: DataError, as training would.
    """
    if format not in VIEWS:
        raise DataError(f"--format={format}: expected {' | '.join(VIEWS)}")
    if set not in ("train", "validation", "test"):
        raise DataError(f"--set={set}: expected train | validation | test")
    return VIEWS[format](collect(config, n, set), color)


def collect(config, n, set="train") -> dict:
    """What the views show: {"set", "totals", "examples"}, of plain values."""
    tokenizer, policy = feed.load_tokenizer(config), feed.policy(config)
    with tempfile.TemporaryDirectory() as temporary:  # where training's cache is not named
        cache = config.data.cache_dir or temporary
        source, policy = _source(config, set, tokenizer, policy, cache)
        n = min(n, len(source))
        wheres = [source.where(i) for i in range(n)]
        encoded = encode_batch([source[i] for i in range(n)], wheres, tokenizer, **policy)
        return dict(
            set=config.data[set] or config.data.train,
            totals=_totals(config, source, tokenizer, policy, cache),
            examples=_examples(config, tokenizer, wheres, encoded),
        )


def _source(config, set, tokenizer, policy, cache):
    """The records of a set, and how to encode them: as training would."""
    held_out = set == "validation" and config.data.split.share
    if not config.data[set] and not held_out:
        raise DataError(f"data.{set} is empty: give a file, a glob or a hub data set id")
    if set == "train" or held_out:
        rows = prepare.training_rows(config, tokenizer, policy, cache)
        return (rows.validation, policy) if held_out else (rows.train, rows.policy)
    return open_source(config.data[set]), policy


def _totals(config, source, tokenizer, policy, cache):
    data = config.data
    store = build_store(
        source,
        tokenizer,
        policy,
        max_length=data.max_length,
        overlong=data.overlong,
        cache_dir=cache,
    )
    rows = Rows(store, data.max_length, data.packing, config.seed)
    return store.report | dict(
        rows=rows.per_epoch, row_length=data.max_length, packing_efficiency=rows.efficiency
    )


def _examples(config, tokenizer, wheres, encoded):
    """Each example with the tokens left of it, packed as training packs; here only these few."""
    data = config.data
    pieces = [fit(e.tokens, e.weights, data.max_length, data.overlong) for e in encoded]
    docs = [piece for example in pieces for piece in example]
    owner = [i for i, example in enumerate(pieces) for _ in example]
    packed = pack([len(tokens) for tokens, _ in docs], data.max_length, data.packing)
    tables = [[] for _ in encoded]
    if docs:
        batch = make_batch(docs, data.max_length, packed)
        for r, row in enumerate(packed):
            at = 0
            for doc, start, stop in row:
                cells = slice(at, at + stop - start)
                places = (batch[k][r, cells].tolist() for k in ("segments", "positions"))
                ids, weights = (values[start:stop].tolist() for values in docs[doc])
                words = [tokenizer.decode([i]) for i in ids]
                tables[owner[doc]] += zip(words, ids, weights, *places, strict=True)
                at = cells.stop
    return [
        dict(where=where, text=e.text, spans=e.spans, length=len(e.tokens), tokens=table)
        for where, e, table in zip(wheres, encoded, tables, strict=True)
    ]


def _title(example):
    kept = len(example["tokens"])
    cut = "" if kept == example["length"] else f", {kept} kept" if kept else ", dropped"
    return f"{example['where']}, {example['length']} tokens{cut}"


def _summary(totals):
    """The totals as (name, text) lines."""
    dropped = ", ".join(f"{n} {reason}" for reason, n in totals["dropped"].items()) or "none"
    stop = f"yes, {totals['stop_token']}" if totals["stop_token_trained"] else "no"
    return [
        ("examples", f"{totals['examples']:,}, {totals['documents']:,} documents kept"),
        ("dropped", dropped),
        ("truncated", f"{totals['truncated']:,}"),
        ("tokens", f"{totals['tokens']:,}, longest document {totals['longest']:,}"),
        ("trained", f"{totals['trained_tokens']:,} tokens, {totals['trained_fraction']:.1%}"),
        ("stop token", f"trained: {stop}"),
        ("packing", f"{totals['rows']:,} rows of {totals['row_length']:,}, "
                    f"{totals['packing_efficiency']:.1%} full"),
    ]  # fmt: skip


# --- views: the collected report -> a page; a new format is a function and a line in VIEWS ------


def terminal(report, color):
    marks = (GREEN, PLAIN) if color else ("⟦", "⟧")
    lines = []
    for example in report["examples"]:
        lines += [f"== {_title(example)}", ""]
        lines += [mark_spans(example["text"], example["spans"], *marks), ""]
        lines += [f"{'token':<24}{'id':>8}{'weight':>8}{'segment':>9}{'position':>10}"]
        for word, i, weight, segment, position in example["tokens"]:
            row = f"{repr(word)[1:-1]:<24}{i:>8}{weight:>8g}{segment:>9}{position:>10}"
            lines.append(marks[0] + row + marks[1] if color and weight else row)
        lines.append("")
    lines += [f"== {report['set']}", ""]
    lines += [f"{name:<12}{text}" for name, text in _summary(report["totals"])]
    return "\n".join(lines) + "\n"


def as_json(report, color):
    names = ("token", "id", "weight", "segment", "position")
    for example in report["examples"]:
        example["tokens"] = [dict(zip(names, t, strict=True)) for t in example["tokens"]]
    return json.dumps(report, ensure_ascii=False, indent=1) + "\n"


STYLE = ".trained { background: #b9efc4 } td, th { text-align: right; white-space: pre }"
STYLE += " td:first-child, th:first-child { text-align: left }"


def as_html(report, color):
    examples = "\n".join(_html_example(example) for example in report["examples"])
    return page(report["set"], f"{table(_summary(report['totals']))}\n{examples}", STYLE)


def _html_example(example):
    pieces, at = [], 0
    for start, stop in example["spans"]:
        pieces.append(html.escape(example["text"][at:start]))
        pieces.append(f'<span class="trained">{html.escape(example["text"][start:stop])}</span>')
        at = stop
    text = "".join(pieces) + html.escape(example["text"][at:])
    rows = "".join(
        ('<tr class="trained">' if weight else "<tr>")
        + f"{cells((repr(word)[1:-1], i, f'{weight:g}', *place), 'td')}</tr>"
        for word, i, weight, *place in example["tokens"]
    )
    head = cells(("token", "id", "weight", "segment", "position"), "th")
    title = html.escape(_title(example))
    return (
        f"<h2>{title}</h2>\n<pre>{text}</pre>\n<details><summary>tokens</summary>"
        f"<table><tr>{head}</tr>{rows}</table></details>"
    )


VIEWS = {"terminal": terminal, "json": as_json, "html": as_html}

if __name__ == "__main__":
    config_lib.run(main)
