"""One picture of the results in benchmarks/results/: what each script measured, as ratios.

    python benchmarks/plot.py [--results=benchmarks/results] [--out=benchmarks/results/results.svg]

A panel for each file whose form it knows (the table READERS below): bars of the ratio that the
script prints, with its range over the rounds, and a line at 1. A file of another form is named and
left out.
"""

import argparse
import json
import math
from pathlib import Path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, BAR, HEAD = 860, 24, 52


# ---- readers: a result file's JSON -> (title, {label: (low, middle, high)}) ------------------


def read_loss(facts):
    rows = facts["time"]["shares"] if facts["time"] else []
    bars = {f"{r['trained']:.0%} trained, speed": r["speed_vs_chunked"] for r in rows}
    for r in facts["memory"]:
        ratio = r["temp_bytes"]["plain"] / r["temp_bytes"]["sftjax"]
        bars[f"{r['vocab']:,} vocabulary, {r['dtype']}, memory"] = [ratio] * 3
    return "Loss: against all positions chunked (speed), plain (memory)", bars


def read_train_step(facts):
    """Of --variants, or beside other libraries."""
    found = facts["results"]
    if "steps" not in found:
        bars = {name: row["speed_vs_default"] for name, row in found.items()}
        return "Train step: speed against the default", bars
    rows = found["steps"] | {f"lengths: {k}": v for k, v in (found.get("lengths") or {}).items()}
    return "Train step: sftjax faster by", {k: v["ratio"] for k, v in rows.items() if "ratio" in v}


def read_attention(facts):
    bars = {
        f"{shape}, {name}": row["speed_vs_xla"]
        for shape, rows in facts["results"].items()
        for name, row in rows.items()
        if not name.endswith("xla")
    }
    return "Attention: speed against the whole score matrix", bars


def read_startup(facts):
    rows = facts["results"]
    rows = rows["depth"] if isinstance(rows, dict) else rows
    bars = {f"{r['model']}, {r['layers']} layers": [r["ratio"]] * 3 for r in rows}
    return "Compile time against the shallowest", bars


def read_gpu(facts):
    bars = {
        f"{case}, {row['variant']}": row["sftjax_speed"]
        for case, result in facts["results"].items()
        for row in result["variants"]
        if row.get("sftjax_speed") and row["variant"] != "sftjax"
    }
    return "GPU: sftjax faster by", bars


READERS = {"loss": read_loss, "train_step": read_train_step, "attention": read_attention,
           "startup": read_startup, "gpu": read_gpu}  # fmt: skip


# ---- drawing -------------------------------------------------------------------------------


def escape(text):
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def svg(parts, width, height):
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif"'
            ' font-size="13" fill="#333">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x, y, value, **attributes):
    style = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(value)}</text>'


def panel(top, title, bars, colour):
    """Bars from a common zero, each with its range; (SVG parts, height)."""
    left, right = 330, WIDTH - 70
    most = max([1.0, *(high for _, _, high in bars.values())])

    def x(value):
        return left + value / most * (right - left)

    parts = [text(16, top + 22, title, font_size=15, font_weight="bold")]
    bottom = top + HEAD + BAR * len(bars)
    for i, (label, (low, middle, high)) in enumerate(bars.items()):
        y = top + HEAD + BAR * i
        parts += [
            text(left - 8, y + 4, label, text_anchor="end"),
            f'<rect x="{left}" y="{y - 8}" width="{x(middle) - left:.1f}" height="16"'
            f' fill="{colour}"/>',
            f'<path d="M{x(low):.1f} {y}H{x(high):.1f}" stroke="#000" stroke-width="2"/>',
            text(x(high) + 6, y + 4, f"{middle:.2f}"),
        ]
    parts.append(
        f'<path d="M{x(1):.1f} {top + HEAD - 16}V{bottom - 8}" stroke="#333" stroke-dasharray="3"/>'
    )
    return parts, bottom - top + 16


def overview(results: dict) -> str:
    """SVG of {name of the result file: (title, bars)}."""
    parts, top = [], 8
    for i, (title, bars) in enumerate(results.values()):
        new, height = panel(top, title, bars, COLOURS[i % len(COLOURS)])
        parts, top = parts + new, top + height
    return svg(parts, WIDTH, top + 8)


def loglog(series, title, x_label, y_label) -> str:
    """SVG of {name: [(x, y)]}, both axes logarithmic; one point is a dot, more are a line."""
    left, right, top, bottom = 80, WIDTH - 150, 48, 420
    points = [p for s in series.values() for p in s]
    ranges = []
    for axis in (0, 1):
        logs = [math.log10(p[axis]) for p in points]
        ranges.append((math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)))

    def place(p):
        shares = [(math.log10(v) - a) / (b - a) for v, (a, b) in zip(p, ranges, strict=True)]
        return left + shares[0] * (right - left), bottom - shares[1] * (bottom - top)

    parts = [text(left, 26, title, font_size=15, font_weight="bold")]
    for n in range(ranges[0][0], ranges[0][1] + 1):
        x, _ = place((10.0**n, 10.0 ** ranges[1][0]))
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#e4e4e4"/>')
        parts.append(text(x, bottom + 18, f"{10.0**n:g}", text_anchor="middle"))
    for n in range(ranges[1][0], ranges[1][1] + 1):
        _, y = place((10.0 ** ranges[0][0], 10.0**n))
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(text(left - 8, y + 4, f"{10.0**n:g}", text_anchor="end"))
    for i, (name, values) in enumerate(series.items()):
        colour, places = COLOURS[i % len(COLOURS)], [place(p) for p in values]
        x, y = places[-1]
        if len(places) == 1:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        else:
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(x + 8, y + 4, name, fill=colour))
    parts.append(text((left + right) / 2, bottom + 40, x_label, text_anchor="middle"))
    middle = (top + bottom) / 2
    turn = f"rotate(-90 20 {middle})"
    parts.append(text(20, middle, y_label, text_anchor="middle", transform=turn))
    return svg(parts, WIDTH, bottom + 56)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).resolve().parent / "results"
    parser.add_argument("--results", type=Path, default=here)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    found = {}
    for file in sorted(args.results.glob("*.json")):
        reader = next((r for name, r in READERS.items() if file.stem.startswith(name)), None)
        if reader is None or file.stem.startswith("loss_curve"):
            print(f"{file.name}: of another form, left out")
            continue
        title, bars = reader(json.loads(file.read_text()))
        if bars:
            found[file.name] = (f"{title} ({file.name})", bars)
    if not found:
        parser.error(f"no result that can be drawn in {args.results}")
    out = args.out or args.results / "results.svg"
    out.write_text(overview(found))
    print(f"{out}: {', '.join(found)}")


if __name__ == "__main__":
    main()
