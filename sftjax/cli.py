"""The console command: `sftjax train --config=...`; each command also runs as a module."""

import importlib
import sys

import sftjax
from sftjax import exits
from sftjax.terminal import show

COMMANDS = {  # name: (module, what it does)
    "train": ("sftjax.train", "fine-tune a model, measure it, export it"),
    "evaluate": ("sftjax.evaluate", "what models score on data, side by side; trains nothing"),
    "compare": ("sftjax.reports.compare", "which of two or more results is better than by chance"),
    "status": ("sftjax.reports.status", "where the run of a workdir stands, while it runs too"),
    "inspect": ("sftjax.inspect_data", "show what a config trains on, token by token"),
    "clean": ("sftjax.clean.command", "clean a data set, with a report of what was taken out"),
    "plan": ("sftjax.plan.__main__", "compile a config for hardware that is not here: does it fit?"),
    "generate": ("sftjax.generate", "one answer of a model"),
}


def usage() -> str:
    """Return the commands, a line each."""
    lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    use = "usage: sftjax COMMAND --config=FILE.py [--config.KEY=VALUE ...]"
    return "\n".join([use, "       sftjax status WORKDIR [--json]", "", *lines, ""])


def main() -> None:
    """Run the command that the first argument names. Raises: SystemExit, 2 if it names none."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help", "help"):
        show(usage())
    elif name in ("--version", "-V"):
        show(f"sftjax {sftjax.__version__}")
    elif name in COMMANDS:
        exits.run(importlib.import_module(COMMANDS[name][0]).main, sys.argv[2:])
    else:
        show((f"unknown command {name!r}\n" if name else "") + usage(), file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
