"""The user's Python file of a config: run, and blamed by its line for whatever is wrong."""

import ast
import contextlib
import os
import traceback
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from sftjax.errors import ConfigError
from sftjax.files import load_python


def load(spec: str) -> ConfigDict:
    """The config of "path/to/file.py" or "file.py:argument", given to its get_config."""
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path):
        state = "is no regular file" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"--config={spec}: file {path} {state}")
    if Path(path).suffix != ".py":
        raise ConfigError(
            f"--config={spec}: {path} is not a Python file; a config is a file NAME.py with a"
            " function get_config(arg='')"
        )
    with _blamed(path):
        module = load_python(path, "--config")
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise ConfigError(f"{path} has no function get_config(arg='')")
    line = getattr(getattr(make, "__code__", None), "co_firstlineno", 1)
    with _blamed(path, line):
        config = make(argument) if argument else make()
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        found = " ".join(repr(config)[:60].split())
        raise ConfigError(
            f"{path}:{line}: get_config returned {found} ({type(config).__name__}), expected the"
            " ConfigDict of sftjax.config.get_default() with what differs"
        )
    return config


@contextlib.contextmanager
def _blamed(path, line=1):
    """Whatever the user's config file raises is shown with its line there, or else `line`."""
    try:
        yield
    except SyntaxError as e:
        text = f": {e.text.strip()!r:.80}" if e.text else ""
        raise ConfigError(f"{e.filename or path}:{e.lineno or 1}: {e.msg}{text}") from e
    except (Exception, SystemExit) as e:  # a file that exits would end the command in silence
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(path)]
        raise ConfigError(f"{path}:{(lines or [line])[-1]}: {_said(e)}") from e


def _said(error):
    """An error's class and message in one line; str() of a KeyError would be a repr."""
    if error.args and isinstance(error.args[0], Exception):  # as ml-collections wraps its own
        return _said(error.args[0])
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {' '.join(str(text).split())}"


def line_of(path: Path | str, key: str) -> int:
    """The line that sets a key ("train.batch_size") last, as far as can be read; or get_config."""
    whole, part, start = 0, 0, 1
    tail = key.rpartition(".")[2]
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.FunctionDef) and node.name == "get_config":
            start = line
        if isinstance(node, ast.keyword) and node.arg == tail:
            part = max(part, line)
        if isinstance(node, ast.Constant) and node.value in (key, tail):
            part = max(part, line)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = f".{ast.unparse(node)}"
            whole = max(whole, line * name.endswith(f".{key}"))
            part = max(part, line * name.endswith(f".{tail}"))
    return whole or part or start
