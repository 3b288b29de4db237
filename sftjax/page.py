"""The plain HTML that reports share: one file each, nothing fetched, every text escaped."""

import html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .7rem }
table { border-collapse: collapse; font: 13px ui-monospace, monospace }
td, th { padding: 0 .8rem 0 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page; `body` is HTML, the title is text and its first heading."""
    title = html.escape(title)
    script = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style>\n<h1>{title}</h1>\n{body}\n"
        f"{script}</html>\n"
    )


def table(rows, head=()) -> str:
    """Rows of values as a table."""
    lines = [cells(head, "th")] if head else []
    lines += [cells(row, "td") for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def cells(values, tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)
