"""What `inspect` shows: for a terminal, as JSON, as one HTML page that fetches nothing."""

import html
import json
import unicodedata

from sftjax.data import lengths
from sftjax.page import cells, page, table

COLUMNS = ("token", "id", "weight", "segment", "position")
CONTEXT = 3  # tokens shown around those that differ
BESIDE = 120  # columns of a terminal from which tokens stand beside the text


# --- said in words ------------------------------------------------------------------------------


def _title(example, several):
    source = f"{example['source']}: " if several else ""
    text = (
        f"{source}{example['where']}, {example['length']} tokens, {example['trained']:.0%} trained"
    )
    if example["dropped"]:
        return f"{text}, dropped: {example['dropped']}"
    cut = example["kept"] < example["length"]
    return f"{text}, {example['kept']} kept" if cut else text


def _counts(reasons):
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()) or "none"


def _summary(t, alone=False) -> dict[str, str]:
    """The totals of a source (alone: the only one), or of several together, as {name: text}."""
    lines = {}
    lines["examples"] = f"{t['examples']:,}, {t['documents']:,} documents kept"
    if t["removed"]:
        lines["cleaned"] = _counts(t["removed"])
    lines["dropped"], lines["skipped"] = _counts(t["dropped"]), _counts(t["skipped"])
    lines["truncated"] = f"{t['truncated']:,}" + (f", {t['split']:,} split" if t["split"] else "")
    lines["tokens"] = f"{t['tokens']:,}"
    lines["trained"] = f"{t['trained_tokens']:,} tokens, {t['trained_fraction']:.1%}"
    if "lengths" in t:  # of one source
        lines["lengths"], lines[""] = lengths.percentiles(t), lengths.histogram(t)
        stop = f"yes, {t['stop_token']}" if t["stop_token_trained"] else "no"
        lines["stop token"] = f"trained: {stop}"
    if alone:
        full = f"{t['packing_efficiency']:.1%} full"
        lines["packing"] = f"{t['rows']:,} rows of {t['row_length']:,}, {full}"
    return lines


def _summaries(report) -> dict[str, dict]:
    """{name: summary} of each source, and of all where there are several."""
    if not _several(report):
        return {report["set"]: _summary(report["totals"], alone=True)} if report["totals"] else {}
    found = {name: _summary(totals) for name, totals in report["sources"].items()}
    return found | ({"all": _summary(report["totals"])} if len(found) > 1 else {})


def _several(report):
    return len({e["source"] for e in report["examples"]} | report["sources"].keys()) > 1


def _comparison(report) -> list[str]:
    c = report["comparison"]
    lines = []
    if c["tokenizers"]:
        here, there = c["tokenizers"]
        lines.append(f"the tokenizers are different: {here} here, {there} there; ids can't be "
                     "compared, so tokens are compared by their text")  # fmt: skip
    if not c["differ"]:
        return [*lines, f"no difference in {c['rows']} rows"]
    if c["other_tokens"]:
        lines.append(f"the two tokenise differently: other tokens in {c['other_tokens']} of "
                     f"{c['rows']} rows")  # fmt: skip
    lines.append(f"{c['differ']} of {c['rows']} rows differ")
    trained = f"{c['trained_here']:,} here, {c['trained_there']:,} there"
    return [*lines, f"trained tokens of all rows: {trained}"]


def _sides(difference):
    """("here, 40 tokens, 10 trained", side) of both."""
    for name in ("here", "there"):
        side = difference[name]
        text = f"{name}: {side['tokens']} tokens, {side['trained']} trained"
        lost = side["dropped"] and f", dropped: {side['dropped']}"
        note = side["note"] and f" ({side['note']})"
        yield text + lost + note, side


def _changes(difference):
    """The tokens that differ, with a few around them; None where others are left out."""
    tokens = difference["tokens"]
    near = {
        i + step
        for i, token in enumerate(tokens)
        if token["mark"]
        for step in range(-CONTEXT, CONTEXT + 1)
    }
    shown = False
    for i, token in enumerate(tokens):
        if i in near:
            yield token
        elif shown or i == 0:
            yield None
        shown = i in near


def _only(difference):
    return f"only here: {difference['only_here']}, only there: {difference['only_there']}"


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

PLAIN, GREEN, RED, BLUE, YELLOW = "\033[0m", "\033[32m", "\033[31m", "\033[34m", "\033[33m"
MARKS = {"": " ", "only-here": "<", "only-there": ">", "weight": "~"}
COLORS = {"only-here": RED, "only-there": BLUE, "weight": YELLOW}


def terminal(report, color, width):
    show = _terminal_diff if "comparison" in report else _terminal
    return "\n".join(show(report, color, width)) + "\n"


def _terminal(report, color, width):
    lines = []
    for example in report["examples"]:
        title = _title(example, _several(report))
        lines += [f"== {title}", *filter(None, [example["note"]]), ""]
        lines += _beside(example, _token_lines(example["tokens"], color), color, width)
        lines.append("")
    if not report["examples"]:
        lines += [NOTHING, ""]
    for name, summary in _summaries(report).items():
        lines += [f"== {name}", "", *(f"{k:<12}{text}" for k, text in summary.items()), ""]
    return [*lines, f"error: {report['problem']}"] if report["problem"] else lines[:-1]


def _token_lines(tokens, color):
    yield f"{'token':<24}{'id':>8}{'weight':>8}{'segment':>9}{'position':>10}"
    for t in tokens:
        segment, position = ("-" if t[key] is None else t[key] for key in ("segment", "position"))
        line = f"{_pad(_shown(t['token']), 24)}{t['id']:>8}{t['weight']:>8g}"
        line += f"{segment:>9}{position:>10}"
        yield GREEN + line + PLAIN if color and t["weight"] else line


def _beside(example, tokens, color, width):
    marks = (GREEN, PLAIN) if color else ("⟦", "⟧")
    if width < BESIDE or not example["tokens"]:
        return [_marked(example, marks), "", *(tokens if example["tokens"] else ())]
    left = _wrapped(example, width - 62, marks)
    return [f"{a}   {b}".rstrip() for a, b in _together(left, list(tokens), " " * (width - 62))]


def _together(left, right, blank):
    n = max(len(left), len(right))
    left, right = left + [blank] * (n - len(left)), right + [""] * (n - len(right))
    return zip(left, right, strict=True)


def _marked(example, marks):
    before, after = marks
    pieces = _pieces(example["text"], example["spans"])
    return "".join(before + _plain(s) + after if on else _plain(s) for s, on in pieces)


def _wrapped(example, width, marks):
    """Lines of exactly `width` columns; marks are closed at a line's end, opened at the next."""
    lines, line, used = [], "", 0
    for text, trained in _pieces(example["text"], example["spans"]):
        before, after = marks if trained else ("", "")
        line += before
        for c in _plain(text):
            if c == "\n" or used + _columns(c) > width:
                lines.append(line + after + " " * (width - used))
                line, used = before, 0
            if c != "\n":
                line, used = line + c, used + _columns(c)
        line += after
    return [*lines, line + " " * (width - used)]


def _plain(text):
    """Text without what would drive the terminal."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text
    )


def _shown(word):
    """A token's text with nothing invisible in it."""
    return repr(word)[1:-1].replace(" ", "␣")


def _columns(text):
    """How wide a terminal shows it."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def _pad(text, width):
    return text + " " * (width - _columns(text))


def _terminal_diff(report, color, width):
    marks, lines = (GREEN, PLAIN) if color else ("⟦", "⟧"), []
    for difference in report["differences"]:
        lines += [f"== {difference['where']}, {_only(difference)}", ""]
        for name, side in _sides(difference):
            lines += [name, "", _marked(side, marks), ""]
        lines.append(f"  {'token':<24}{'id':>8}{'here':>8}{'there':>8}")
        for t in _changes(difference):
            if t is None:
                lines.append("  ...")
                continue
            here, there = (_weight(t[side]) for side in ("here", "there"))
            line = f"{MARKS[t['mark']]} {_pad(_shown(t['token']), 24)}{t['id']:>8}"
            line += f"{here:>8}{there:>8}"
            lines.append(COLORS[t["mark"]] + line + PLAIN if color and t["mark"] else line)
        lines.append("")
    return [*lines, f"== {report['set']}", "", *_comparison(report)]


def _weight(weight):
    return "" if weight is None else f"{weight:g}"


# --- JSON ---------------------------------------------------------------------------------------


def as_json(report, color, width):
    return json.dumps(report, ensure_ascii=False, indent=1) + "\n"


# --- HTML ---------------------------------------------------------------------------------------

STYLE = """
body { max-width: 100rem }
h1, h2 { overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 0 0 .3rem }
article { border-top: 1px solid #ccc; padding: .8rem 0;
  content-visibility: auto; contain-intrinsic-size: auto 40rem }
article[hidden] { display: none }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.totals > * { margin-bottom: .6rem }
.totals td:first-child { white-space: nowrap }
.totals td { white-space: pre-wrap; overflow-wrap: break-word }
article p, .beside pre { margin: 0 }
.beside { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem }
.beside { align-items: start; margin-top: .4rem }
.beside > * { max-height: 75vh; overflow: auto }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)) }
.tokens table { width: 100% }
.tokens td, .tokens th { text-align: right; padding: 0 .3rem }
.tokens td:first-child, .tokens th:first-child { text-align: left; white-space: pre-wrap }
.tokens th { position: sticky; top: 0; background: #fff }
.trained { background: #b9efc4 }
.cut { color: #767676 }
.only-here { background: #ffd2bd } .only-there { background: #c9dcff }
.weight { background: #f5e6a3 }
.problem { background: #ffd2bd; padding: .7rem }
form { position: sticky; top: 0; z-index: 1; background: #fff; padding: .5rem 0;
  display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center }
input, select { font: inherit; max-width: 12rem } input { width: 4.5rem }
@media (max-width: 50rem) {
  body { margin: .5rem auto; padding: 0 .6rem }
  .beside, .three { grid-template-columns: minmax(0, 1fr) }
  .beside > * { max-height: 60vh }
  form { position: static }
}
"""

# The filters are in the address, #source=...&min=0.2&max=0.9&dropped=..., so a view can be sent.
SCRIPT = """
const form = document.forms.filters, rows = [...document.querySelectorAll("article")];
function show() {
  const { source, min, max, dropped } = Object.fromEntries(new FormData(form));
  let shown = 0;
  for (const row of rows) {
    const { trained, dropped: reason } = row.dataset;
    const fate = { "": true, no: !reason, any: !!reason }[dropped] ?? reason === dropped;
    const share = trained >= +min && trained <= +(max || 1);
    row.hidden = !(fate && share && (!source || source === row.dataset.source));
    shown += !row.hidden;
  }
  form.elements.shown.value = `${shown} of ${rows.length} rows`;
}
function read() {
  form.reset();
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (form.elements[name]) form.elements[name].value = value;
  show();
}
form.addEventListener("input", () => {
  show();
  const wanted = [...new FormData(form)].filter(([, value]) => value !== "");
  history.replaceState(null, "", "#" + new URLSearchParams(wanted));
});
addEventListener("hashchange", read);
read();
"""


def as_html(report, color, width):
    diff = "comparison" in report
    body = _html_diff(report) if diff else _html(report)
    return page(report["set"], "\n".join(body), STYLE, "" if diff else SCRIPT)


def _html(report):
    totals = "".join(
        f"<div><b>{_text(name)}</b>{table(summary.items())}</div>"
        for name, summary in _summaries(report).items()
    )
    problem = [f'<p class="problem">{_text(report["problem"])}</p>'] if report["problem"] else []
    examples, several = report["examples"], _several(report)
    return [
        *problem,
        f'<div class="totals">{totals}</div>',
        '<p><span class="trained">Trained</span>, or context. Tokens <span class="cut">in grey'
        "</span> are cut away, or of a row that is dropped.</p>",
        _filters(examples),
        *(_article(example, _title(example, several)) for example in examples),
        *([] if examples else [f"<p>{NOTHING}</p>"]),
    ]


def _filters(examples):
    sources = dict.fromkeys(e["source"] for e in examples)
    reasons = dict.fromkeys(e["dropped"] for e in examples if e["dropped"])
    dropped = {"": "all", "no": "kept", "any": "dropped"} | {r: f"dropped: {r}" for r in reasons}
    number = 'type="number" min="0" max="1" step="0.01"'
    return (
        '<form name="filters" onsubmit="return false">'
        f"<label>source {_select('source', {'': 'all'} | {s: s for s in sources})}</label>"
        f"<label>show {_select('dropped', dropped)}</label>"
        f'<label>trained share from <input name="min" {number} placeholder="0"></label>'
        f'<label>to <input name="max" {number} placeholder="1"></label>'
        f'<output name="shown">{len(examples)} rows</output></form>'
    )


def _select(name, options):
    lines = (f'<option value="{_text(v)}">{_text(label)}</option>' for v, label in options.items())
    return f'<select name="{name}">{"".join(lines)}</select>'


def _article(example, title):
    data = {name: _text(example[name]) for name in ("source", "trained", "dropped")}
    note = f"<p>{_text(example['note'])}</p>" if example["note"] else ""
    rows = [(_token_class(t), _token_cells(t)) for t in example["tokens"]]
    return (
        f'<article data-source="{data["source"]}" data-trained="{data["trained"]}" '
        f'data-dropped="{data["dropped"]}"><h2>{_text(title)}</h2>{note}'
        f'<div class="beside">{_html_text(example)}{_html_tokens(COLUMNS, rows)}</div></article>'
    )


def _token_class(token):
    kinds = ("trained" if token["weight"] else "", "cut" if token["segment"] is None else "")
    return " ".join(filter(None, kinds))


def _token_cells(token):
    place = ("" if token[name] is None else token[name] for name in ("segment", "position"))
    return (_shown(token["token"]), token["id"], _weight(token["weight"]), *place)


def _html_text(example):
    """The newline that HTML takes away after <pre> is not the text's."""
    pieces = (
        f'<span class="trained">{_text(piece)}</span>' if trained else _text(piece)
        for piece, trained in _pieces(example["text"], example["spans"])
    )
    return f"<pre>\n{''.join(pieces)}</pre>"


def _html_tokens(columns, rows):
    """rows: (class, values)."""
    if not rows:
        return ""
    lines = [f"<tr>{cells(columns, 'th')}</tr>"]
    lines += [f'<tr class="{kind}">{cells(values, "td")}</tr>' for kind, values in rows]
    return f'<div class="tokens"><table>{"".join(lines)}</table></div>'


def _text(value):
    return html.escape(str(value)).replace("\r", "&#13;")


def _html_diff(report):
    lines = "".join(f"<p><b>{_text(line)}</b></p>" for line in _comparison(report))
    legend = (
        '<p>Text: <span class="trained">trained</span>. Tokens: there at all, or trained, '
        '<span class="only-here">only here</span>, <span class="only-there">only there</span>; '
        '<span class="weight">of another weight</span>. Here is the config, there is the one '
        "it is compared with.</p>"
    )
    several = len({d["source"] for d in report["differences"]}) > 1
    return [lines, legend, *(_html_difference(d, several) for d in report["differences"])]


def _html_difference(difference, several):
    sides = "".join(
        f"<div><p>{_text(name)}</p>{_html_text(side)}</div>" for name, side in _sides(difference)
    )
    rows = [
        (t["mark"], (_shown(t["token"]), t["id"], _weight(t["here"]), _weight(t["there"])))
        if t
        else ("", ("…", "", "", ""))
        for t in _changes(difference)
    ]
    source = f"{difference['source']}: " if several else ""
    return (
        f"<article><h2>{_text(source + difference['where'])}, {_only(difference)}</h2>"
        f'<div class="beside three">{sides}'
        f"{_html_tokens(('token', 'id', 'here', 'there'), rows)}</div></article>"
    )


VIEWS = {"terminal": terminal, "json": as_json, "html": as_html}
