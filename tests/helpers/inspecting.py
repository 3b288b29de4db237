"""What `sftjax inspect` shows, as a string."""

from sftjax.inspect_data import VIEWS, collect
from sftjax.inspect_data.rows import Wanted


def inspect(config, n=5, format="terminal", set="train", color=True, **wanted):
    """The options are those of the command, `wanted` more of `Wanted`."""
    view = VIEWS[format]
    return view(collect(config, Wanted(n, **wanted), set), color)
