"""The console command: `sftjax train --config=...`; each command also runs as a module."""

import importlib
import sys

from sftjax import config

COMMANDS = {
    "train": "sftjax.train",
    "inspect": "sftjax.inspect_data",
    "clean": "sftjax.clean.command",
    "plan": "sftjax.plan.command",
    "generate": "sftjax.generate",
}


def main() -> None:
    """Run the command that the first argument names, with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        raise SystemExit(f"usage: sftjax {' | '.join(COMMANDS)} --config=FILE.py ...")
    config.run(importlib.import_module(COMMANDS[name]).main, sys.argv[2:])
