"""Find the rows that should not be trained on, each with its reason; nothing is changed here.

A new rule is one function that yields (row, note, other row or its place or None) and its name in `RULES`. Rules run in
the table's order, each on the rows that none before it has taken: a row has one reason, and the counts add up.
"""

import hashlib
import inspect
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftjax.clean.split import normalise, said
from sftjax.data.masking.conversation import to_conversation
from sftjax.data.records.sources import RecordSource
from sftjax.errors import DataError
from sftjax.files import write_atomic

FORMAT = 1  # of what the rules find; part of the cache's key
SHINGLE = 5  # characters in a piece of text that near duplicates are compared by
PERMUTATIONS = 128  # of MinHash
MARGIN = 0.15  # below the threshold, that its estimate may be: over three standard deviations
COMMON = 0.1  # a piece of text in more than this share of the rows says nothing about two of them
CHUNK = 1000  # rows that are tokenised at a time
EMPTY = ("empty_response", "empty_text")  # kinds of the errors of a row with a blank answer
SHORT = 8  # words; an evaluation text below this is only sought as a whole prompt

Hit = tuple[int, str, int | str | None]  # row, note, the other row or its place
CountTokens = Callable[[list[dict[str, Any]], list[str]], Sequence[int]]  # (records, wheres)
Trust = Callable[[list[int]], np.ndarray]  # rows -> float [rows]


class Finding(NamedTuple):
    """One row, and what a rule has against it."""

    row: int  # index in the source
    rule: str
    note: str  # what was found
    other: str = ""  # the place of the row with which it clashes


@dataclass(frozen=True)
class Findings:
    """What `rules` found in `rows` rows; `removes` are those of them whose rows go."""

    rows: int
    found: tuple[Finding, ...]
    rules: tuple[str, ...]
    removes: tuple[str, ...]

    @property
    def removed(self) -> dict[int, Finding]:
        """{row: why it goes}, in order of the rows."""
        return {f.row: f for f in sorted(self.found) if f.rule in self.removes}

    @property
    def kept(self) -> list[int]:
        """The rows that stay, ascending."""
        removed = self.removed
        return [i for i in range(self.rows) if i not in removed]

    def counts(self) -> dict[str, int]:
        """{rule: rows found}, in order of the rules."""
        return dict(Counter(f.rule for f in self.found))


def find(
    source: RecordSource,
    rules: Sequence[str] = ("all",),
    *,
    form: Mapping[str, Any] | None = None,
    near: float = 0.7,
    ngram: int = 13,
    evaluation: Sequence[RecordSource] = (),
    max_tokens: int = 0,
    count_tokens: CountTokens | None = None,
    trust: Trust | None = None,
    suspects: float = 0.01,
    remove_suspects: bool = False,
) -> Findings:
    """Apply cleaning rules to the records of a source; the texts of all rows are held in memory.

    rules: names in RULES; "all" stands for every rule whose inputs are given. form: the keywords of `to_conversation`
    that say how to read a record: fields, roles. evaluation: the sources of the evaluation sets. count_tokens:
    (records, wheres) -> the token count of each. trust: rows -> a number for each, least for what is likely wrong. The
    others are keys of the config's data.clean. Raises: DataError for an unknown rule, one whose input is not given, or
    a value out of range.
    """
    if not 0.1 <= near <= 0.95:  # the range in which LSH has several bands
        raise DataError(f"data.clean.near={near}: expected a similarity from 0.1 to 0.95", kind="setting")
    if ngram < 1 or not 0 <= suspects <= 1:
        raise DataError(
            f"data.clean.ngram={ngram}, suspects={suspects}: expected 1 or more words, and a share from 0 to 1",
            kind="setting",
        )
    inputs = dict(contamination=evaluation, too_long=max_tokens and count_tokens)
    rules = _chosen(rules, inputs | dict(label_suspects=trust))
    options = dict(near=near, ngram=ngram, evaluation=evaluation, max_tokens=max_tokens)
    options |= dict(count_tokens=count_tokens, trust=trust, suspects=suspects)
    removes = tuple(r for r in rules if r != "label_suspects" or remove_suspects)
    texts, alive, found = Texts(source, form or {}), list(range(len(source))), []
    for rule in rules:
        hits = [
            Finding(i, rule, note, source.where(other) if isinstance(other, int) else other or "")
            for i, note, other in RULES[rule](texts, alive, **options)
        ]
        found += hits
        if rule in removes:
            gone = {hit.row for hit in hits}
            alive = [i for i in alive if i not in gone]
    return Findings(len(source), tuple(found), tuple(rules), removes)


def _chosen(rules, inputs):
    """The rules to apply, in the table's order."""
    if unknown := [r for r in rules if r not in RULES and r != "all"]:
        raise DataError(
            f"data.clean.rules: unknown rule {unknown[0]!r}; known: all, {', '.join(RULES)}", kind="setting"
        )
    if idle := [r for r in rules if not inputs.get(r, True)]:
        raise DataError(f"data.clean.rules: {idle[0]} {NEEDS[idle[0]]}", kind="setting")
    return [r for r in RULES if r in rules or ("all" in rules and inputs.get(r, True))]


NEEDS = {
    "contamination": "needs evaluation sets: set data.validation or data.test",
    "too_long": "needs a limit and a tokenizer: set data.max_length and data.tokenizer",
    "label_suspects": "needs the model: run the command sftjax.clean, and train on what it writes",
}


class Texts:
    """The rows, read once: normalised prompts and answers, tools (JSON), errors by row."""

    def __init__(self, source: RecordSource, form: Mapping[str, Any]) -> None:
        self.source, self.form, self.errors = source, form, dict[int, DataError]()
        self.prompts, self.answers, self.tools = [], [], []
        for i in range(len(source)):
            try:
                prompt, answer, tools = sides(source, i, form)
            except DataError as error:
                self.errors[i] = error
                prompt = answer = tools = ""
            self.prompts.append(normalise(prompt))
            self.answers.append(normalise(answer))
            self.tools.append(tools)

    def readable(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that can be read."""
        return [i for i in rows if i not in self.errors]


def sides(source: RecordSource, i: int, form: Mapping[str, Any]) -> tuple[str, str, str]:
    """(prompt, answer, tools) of row `i`; the answer is its last message. Raises: DataError."""
    chat = to_conversation(source[i], where=source.where(i), **form)
    *prompt, answer = (said(m) for m in chat["messages"])
    return "\n".join(prompt), answer, json.dumps(chat["tools"]) if chat["tools"] else ""


# --- the rules ----------------------------------------------------------------------------------


def missing(texts: Texts, rows: Sequence[int], **_: Any) -> Iterator[Hit]:
    """Rows in which a field is absent, null or of a wrong type, or that can't be read at all."""
    for i in rows:
        error = texts.errors.get(i)
        if error and error.kind not in EMPTY:
            yield i, str(error), None


def empty(texts: Texts, rows: Sequence[int], **_: Any) -> Iterator[Hit]:
    """Rows with a blank answer or a blank message of the user."""
    for i in rows:
        error, source = texts.errors.get(i), texts.source
        if error and error.kind in EMPTY:
            yield i, str(error), None
        elif not error:
            chat = to_conversation(source[i], where=source.where(i), **texts.form)
            if any(m["role"] == "user" and not said(m).strip() for m in chat["messages"]):
                yield i, "a message of the user is blank", None


def too_long(
    texts: Texts, rows: Sequence[int], *, max_tokens: int, count_tokens: CountTokens, **_: Any
) -> Iterator[Hit]:
    """Rows of more than `max_tokens` tokens."""
    rows, source = texts.readable(rows), texts.source
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        counts = count_tokens([source[i] for i in some], [source.where(i) for i in some])
        for i, n in zip(some, counts, strict=True):
            if n > max_tokens:
                yield i, f"{n} tokens, more than {max_tokens}", None


_DAMAGE = {
    "HTML tag": r"</?(?:a|b|body|br|code|div|em|font|h[1-6]|head|hr|html|i|img|li|meta|ol|p|pre"
    r"|script|span|strong|style|sub|sup|table|tbody|td|th|tr|u|ul)(?:\s+[\w-]+=[^<>]*|\s*/?)>",
    "HTML entity": r"&(?:amp|lt|gt|quot|nbsp|apos|[lr][sd]quo|#\d{2,5}|#x[0-9a-fA-F]{2,4});",
    "chat token": r"<\|\w{2,30}\|>|<</?SYS>>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>",
    # UTF-8 read as a one-byte code: a sequence's first byte shows as one of these letters.
    "wrongly decoded text": "[ÂÃ][\xa0-\xbf]|â€|ðŸ|ï»¿|(?:[ÐÑ][\x80-\xbf]){2}",
    "replacement character": "\ufffd",
    "control character": "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]",
    "escaped character": r"\\u[0-9a-fA-F]{4}",
}
_MARKUP = re.compile("|".join(f"({pattern})" for pattern in _DAMAGE.values()))
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def markup(texts: Texts, rows: Sequence[int], **_: Any) -> Iterator[Hit]:
    """Rows with leftover HTML, chat tokens or damaged characters, outside of `code`."""
    names = list(_DAMAGE)
    for i in texts.readable(rows):
        both = sides(texts.source, i, texts.form)[:2]
        if hit := _MARKUP.search("\n".join(_CODE.sub(" ", side) for side in both)):
            yield i, f"{names[(hit.lastindex or 1) - 1]} {hit[0][:40]!a}", None


def contamination(
    texts: Texts, rows: Sequence[int], *, evaluation: Sequence[RecordSource], ngram: int, **_: Any
) -> Iterator[Hit]:
    """Rows that hold a text of an evaluation set: `ngram` of its words in a row, or all of it."""
    wholes, grams = _evaluation_index(texts, evaluation, ngram)
    for i in texts.readable(rows):
        prompt, answer = texts.prompts[i], texts.answers[i]
        if other := wholes.get(_words(prompt or answer)):
            yield i, "the whole prompt is in an evaluation set", other
        elif hit := _shared(_words(prompt), grams) or _shared(_words(answer), grams):
            yield i, f"shares {' '.join(hit[0])!r} with an evaluation set", hit[1]


def _evaluation_index(texts, evaluation, ngram):
    """{words of a prompt: place} and {n: {hash of n words: place}} of the evaluation sets.

    Texts shorter than `ngram` words are indexed at their own length. What many evaluation rows share is the wording of
    the task, and no evidence.
    """
    wholes, places, counts = dict[tuple, str](), defaultdict[int, dict](dict), Counter[tuple]()
    for source in evaluation:
        for i in range(len(source)):
            prompt, answer, _ = map(normalise, sides(source, i, texts.form))
            wholes.setdefault(_words(prompt or answer), source.where(i))
            found = set[tuple]()
            for words in (_words(prompt), _words(answer)):
                n = min(ngram, len(words))
                if n >= min(SHORT, ngram):
                    found.update((n, gram) for gram in _grams(words, n))
            counts.update(found)
            for n, gram in found:
                places[n].setdefault(gram, source.where(i))
    wholes.pop((), None)  # no words at all: nothing to compare
    many = max(2, 0.01 * sum(map(len, evaluation)))
    return wholes, {
        n: {gram: place for gram, place in places[n].items() if counts[n, gram] <= many}
        for n in sorted(places, reverse=True)
    }


def _shared(words, grams):
    """The first words that an evaluation row has too, and its place; None if there are none."""
    for n, places in grams.items():
        for k, gram in enumerate(_grams(words, n)):
            if gram in places:
                return words[k : k + n], places[gram]
    return None


_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+")


def _words(text) -> tuple:
    """Words without punctuation; of Chinese and Japanese, which have no blanks, characters."""
    return tuple(_WORD.findall(text))


def _grams(words, n):
    return (hash(words[k : k + n]) for k in range(len(words) - n + 1))


def conflict(texts: Texts, rows: Sequence[int], **_: Any) -> Iterator[Hit]:
    """Rows whose prompt has other answers too, unless more than half of its rows have this one.

    Leave this rule out where several answers to one prompt are wanted.
    """
    groups = defaultdict(list)
    for i in texts.readable(rows):
        if texts.prompts[i]:
            groups[texts.prompts[i], texts.tools[i]].append(i)
    for group in groups.values():
        counts = Counter(texts.answers[i] for i in group)
        for i in group if len(counts) > 1 else ():
            if 2 * counts[texts.answers[i]] <= len(group):
                other = next(j for j in group if texts.answers[j] != texts.answers[i])
                yield i, f"{len(counts)} different answers to this prompt", other


def exact_duplicate(texts: Texts, rows: Sequence[int], **_: Any) -> Iterator[Hit]:
    """Rows that equal an earlier one in prompt and answer, after normalisation."""
    first: dict[tuple, int] = {}
    for i in texts.readable(rows):
        same = first.setdefault((texts.prompts[i], texts.answers[i], texts.tools[i]), i)
        if same != i:
            yield i, "equal to an earlier row", same


def near_duplicate(texts: Texts, rows: Sequence[int], *, near: float, **_: Any) -> Iterator[Hit]:
    """Rows much like an earlier one that stays (MinHash-LSH, then checked exactly).

    Rows with different numbers are different rows, and wording that many rows share counts for nothing: data made from
    one template differ in little else. Prompts and answers together must be `near` alike, and neither of them less than
    half of that.
    """
    from datasketch import MinHash, MinHashLSH

    rows = texts.readable(rows)
    common = _common_pieces(texts, rows)

    @lru_cache(maxsize=1 << 16)
    def pieces(i):
        """Hashed pieces of the row's prompt, of its answer, of both."""
        both = texts.prompts[i], texts.answers[i]
        numbers = np.uint32(zlib.crc32(" ".join(re.findall(r"\d+", " ".join(both))).encode()))
        found = []
        for every in map(_pieces, both):
            rare = every[~common[every & (len(common) - 1)]]
            found.append((rare if len(rare) else every) ^ numbers)
        return *found, np.union1d(*found)

    # The weights favour finding too many: what LSH returns is checked, by estimate, then exactly.
    index = MinHashLSH(threshold=near, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    signatures = np.zeros((len(rows), PERMUTATIONS), np.uint32)
    hashes = MinHash.generator((pieces(i)[2].tolist() for i in rows), num_perm=PERMUTATIONS, hashfunc=int)
    for at, minhash in enumerate(hashes):
        signatures[at] = minhash.hashvalues
        alike = np.array(sorted(index.query(minhash)), np.int64)
        estimates = (signatures[alike] == signatures[at]).mean(1)
        for other in alike[estimates >= near - MARGIN].tolist():
            prompt, answer, whole = map(_jaccard, pieces(rows[at]), pieces(rows[other]))
            if whole >= near and min(prompt, answer) >= near / 2:
                yield rows[at], f"{whole:.0%} like an earlier row", rows[other]
                break
        else:
            index.insert(at, minhash, check_duplication=False)


_POWERS = np.array([pow(0x9E3779B1, k, 1 << 32) for k in range(1, SHINGLE + 1)], np.uint32)


def _pieces(text) -> np.ndarray:
    """Hashes uint32 of all pieces of SHINGLE characters, sorted."""
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.unique(np.lib.stride_tricks.sliding_window_view(codes, SHINGLE) @ _POWERS)


def _common_pieces(texts, rows):
    """By a piece's low bits, bool [2**22]: is it in more than a tenth (and 20) of the rows?"""
    counts = np.zeros(1 << 22, np.int32)
    for i in rows:
        both = np.union1d(_pieces(texts.prompts[i]), _pieces(texts.answers[i]))
        counts[np.unique(both & (len(counts) - 1))] += 1
    return counts > max(20, COMMON * len(rows))


def _jaccard(a, b):
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def label_suspects(texts: Texts, rows: Sequence[int], *, trust: Trust, suspects: float, **_: Any) -> Iterator[Hit]:
    """The rows whose answer the model trusts least, worst first."""
    rows = texts.readable(rows)
    values = np.asarray(trust(rows))
    for at in np.argsort(values, kind="stable")[: round(suspects * len(rows))].tolist():
        yield rows[at], f"trust {values[at]:.3g}", None


_ALL: Any = (missing, empty, too_long, markup, contamination, conflict, exact_duplicate, near_duplicate, label_suspects)
RULES: dict[str, Callable[..., Iterator[Hit]]] = {rule.__name__: rule for rule in _ALL}


# --- once per data --------------------------------------------------------------------------------


def find_once(folder: Path | str, key: str, source: RecordSource, rules: Sequence[str], **options: Any) -> Findings:
    """`find`, or what an earlier call with the same inputs has left in `folder`.

    key: names what `options` can't: the source's content, the tokenizer and its settings.
    """
    plain = {k: v for k, v in options.items() if k not in ("evaluation", "count_tokens", "trust")}
    sets = [s.fingerprint() for s in options.get("evaluation", ())]
    code = [inspect.getsource(rule) for rule in RULES.values()]
    files = [s.where(i) for s in (source, *options.get("evaluation", ())) for i in (0, -1)]
    known = json.dumps([FORMAT, key, list(rules), plain, sets, files, code], sort_keys=True)
    file = Path(folder) / f"clean-{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"
    if file.exists():
        rows, found, *names = json.loads(file.read_text(encoding="utf-8"))
        return Findings(rows, tuple(Finding(*f) for f in found), *map(tuple, names))
    findings = find(source, rules, **options)
    try:
        write_atomic(file, json.dumps(list(vars(findings).values())))  # as other processes do
    except OSError as error:
        raise DataError(f"data.cache_dir={folder}: can't be written: {error}", kind="unwritable") from None
    return findings
