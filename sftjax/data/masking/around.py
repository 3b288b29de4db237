"""A tokenizer that reads a text together with what a model's processor writes around each image.

So Gemma 3's empty lines and marks, and PaliGemma's first token, stand in the tokens, where no template writes them.
"""

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any


class Around:
    """A tokenizer but for what it is called with; the places that it gives are those in the text as it was."""

    def __init__(self, tokenizer: Any, pattern: str, before: str, after: str, whole: bool = False) -> None:
        """pattern: of what `before` and `after` are written around; whole: no other special tokens are added."""
        self.within, self.written = tokenizer, [pattern, before, after]
        self._pattern, self._before, self._after = re.compile(pattern), before, after
        self._how = {"add_special_tokens": False} if whole else {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "within":  # as it is copied
            raise AttributeError(name)
        return getattr(self.within, name)

    def __len__(self) -> int:
        return len(self.within)

    def __call__(self, text: str | Sequence[str], **how: Any) -> Any:
        """What the tokenizer gives of one text, or of several the `encodings` alone."""
        if isinstance(text, str):
            new, place = self._written(text)
            out = self.within(new, **how | self._how)
            if "offset_mapping" in out:
                out["offset_mapping"] = [(place(a), place(b)) for a, b in out["offset_mapping"]]
            return out
        written = [self._written(one) for one in text]
        found = self.within([new for new, _ in written], **how | self._how).encodings
        rows = zip(found, written, strict=True)
        return SimpleNamespace(encodings=[_Encoding(encoding, place) for encoding, (_, place) in rows])

    def _written(self, text):
        """(the text with what stands around, the place in the text of a place in that)."""
        added, parts, last = [], [], 0
        for found in self._pattern.finditer(text):
            added += [(found.start(), self._before), (found.end(), self._after)]
        for at, new in added:
            parts += [text[last:at], new]
            last = at

        def place(x):
            for at, new in added:
                if x <= at:
                    break
                x = max(at, x - len(new))
            return x

        return "".join([*parts, text[last:]]), place


class _Encoding:
    def __init__(self, encoding: Any, place: Any) -> None:
        self.ids, self._own, self._place = encoding.ids, encoding, place

    def token_to_chars(self, i: int) -> tuple[int, int]:
        start, stop = self._own.token_to_chars(i)
        return self._place(start), self._place(stop)
