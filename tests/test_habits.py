"""Habits that the whole package keeps to: types, sizes, and who imports whom."""

import ast
import subprocess
import sys
from pathlib import Path

import sftjax

PACKAGE = Path(sftjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def shown(tree):
    """The functions that a module, or a public class of it, shows; also a class's __init__."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if not isinstance(inner, ast.FunctionDef):
                    continue
                if inner.name == "__init__" or not inner.name.startswith("_"):
                    yield inner


def test_arguments_of_public_functions_are_typed():
    total, bare = 0, []
    for file, tree in TREES.items():
        for function in shown(tree):
            a = function.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            for argument in arguments:
                if argument is not None and argument.arg not in ("self", "cls"):
                    total += 1
                    if argument.annotation is None:
                        bare.append(f"{file.name}:{function.lineno} {function.name}({argument.arg})")
    assert len(bare) <= 0.05 * total, bare
    assert (PACKAGE / "py.typed").exists()


def test_files_are_short_and_few_lie_on_the_shelf():
    long = [str(f) for f in FILES if len(f.read_text().splitlines()) > 500]
    assert not long
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def imports(file):
    """The modules of the package that a module imports when it is loaded itself."""
    for node in TREES[file].body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_imports_itself_in_a_circle():
    names = {}
    for file in FILES:
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = file
    graph = {name: {m for m in imports(f) if m in names and m != name} for name, f in names.items()}
    # A package's own __init__ is loaded before what lies in it; that is no import of its.
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            if not name.startswith(f"{other}."):
                visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_training_loads_nothing_of_what_other_commands_need():
    code = "import sys, sftjax.train; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    others = ("sftjax.plan", "sftjax.inspect_data", "sftjax.generate", "matplotlib", "sklearn")
    assert "sftjax.training.build" in loaded and not loaded & {*others, "torch"}
