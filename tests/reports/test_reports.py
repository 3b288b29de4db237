"""The pages of reports: every value is escaped, and only a page's own script and style may run."""

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest

from sftjax.reports import html

HOSTILE = "\"><script>alert('x')</script>&amp;\r\n' onclick='x"


class Page(HTMLParser):
    """A page as a browser reads it: its texts, attributes, tags, inline code and policy."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []
        self.code = {"style": [], "script": []}
        self.policy, self._in = {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            assert not any(self.code.values()), "the policy comes after what it governs"
            rules = (rule.split() for rule in attributes["content"].split(";"))
            self.policy = {name: allowed for name, *allowed in rules}
        self.tags.append(tag)
        self.attributes += attributes.items()
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        self.code.get(self._in, self.texts).append(data)


def check_self_contained(text: str, pictures: bool = False) -> Page:
    """Nothing is fetched, and exactly the inline code that is there may run."""
    page = Page(text)
    for kind, blocks in page.code.items():
        digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
        allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        assert page.policy.pop(f"{kind}-src") == (allowed or ["'none'"])
    assert page.policy.pop("img-src", None) == (["data:"] if pictures else None)
    assert page.policy == dict.fromkeys(("default-src", "base-uri", "form-action"), ["'none'"])
    for name, value in page.attributes:
        if pictures and name == "src" and value.startswith("data:image/svg+xml;base64,"):
            continue
        assert name not in ("src", "href", "action", "style", "srcset", "data"), (name, value)
        assert not name.startswith("on"), "the policy stops handlers that stand in attributes"
    assert not any("url(" in style or "@import" in style for style in page.code["style"])
    return page


def inspect_page(text):
    example = dict(source=text, trained=0.5, dropped=text, note=text, title=text, images=[],
                   pieces=[(text, False), (text, True)], rows=[("cut", (text, 1))])  # fmt: skip
    return html.render(
        "inspect.html.jinja", styles=["inspect.css"], script="inspect.js", title=text, problem=text,
        summaries={text: {text: text}}, sources={text: text}, fates={text: text}, columns=(text,),
        examples=[example], nothing=text,
    )  # fmt: skip


def clean_page(text):
    rule = dict(name=text, about=text, rows=[(text,) * 5])
    return html.render("clean.html.jinja", title=text, totals=[(text, 1)], rules=[rule])


@pytest.mark.parametrize("make", [inspect_page, clean_page])
def test_values_stay_values(make):
    hostile, harmless = check_self_contained(make(HOSTILE)), Page(make("x"))
    assert hostile.tags == harmless.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in harmless.attributes]
    assert hostile.tags.count("script") == (make is inspect_page)
    wanted = "".join(harmless.texts).count("x")
    assert 0 < "".join(hostile.texts).count(HOSTILE) <= wanted
    values = [value for _, value in hostile.attributes]
    assert values.count(HOSTILE) == (4 if make is inspect_page else 0)


def test_a_text_keeps_its_newlines_and_returns():
    text = "\n\r\nan answer\r"
    page = inspect_page(text)
    assert "<pre>\n\n&#13;\nan answer&#13;<span" in page  # HTML takes the newline after <pre> away


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="totals"):
        html.render("clean.html.jinja", title="t", rules=[])


def test_other_code_than_the_page_s_has_another_hash():
    assert html.csp("a {}", "x()") != html.csp("a {}", "y()") != html.csp("b {}", "y()")
    assert "script-src 'none'" in html.csp("a {}", "")


def test_every_page_has_the_frame_with_the_policy():
    """No template but the frame begins a page, and no other code writes one."""
    package = Path(html.__file__).parents[1]
    pages = set((package / "reports" / "templates").glob("*.html.jinja"))
    pages = {page for page in pages if page.name not in ("page.html.jinja", "parts.html.jinja")}
    assert pages
    for page in pages:
        assert page.read_text().startswith('{% extends "page.html.jinja" %}'), page
    files = [file for file in package.rglob("*.py") if "<html" in file.read_text()]
    assert not files
