"""The step on hardware that is not here: `sftjax plan --config=FILE --target=v5e-16`."""

import json
from collections.abc import Sequence
from pathlib import Path

from sftjax import config as config_lib
from sftjax import exits
from sftjax.errors import writing
from sftjax.plan import compile as compile_lib
from sftjax.plan import hardware, text
from sftjax.plan import search as search_lib
from sftjax.terminal import show
from sftjax.training import xla_flags


def main(argv: Sequence[str]) -> None:
    """Print the plan of a config on a target, or with --search the best that were tried."""
    config, flags = config_lib.parse(argv, target=None, search=False, json="", trained=0.5, document=0)
    if not 0 < flags.trained <= 1:
        raise config_lib.ConfigError(f"--trained={flags.trained}: expected a share, above 0 to 1")
    if flags.document < 0 or flags.document > config.data.max_length:
        raise config_lib.ConfigError(
            f"--document={flags.document}: expected a length up to data.max_length ="
            f" {config.data.max_length} tokens, or 0 for that"
        )
    xla_flags.settle()  # as the run does
    target, work = hardware.resolve(flags.target), (flags.trained, flags.document)
    found = [compile_lib.plan(config, target, *work)]
    show(text.report(found[0]))
    if flags.search:
        found = search_lib.search(config, target, *work)
        show(text.table(found[:12]))
    elif not found[0].fits:
        show(search_lib.suggestions(config, target, *work))
    if flags.json:
        content = json.dumps([p.as_json() for p in found], indent=1)
        with writing("--json", flags.json):
            Path(flags.json).write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    exits.run(main)
