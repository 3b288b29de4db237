"""HTML pages of reports: jinja2 templates that escape every value; one file each, nothing fetched.

A page's style and script stand in files beside the templates. A page carries a Content-Security-Policy that lets a
browser run and apply these alone, by their hashes, so that text from a data set could not run even where an escape were
forgotten.
"""

import base64
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup


class Part(NamedTuple):
    """A table: its title, the names of its columns, and its rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sftjax.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, *, styles: Sequence[str] = (), script: str = "", **values: Any) -> str:
    """A whole page.

    template: a file of templates/ that extends page.html.jinja and takes `values`, of which `title` is one; `pictures`,
    where there are any, are data: URLs. styles, script: further files of templates/, which this page alone needs.
    """
    style = "\n".join(_asset(name) for name in ("page.css", *styles))
    code = _asset(script) if script else ""
    own = dict(style=Markup(style), script=Markup(code), csp=csp(style, code, "pictures" in values))
    text = _environment().get_template(template).render(**own, **values)
    # A browser reads a bare carriage return as a newline, so that no value would keep its own.
    return text.replace("\r", "&#13;") + "\n"


def csp(style: str, script: str, pictures: bool = False) -> Markup:
    """The policy that allows this inline style and script, and pictures that the page holds."""
    images = "img-src data:; " * pictures
    return Markup(
        f"default-src 'none'; {images}style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text):
    if not text:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name):
    environment: Any = _environment()
    return environment.loader.get_source(environment, name)[0]
