"""The report of a run, as a browser shows it."""

import html

import pytest
from test_inspect_browser import Document, browse
from test_train import files, make  # noqa: F401 (files is a fixture)

from sftjax import train as train_lib

pytestmark = pytest.mark.browser
PHONE = 400  # CSS pixels


@pytest.fixture(scope="module")
def report(files, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("page") / "<b>run"
    train_lib.train(make(files, data__validation=str(files / "train.jsonl")), folder)
    return folder / "report.html"


def seen(page, *options):
    """What a frame of a phone's width shows of the page."""
    text = html.escape(page.read_text(encoding="utf-8"))
    file = page.with_name("frame.html")
    file.write_text(
        f'<!doctype html><iframe width="{PHONE}" height="800" srcdoc="{text}"></iframe>'
        """<script>onload = () => {
  const page = frames[0].document, root = document.documentElement;
  const style = (name) => frames[0].getComputedStyle(page.querySelector(name));
  root.dataset.width = page.documentElement.scrollWidth;
  root.dataset.letters = style("td").fontSize;
  root.dataset.text = style("pre").color;
  root.dataset.ground = style("pre").backgroundColor;
  root.dataset.title = page.querySelector("h1").textContent;
  const drawn = [...page.images].map((x) => x.complete && x.naturalWidth > 0);
  root.dataset.pictures = drawn.length && drawn.every(Boolean);
  root.dataset.headings = [...page.querySelectorAll("h2")].map((x) => x.textContent).join("|");
}</script>""",
        encoding="utf-8",
    )
    document: Document = browse(file, "", *options)
    return document.root


def brightness(colour):
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_the_report_is_read_on_a_phone_and_in_the_dark(report):
    light = seen(report)
    assert int(light["data-width"]) <= PHONE
    assert float(light["data-letters"].removesuffix("px")) >= 12
    assert light["data-title"] == "Run <b>run" and light["data-pictures"] == "true"
    headings = light["data-headings"].split("|")
    assert headings[:2] == ["Measured", "Curves"]
    assert headings[-2:] == ["Speed and memory", "How to repeat it"]
    assert any("largest loss" in x for x in headings)
    assert "Answers, those of the lowest exact_match first" in headings
    assert brightness(light["data-ground"]) > 200 > 100 > brightness(light["data-text"])
    dark = seen(report, "--blink-settings=preferredColorScheme=0")
    assert brightness(dark["data-ground"]) < 100 < 200 < brightness(dark["data-text"])


def test_the_report_fetches_nothing_and_runs_nothing(report):
    text = report.read_text(encoding="utf-8")
    ran = "document.documentElement.dataset.ran = 'yes'"
    file = report.with_name("injected.html")
    file.write_text(f"{text}<script>{ran}</script><img src='x' onerror=\"{ran}\">")
    assert "data-ran" not in browse(file).root
    assert "http:" not in text.split("<style>")[0] and 'src="http' not in text
