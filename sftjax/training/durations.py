"""Durations in any unit: "300 steps", "3 epochs", "50_000 examples", "2e6 tokens", "10%", "300"."""

import math
import re

from sftjax.errors import ConfigError

_DURATION = re.compile(r"\s*+([\d_.]++(?:e[+-]?\d++)?)\s*+(%|[a-z]*+)\s*+")
UNITS = ("steps", "epochs", "examples", "tokens", "%")


def duration(
    text: str | float,
    what: str,
    *,
    total: int | None = None,
    batch: int | None = None,
    epoch_rows: int | None = None,
    per_row: tuple[float, float] | None = None,
) -> int:
    """Whole steps of "300 steps", "2 epochs", "1000 examples", "5e6 tokens", "10%" or "300".

    total: steps of the whole run, for "%". batch: rows in a step; epoch_rows: rows in an epoch; per_row: (examples,
    tokens) in a row on average. Rounded up. Raises ConfigError, naming `what`.
    """
    n, unit = amount(text, what)
    if unit == "steps":
        steps = n
    elif unit == "%" and total is not None:
        steps = n / 100 * total
    elif unit == "epochs" and batch is not None and epoch_rows is not None:
        steps = n * epoch_rows / batch
    elif unit in ("examples", "tokens") and batch is not None and per_row is not None:
        steps = n / (per_row[unit == "tokens"] * batch)
    else:
        raise ConfigError(f"{what}={text!r}: {unit} has no meaning here; write steps")
    return math.ceil(round(steps, 9))


def amount(text: str | float, what: str) -> tuple[float, str]:
    """(number, unit) of a duration. Raises ConfigError, naming the key `what`."""
    match = _DURATION.fullmatch(str(text))
    unit = match and ((match[2] or "steps").rstrip("s") + "s" if match[2] != "%" else "%")
    if not match or unit not in UNITS:
        raise ConfigError(f"{what}={text!r:.200} is no duration; write a number and one of {', '.join(UNITS)}")
    try:
        n = float(match[1])
    except ValueError:
        raise ConfigError(f"{what}={text!r}: {match[1]!r} is not a number") from None
    if n == math.inf:
        raise ConfigError(f"{what}={text!r}: expected a finite number")
    return n, unit
