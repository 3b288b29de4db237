"""What `inspect` shows: for a terminal, as JSON, as one HTML page that fetches nothing."""

import json
from typing import Any

from sftjax.data.packing import truncate as lengths
from sftjax.tasks.base import counted
from sftjax.terminal import in_json, printable

COLUMNS = ("token", "id", "weight", "segment", "position")


# --- said in words ------------------------------------------------------------------------------


def _title(example, several):
    source = f"{example['source']}: " if several else ""
    text = f"{source}{example['where']}, {example['length']} tokens, {example['trained']:.0%} trained"
    if example["dropped"]:
        return f"{text}, dropped: {example['dropped']}"
    return f"{text}, {example['kept']} kept" if example["kept"] < example["length"] else text


def _summary(t, alone=False) -> dict[str, str]:
    """The totals of a source (alone: the only one), or of several together, as {name: text}."""
    lines = {"examples": f"{t['examples']:,}, {t['documents']:,} documents kept"}
    if t["removed"]:
        lines["cleaned"] = counted(t["removed"])
    lines["dropped"], lines["skipped"] = counted(t["dropped"]), counted(t["skipped"])
    lines["truncated"] = f"{t['truncated']:,}" + (f", {t['split']:,} split" if t["split"] else "")
    lines["tokens"] = f"{t['tokens']:,}"
    lines["trained"] = f"{t['trained_tokens']:,} tokens, {t['trained_fraction']:.1%}"
    if "lengths" in t:  # of one source
        lines["lengths"], lines[""] = lengths.percentiles(t), lengths.histogram(t)
        lines |= t["facts"]
    if alone:
        lines["packing"] = f"{t['rows']:,} rows of {t['row_length']:,}, {t['packing_efficiency']:.1%} full"
    return lines


def _summaries(report) -> dict[str, dict]:
    """{name: summary} of each source, and of all where there are several."""
    if not _several(report):
        return {report["set"]: _summary(report["totals"], alone=True)} if report["totals"] else {}
    found = {name: _summary(totals) for name, totals in report["sources"].items()}
    return found | ({"all": _summary(report["totals"])} if len(found) > 1 else {})


def _several(report):
    return len({e["source"] for e in report["examples"]} | report["sources"].keys()) > 1


def _pieces(text, spans):
    """(characters, are they trained) one after the other."""
    at = 0
    for start, stop in spans:
        yield text[at:start], False
        yield text[start:stop], True
        at = stop
    yield text[at:], False


NOTHING = "no row is as wanted: see --source, --min_trained, --max_trained, --dropped, --start"


# --- terminal -----------------------------------------------------------------------------------

PLAIN, GREEN = "\033[0m", "\033[32m"


def terminal(report: dict[str, Any], color: bool) -> str:
    """The report as text; color: with escapes, else with brackets around what is trained."""
    report, lines = _safe(report), []
    for example in report["examples"]:
        lines += [f"== {_title(example, _several(report))}", *filter(None, [example["note"]]), ""]
        lines += [_marked(example, color), "", *_token_lines(example["tokens"], color), ""]
    if not report["examples"]:
        lines += [NOTHING, ""]
    for name, summary in _summaries(report).items():
        lines += [f"== {name}", "", *(f"{k:<12}{text}" for k, text in summary.items()), ""]
    if report["problem"]:
        lines += [f"error: {report['problem']}", ""]
    return "\n".join(lines)


def _safe(value, key=""):
    """The report with every text printable, but those that are so once they are taken apart."""
    if isinstance(value, dict):
        return {_safe(k): _safe(v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_safe(v, key) for v in value]
    return printable(value) if isinstance(value, str) and key not in ("text", "token") else value


def _token_lines(tokens, color):
    if tokens:
        yield f"{'id':>8}{'weight':>8}{'segment':>9}{'position':>10}  token"
    for t in tokens:
        word, i, weight, segment, position = _cells(t, "-")
        line = f"{i:>8}{weight:>8}{segment:>9}{position:>10}  {word}"  # last, as its width is not known
        yield GREEN + line + PLAIN if color and t["weight"] else line


def _marked(example, color):
    """The text, in which nothing would drive the terminal; a tab would leave its column."""
    before, after = (GREEN, PLAIN) if color else ("⟦", "⟧")
    pieces = ((printable(s).replace("\t", "\\t"), on) for s, on in _pieces(example["text"], example["spans"]))
    return "".join(before + s + after if on else s for s, on in pieces)


def _cells(token, nowhere=""):
    """What stands in COLUMNS; of a token's text nothing is invisible."""
    word = repr(token["token"])[1:-1].replace(" ", "␣")
    place = (nowhere if token[key] is None else token[key] for key in ("segment", "position"))
    return word, token["id"], f"{token['weight']:g}", *place


# --- JSON ---------------------------------------------------------------------------------------


def as_json(report: dict[str, Any], color: bool) -> str:
    """The report as indented JSON; color is of no use to it."""
    return printable(json.dumps(report, ensure_ascii=False, indent=1), in_json) + "\n"


# --- HTML ---------------------------------------------------------------------------------------


def as_html(report: dict[str, Any], color: bool) -> str:
    """The report as one page for a browser; color is of no use to it."""
    from sftjax.reports import html  # only this view draws a page

    examples, several, shown = report["examples"], _several(report), []
    reasons = dict.fromkeys(e["dropped"] for e in examples if e["dropped"])
    for e in examples:
        own = dict(pieces=_pieces(e["text"], e["spans"]), rows=[*map(_token_row, e["tokens"])])
        shown.append(e | own | {"title": _title(e, several)})
    return html.render(
        "inspect.html.jinja",
        styles=["inspect.css"],
        script="inspect.js",
        title=report["set"],
        problem=report["problem"],
        summaries=_summaries(report),
        sources={"": "all"} | {e["source"]: e["source"] for e in examples},
        fates={"": "all", "no": "kept", "any": "dropped"} | {r: f"dropped: {r}" for r in reasons},
        columns=COLUMNS,
        examples=shown,
        **({"pictures": True} if any(e["images"] for e in examples) else {}),
        nothing=NOTHING,
    )


def _token_row(token):
    kinds = ["trained"] * bool(token["weight"]) + ["cut"] * (token["segment"] is None)
    return " ".join(kinds), _cells(token)


VIEWS = {"terminal": terminal, "json": as_json, "html": as_html}
