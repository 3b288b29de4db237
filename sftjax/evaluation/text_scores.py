"""What one answer scores beside one reference, as texts."""

import re
import string
from collections import Counter
from collections.abc import Callable

from sftjax.errors import ConfigError


def squad_words(text: str) -> list[str]:
    """The words of a text as SQuAD's evaluation compares them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(wanted: str, given: str) -> float:
    """F1 of the words in common."""
    w, g = squad_words(wanted), squad_words(given)
    common = sum((Counter(w) & Counter(g)).values())
    if not w or not g:
        return float(w == g)
    return 2 * common / (len(w) + len(g))


ROWS: dict[str, Callable[[str, str], float]] = {
    "exact_match": lambda w, g: w.strip() == g.strip(),
    "squad_em": lambda w, g: squad_words(w) == squad_words(g),
    "token_f1": token_f1,
}
# A sign counts where no word or number stands before it, a comma where it groups thousands.
_NUMBER = r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"


def number(text: str, pattern: str) -> float | None:
    """The number after the last place of a pattern, or in its group; None where there is none."""
    try:
        found = list(re.finditer(pattern, text)) if pattern else []
    except re.error as e:
        raise ConfigError(f"eval.answer={pattern!r} is no regular expression: {e}") from None
    if found:
        last = found[-1]
        text = (last[1] or "") if last.groups() else text[last.end() :]
    numbers = re.findall(_NUMBER, text) if found or not pattern else []
    return float(numbers[0 if pattern else -1].replace(",", "")) if numbers else None


def lead(text: str, n: int) -> str:
    """The first n sentences of a text; a sentence ends at ., ! or ? before a blank."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:n])
