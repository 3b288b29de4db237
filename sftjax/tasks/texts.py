"""What the tasks share that read texts through an encoder or a decoder with another head.

A document of a packed row has what is wanted of it at its own tokens; every other token has weight 0. So a batch is
that of a language model whose targets are not shifted.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from ml_collections import ConfigDict

from sftjax.data.masking.conversation import Asked, read_field
from sftjax.data.packing.pack import TokenRows
from sftjax.errors import ConfigError, DataError
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.tasks.base import Task, read_model

# Usual names, in this order.
TEXTS = ("text", "sentence", "sentence1", "premise", "content", "review", "prompt", "input")
LABELS = ("label", "labels", "class", "completion", "output")


class Labelled(NamedTuple):
    """One text with what is wanted of it."""

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]: not 0 at the tokens from which something is read
    targets: np.ndarray  # [n]: what is wanted there, else 0
    types: np.ndarray | None  # int32 [n]: which of two texts a token is of; None where not told
    text: str
    note: str  # what is wanted, for people to read
    wanted: Any  # the same, as the task holds it
    spans: Sequence[tuple[int, int]] = ()

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays [n], in the order of Texts.columns."""
        own = (self.tokens, self.weights, self.targets)
        return own if self.types is None else (*own, self.types)


class Texts(Task):
    """tokenizer: a fast one, whose special tokens surround each text; None to read no text.

    names: the record's own names of what is in `usual` ("" = found by their usual ones; several with "|": the first
    that a record has); with a name of "pair" a document is two texts. reads: "first" | "last": the token of a document
    from which what is wanted of it is read.
    """

    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": TEXTS, "label": LABELS}
    target: ClassVar[type] = np.int32
    whole: ClassVar[bool] = True  # what is wanted is of a whole document, which may not be split
    cuttable: ClassVar[bool] = False  # may packing cut a document in two; else by overlong alone
    counts = ("cells", "tokens", "trained_tokens")

    def __init__(
        self, tokenizer: Tokenizer | None, names: Mapping[str, str] | None = None, reads: str = "first"
    ) -> None:
        self.tokenizer, self.reads = tokenizer, reads
        self.names = dict.fromkeys((*self.usual, "pair"), "") | dict(names or {})
        pairs = bool(self.names["pair"]) or "question" in self.usual
        self.typed = pairs and "token_type_ids" in getattr(tokenizer, "model_input_names", ())
        self.layout = TokenRows(shifted=False, target=self.target, types=self.typed)
        columns = {"tokens": "int32", "weights": "float32", "targets": np.dtype(self.target).name}
        columns |= {"types": "uint8"} if self.typed else {}
        self.columns = {name: (dtype, None) for name, dtype in columns.items()}

    @classmethod
    def arguments(cls, config: ConfigDict) -> dict[str, Any]:
        """What `of` gives to the class of a config. Raises: ConfigError."""
        if cls.whole and config.data.overlong == "split":
            raise ConfigError(
                "data.overlong='split' would give the pieces of a text its label; set"
                " truncate_end, truncate_prompt, drop or error"
            )
        d, fields, known = config.data, config.data.fields, (*cls.usual, *["pair"] * cls.whole)
        if not cls.cuttable and "wrapped" in (d.packing, d.eval_packing):
            raise ConfigError(
                "data.packing='wrapped' and data.eval_packing='wrapped' cut a text in two, and what"
                " is wanted of it stands in one part; set bfd or none"
            )
        if wrong := [k for k in ("label", "pair") if fields[k] and k not in known]:
            raise ConfigError(f"data.fields.{wrong[0]} is nothing that task={config.task!r} reads")
        names = {k: fields[k] for k in (*cls.usual, "pair") if k in fields}
        return {"names": names, "reads": read_model(config.model).reads}

    @classmethod
    def of(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Self:
        """The task of a config."""
        return cls(tokenizer, **cls.arguments(config))

    # ---- what a task of this kind says ----

    def read_wanted(self, record: dict, where: str) -> Any:
        """What is wanted of a record; None for nothing. Raises: DataError."""

    def placed(self, n: int, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
        """Weights and targets [n] of a document of n tokens: by default it has one target."""
        weights, targets = np.zeros(n, np.float32), np.zeros(n, np.dtype(self.target))
        at = 0 if self.reads == "first" else n - 1
        weights[at], targets[at] = 1.0, wanted
        return weights, targets

    def note(self, wanted: Any) -> str:
        """What is wanted, for people to read."""
        return "" if wanted is None else str(wanted)

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Labelled]:
        """Each record's text, or pair of texts, tokenised, with what is wanted of it."""
        read = [self.read(r, where) for r, where in zip(records, wheres, strict=True)]
        wanted = [self.read_wanted(r, where) for r, where in zip(records, wheres, strict=True)]
        texts: list[Any] = [text for text, _ in read]
        pairs = [pair for _, pair in read] if self.names["pair"] else None
        encoded = self.tokenizer(texts, pairs)
        out = []
        for i, where in enumerate(wheres):
            if not (ids := encoded["input_ids"][i]):
                raise DataError(
                    f"the text {texts[i]!r} has no token", "take the row out", where=where, kind="empty_text"
                )
            types = np.array(encoded["token_type_ids"][i], np.uint8) if self.typed else None
            shown = texts[i] if pairs is None else f"{texts[i]} | {pairs[i]}"
            own, note = self.placed(len(ids), wanted[i]), self.note(wanted[i])
            out.append(Labelled(np.array(ids, np.int32), *own, types, shown, note, wanted[i]))
        return out

    def read(self, record: dict, where: str) -> tuple[str, str]:
        """(text, second text or "") of a record. Raises: DataError where one is no text."""
        pair = self.text(record, "pair", where) if self.names["pair"] else ""
        return self.text(record, "text", where), pair

    def text(self, record: dict, kind: str, where: str) -> str:
        """The text that a record has of a kind. Raises: DataError."""
        text = self.field(record, kind, where)
        if not isinstance(text, str) or not text.strip():
            problem = f"field {self.name(record, kind)!r} is {text!r:.200}, expected text"
            raise DataError(problem, where=where, kind="empty_text")
        return text

    def field(self, record: dict, kind: str, where: str) -> Any:
        """What a record holds of a kind, "text" or another. Raises: DataError for nothing."""
        name = self.name(record, kind)
        if name is None:
            asked = self.names[kind] or " | ".join(self.usual[kind])
            raise DataError(
                f"no {kind}: none of the fields {asked}; the row has {', '.join(map(repr, record)) or 'none'}",
                f"set data.fields.{kind}",
                where=where,
                kind="missing_field",
                subject=repr(kind),
            )
        return read_field(record, name, where)

    def name(self, record: dict, kind: str) -> str | None:
        """The name under which a record holds a kind; None where it has none."""
        given = self.names[kind]
        names = [n.strip() for n in (given.split("|") if given else self.usual.get(kind, ()))]
        there = (n for n in names if n in record or "{" in n or n.partition(".")[0] in record)
        return next(there, None)

    def fields_read(self, record: dict) -> set[str]:
        """The keys that the text and what is wanted of it are made of."""
        asked = Asked(record)
        for kind in (*self.usual, "pair"):
            if self.name(record, kind) is not None:
                self.field(asked, kind, "")
        return set(record) & asked.read

    def key(self) -> list:
        """The fields' names, the token read and the special tokens."""
        special = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        return [type(self).__name__, self.names, self.reads, special]

    def kept(self, example: Labelled, max_length: int, overlong: str) -> list[np.ndarray]:
        """A long text loses words at its end or its beginning, never its special tokens."""
        return self.places(len(example.tokens), max_length, overlong, self.special_ends)

    def places(self, n: int, most: int, overlong: str, ends: tuple[int, int]) -> list[np.ndarray]:
        """The places, of n tokens, of each piece of at most `most` of them (0 = all).

        ends: how many tokens at the beginning and at the end each piece has.
        """
        places, (before, after) = np.arange(n), ends
        if not most or n <= most:
            return [places]
        room = most - before - after
        if overlong not in ("truncate_end", "truncate_prompt", "split") or room < 1:
            return []
        if overlong == "split":
            first, inner, last = np.split(places, [before, n - after])
            parts = (inner[i : i + room] for i in range(0, len(inner), room))
            return [np.concatenate([first, part, last]) for part in parts]
        start = before + (room if overlong == "truncate_end" else 0)
        return [np.delete(places, slice(start, start + n - most))]

    @functools.cached_property
    def special_ends(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before a text, and after it."""
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        before, after = (len(list(itertools.takewhile(bool, some))) for some in (mask, mask[::-1]))
        return before, after

    def cut(self, example: Labelled, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of each piece, with what is wanted of it where the piece is read."""
        pieces = []
        for at in self.kept(example, max_length, overlong):
            own = self.placed(len(at), example.wanted) if self.whole else None
            weights, targets = own or (example.weights[at], example.targets[at])
            types = () if example.types is None else (example.types[at],)
            pieces.append((example.tokens[at], weights, targets, *types))
        return pieces
