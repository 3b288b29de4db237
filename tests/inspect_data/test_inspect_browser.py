"""The page of `inspect`, as a browser shows it."""

import html
import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from inspecting import inspect
from test_chat import make_tokenizer

from sftjax.config import get_default
from sftjax.data import encode
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.reports import html as html_lib

pytestmark = pytest.mark.browser
PHONE = 390  # CSS pixels
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
    " --disable-background-networking --disable-sync --virtual-time-budget=5000"
).split()
ROWS = [
    {"prompt": "what is two?", "completion": "\r\n<script>document.title='run'</script> & <b>four"},
    {"prompt": "\n<pre>&lt;</pre>", "completion": "日本\u200d {{ y }} " + "unbroken" * 40},
    {"prompt": "long " * 300, "completion": "lost"},
    {"messages": [{"role": r, "content": c} for r, c in (("user", "u"), ("assistant", "a")) * 2]},
]
OTHER = [{"prompt": "the cat sat on the mat", "completion": "a"}]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, rows in ("one", ROWS), ("two", OTHER):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = get_default()
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.sources = tuple(dict(path=str(folder / f"{n}.jsonl")) for n in ("one", "two"))
    config.data.max_length = 512
    return config


@pytest.fixture(scope="module")
def page(config, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(inspect(config, format="html"), encoding="utf-8")
    return file


def browse(file, address="", *options):
    """The document as it is after its scripts have run."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [browser, *OPTIONS, profile, *options, "--dump-dom", f"{file.as_uri()}{address}"]
    done = subprocess.run(command, capture_output=True, check=True)
    return Document(done.stdout.decode("utf-8"))


class Document(HTMLParser):
    """Of each article: its attributes, the text beside the tokens, the text and rows of a class."""

    def __init__(self, text):
        super().__init__()
        self.articles, self.root, self.output = [], {}, ""
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "html":
            self.root = attributes
        if tag == "article":
            self.articles.append(dict(attributes, texts=[], spans=[], rows=[]))
        if tag not in ("meta", "input", "br", "link", "img"):
            self._open.append((tag, attributes.get("class")))
        article = self.articles[-1] if self.articles else {}
        if tag == "pre" and article:
            article["texts"].append("")
        if tag == "span" and article:
            article["spans"].append((attributes.get("class"), ""))
        if tag == "tr" and article:
            article["rows"].append((attributes.get("class"), []))
        if tag == "td" and article:
            article["rows"][-1][1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        article = self.articles[-1] if self.articles else {}
        if "pre" in tags and article:
            article["texts"][-1] += data
        if "pre" in tags and "span" in tags and article:
            kind, text = article["spans"][-1]
            article["spans"][-1] = kind, text + data
        if "td" in tags and article:
            article["rows"][-1][1][-1] += data
        if "output" in tags:
            self.output += data


def test_trained_spans_are_found_by_their_class(config, page):
    document = browse(page)
    tokenizer = load_tokenizer(config)
    encoded = [encode(row, tokenizer) for row in ROWS + OTHER]
    assert len(document.articles) == len(encoded)
    for article, e in zip(document.articles, encoded, strict=True):
        assert article["texts"] == [e.text]
        trained = [text for kind, text in article["spans"] if kind == "trained"]
        assert trained == [e.text[start:stop] for start, stop in e.spans]
        rows = article["rows"][1:]  # after the head
        assert [int(values[1]) for _, values in rows] == e.tokens.tolist()
        assert [kind == "trained" for kind, _ in rows if "cut" not in kind] == (
            [] if article["data-dropped"] else (e.weights > 0).tolist()
        )
    assert [len(a["spans"]) for a in document.articles] == [1, 1, 1, 2, 1]


@pytest.mark.parametrize(
    "address, shown",
    [
        ("", "01234"),
        ("#min=0.5", "min"),
        ("#max=0.5", "max"),
        ("#source=two", "4"),
        ("#source=one&dropped=no", "013"),
        ("#dropped=no_trained_token_left", "2"),
        ("#dropped=any&min=0.9", ""),
    ],
)
def test_filters_are_in_the_address(page, address, shown):
    document = browse(page, address)
    shares = [float(a["data-trained"]) for a in document.articles]
    by_share = {
        "min": "".join(str(i) for i, share in enumerate(shares) if share >= 0.5),
        "max": "".join(str(i) for i, share in enumerate(shares) if share <= 0.5),
    }
    assert all(0 < len(rows) < 5 for rows in by_share.values())
    shown = by_share.get(shown, shown)
    found = [str(i) for i, article in enumerate(document.articles) if "hidden" not in article]
    assert "".join(found) == shown
    assert document.output == f"{len(shown)} of 5 rows"


def test_a_filter_that_is_set_goes_into_the_address(page):
    script = """
form.elements.min.value = "0.5"; form.elements.source.value = "one";
form.elements.min.dispatchEvent(new Event("input", { bubbles: true }));
document.documentElement.dataset.hash = location.hash;
"""
    allowed = html_lib.csp("", script).split("script-src ")[1].split(";")[0]
    text = page.read_text(encoding="utf-8").replace("script-src ", f"script-src {allowed} ", 1)
    file = page.with_name("set.html")
    file.write_text(f"{text}<script>{script}</script>", encoding="utf-8")
    document = browse(file)
    assert document.root["data-hash"] == "#source=one&min=0.5"
    linked = browse(page, document.root["data-hash"])
    assert ["hidden" in a for a in document.articles] == ["hidden" in a for a in linked.articles]


def test_what_is_not_the_page_s_own_does_not_run(page):
    """Of a value that came to stand unescaped, the policy would stop the code."""
    ran = "document.documentElement.dataset.ran = 'yes'"
    injected = f'<script>{ran}</script><img src="data:," onerror="{ran}"><p style="width: 9px">'
    file = page.with_name("injected.html")
    file.write_text(page.read_text(encoding="utf-8") + injected, encoding="utf-8")
    document = browse(file)
    assert "data-ran" not in document.root and document.output == "5 of 5 rows"


def framed(page, width):
    """The page in a frame: a browser's own window is never narrower than 500 pixels."""
    text = html.escape(page.read_text(encoding="utf-8"))
    file = page.with_name(f"frame{width}.html")
    file.write_text(
        f'<!doctype html><iframe width="{width}" height="800" srcdoc="{text}"></iframe>'
        """<script>onload = () => {
  const page = frames[0].document, at = (name) => page.querySelector(name).getBoundingClientRect();
  const text = at(".beside pre"), tokens = at(".beside .tokens"), root = document.documentElement;
  root.dataset.width = page.documentElement.scrollWidth;
  root.dataset.below = tokens.top >= text.bottom;
  root.dataset.beside = tokens.left >= text.right;
  root.dataset.letters = getComputedStyle(page.querySelector("td")).fontSize;
}</script>""",
        encoding="utf-8",
    )
    return browse(file).root


def test_a_phone_needs_no_sideways_scrolling(page):
    phone = framed(page, PHONE)
    assert int(phone["data-width"]) <= PHONE
    assert (phone["data-below"], phone["data-beside"]) == ("true", "false")
    assert float(phone["data-letters"].removesuffix("px")) >= 12
    desk = framed(page, 1200)
    assert int(desk["data-width"]) <= 1200
    assert (desk["data-below"], desk["data-beside"]) == ("false", "true")
