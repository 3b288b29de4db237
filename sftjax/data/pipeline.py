"""Tokenise once into memory-mapped arrays, cached under a hash of everything that changes them."""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from sftjax.data.chat import encode_batch, stop_ids
from sftjax.data.lengths import OVERLONG, describe, fit
from sftjax.data.rejects import Rejects, check
from sftjax.data.sources import Source
from sftjax.data.template import template_text
from sftjax.errors import DataError

FORMAT = 3  # of the files below; part of the cache's key
CHUNK = 1000  # records in one call of the tokenizer
logger = logging.getLogger(__name__)


class TokenStore:
    """Tokenised documents in a folder of memory-mapped arrays.

    Attributes:
      tokens: int32 [all tokens], one document after the other.
      weights: float32 [all tokens], is each token itself trained; not shifted.
      offsets: int64 [documents + 1], document i is tokens[offsets[i]:offsets[i + 1]].
      lengths: int32 [documents].
      report: what was read, dropped and truncated, and what is trained.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tokens = np.memmap(self.folder / "tokens.i32", np.int32, "r")
        self.weights = np.memmap(self.folder / "weights.f32", np.float32, "r")
        self.offsets = np.load(self.folder / "offsets.npy")
        self.lengths = np.diff(self.offsets).astype(np.int32)
        self.report = json.loads((self.folder / "report.json").read_text())

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        document = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[document], self.weights[document]

    def __reduce__(self):  # worker processes map the files anew instead of copying them
        return TokenStore, (self.folder,)


def build_store(
    source: Source,
    tokenizer,
    policy: dict,
    max_length: int,
    overlong: str,
    cache_dir,
    on_error: str = "raise",
    max_skipped: float = 0.01,
) -> TokenStore:
    """Tokenise all of `source`, or open what an earlier call with the same inputs has written.

    Args:
      policy: the keywords of `encode`.
      max_length: the most tokens of a document; 0 = no limit.
      overlong: what becomes of a longer one: "truncate_end" | "truncate_prompt" (its beginning is
        cut) | "drop" | "split" (pieces) | "error". A document or piece without a trained token is
        dropped and counted.
      cache_dir: a folder for the result, named by a hash of everything that changes it.
      on_error: "raise", or "skip": bad rows go to rejects.jsonl in that folder and are counted.
      max_skipped: the share of rows past which skipping ends with an error.

    Raises: DataError for a bad row, or if nothing at all is trained.
    """
    if overlong not in OVERLONG:
        problem = f"data.overlong={overlong!r}: expected {' | '.join(OVERLONG)}"
        raise DataError(problem, kind="setting")
    check(on_error, max_skipped)
    settings = (policy, max_length, overlong, on_error, max_skipped)
    folder = Path(cache_dir) / store_key(source, tokenizer, *settings)
    if not (folder / "report.json").exists():
        _write_atomically(folder, source, tokenizer, *settings)
    store = TokenStore(folder)
    _warn(store.report)
    return store


def store_key(
    source, tokenizer, policy, max_length, overlong, on_error="raise", max_skipped=0.01
) -> str:
    """The name of a store: a hash of the data, the tokenizer, the template and the settings."""
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    settings = {k: dict(v) if k == "fields" and v else v for k, v in policy.items()}
    settings["template"] = template_text(tokenizer, policy.get("template"))
    limits = [len(source), max_length, overlong, on_error == "skip" and max_skipped, FORMAT]
    known = json.dumps([settings, special, limits], sort_keys=True, default=str)
    digest = hashlib.sha256(source.fingerprint().encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(known.encode())
    return digest.hexdigest()[:32]


def _write_atomically(folder, *inputs):
    """Write beside `folder`, then rename: a killed or second process leaves no half of a store."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        problem = f"data.cache_dir={folder.parent}: can't be written: {error}"
        raise DataError(problem, kind="unwritable") from None
    try:
        _write(temporary, folder, *inputs)
        os.rename(temporary, folder)
    except OSError as error:
        if not (folder / "report.json").exists():  # else another process was first
            problem = f"data.cache_dir={folder.parent}: can't be written: {error}"
            raise DataError(problem, kind="unwritable") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    temporary, folder, source, tokenizer, policy, max_length, overlong, on_error, max_skipped
):
    kept = folder.with_name(folder.name + ".rejects.jsonl")
    rejects = Rejects(temporary / "rejects.jsonl", kept, source, on_error, max_skipped)
    tally = Tally(stop_ids(tokenizer, policy.get("template")), max_length, overlong)
    first = None
    with open(temporary / "tokens.i32", "wb") as tokens_file:
        with open(temporary / "weights.f32", "wb") as weights_file:
            for rows in _chunks(len(source)):
                encoded = encode_rows(source, rows, tokenizer, policy, rejects)
                first = first or next(iter(encoded), None)
                pieces = tally.fit(encoded, tokenizer.bos_token_id)
                tokens, weights = tally.count(pieces)
                tokens.tofile(tokens_file)
                weights.tofile(weights_file)
    report = tally.report(tokenizer, rejects.counts)
    if not tally.lengths:
        problem = _nothing_trained(first, report, policy, max_length)
        raise DataError(problem, kind="nothing_trained")
    np.save(temporary / "offsets.npy", np.append(0, np.cumsum(tally.lengths, dtype=np.int64)))
    (temporary / "report.json").write_text(json.dumps(report, indent=1))


def _chunks(total):
    """Ranges of CHUNK rows, with a progress bar where there are several."""
    from tqdm import tqdm

    quiet = total < 2 * CHUNK or not sys.stderr.isatty()
    with tqdm(total=total, desc="tokenise", unit="row", disable=quiet) as progress:
        for start in range(0, total, CHUNK):
            rows = range(start, min(start + CHUNK, total))
            yield rows
            progress.update(len(rows))


def encode_rows(source, rows, tokenizer, policy, rejects) -> list[tuple]:
    """(file and row, example) of the rows that can be encoded; the others go to `rejects`.

    Where it fails, halves of the rows are tried: the good ones are still encoded together.
    """
    wheres = [source.where(i) for i in rows]
    try:
        examples = encode_batch([source[i] for i in rows], wheres, tokenizer, **policy)
        return list(zip(wheres, examples, strict=True))
    except DataError as error:
        if len(rows) == 1 or rejects.on_error == "raise":
            rejects.add(rows[0], error)
            return []
    middle = len(rows) // 2
    halves = rows[:middle], rows[middle:]
    parts = (encode_rows(source, half, tokenizer, policy, rejects) for half in halves)
    return [pair for part in parts for pair in part]


class Tally:
    """Cuts documents that are too long, and counts everything for the report."""

    def __init__(self, stops, max_length, overlong):
        self.stops, self.stopped = stops, Counter()
        self.max_length, self.overlong = max_length, overlong
        self.read, self.lengths = [], []  # tokens of each example, and of each document kept
        self.trained = self.chats = self.cut = self.pieces_dropped = 0
        self.dropped = Counter()

    def fit(self, encoded, bos) -> list[tuple]:
        """The (tokens, weights) of all documents that (where, example) give."""
        found = []
        for where, example in encoded:
            n = len(example.tokens)
            too_long = 0 < self.max_length < n
            if too_long and self.overlong == "error":
                raise DataError(
                    f"{n} tokens, more than data.max_length={self.max_length}",
                    "raise it, or set data.overlong to truncate_end, truncate_prompt, drop or "
                    "split",
                    joint=": ",
                    where=where,
                    kind="too_long",
                )
            weights = example.weights
            pieces = fit(example.tokens, weights, self.max_length, self.overlong, bos)
            self.read.append(n)
            self.chats += example.kind == "chat"
            self.cut += too_long and bool(pieces)
            if too_long and pieces and self.overlong == "split":
                self.pieces_dropped += -(-n // self.max_length) - len(pieces)
            if not pieces:
                self.dropped[self._reason(weights, too_long)] += 1
            found += pieces
        return found

    def _reason(self, weights, too_long):
        if too_long and self.overlong == "drop":
            return "too_long"
        return "no_trained_token_left" if too_long and weights[1:].any() else "no_trained_token"

    def count(self, pieces) -> tuple[np.ndarray, np.ndarray]:
        """The pieces counted, and run together."""
        if not pieces:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        tokens, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        self.lengths += [len(tokens) for tokens, _ in pieces]
        self.trained += sum(int(np.count_nonzero(weights[1:])) for _, weights in pieces)
        self.stopped.update(tokens[np.isin(tokens, self.stops) & (weights > 0)].tolist())
        return tokens, weights

    def report(self, tokenizer, skipped):
        stop = self.stopped.most_common(1)
        documents, tokens = len(self.lengths), sum(self.lengths)
        return dict(
            examples=len(self.read),
            documents=documents,
            dropped=dict(self.dropped),
            skipped=dict(skipped),
            truncated=self.cut if self.overlong != "split" else 0,
            split=self.cut if self.overlong == "split" else 0,
            pieces_dropped=self.pieces_dropped,  # of those split: nothing is trained in them
            tokens=tokens,
            trained_tokens=self.trained,
            trained_fraction=self.trained / max(tokens - documents, 1),
            longest=max(self.lengths, default=0),
            lengths=describe(self.read) if self.read else None,
            chat=self.chats > 0,
            stop_token=tokenizer.convert_ids_to_tokens(stop[0][0]) if stop else None,
            stop_token_trained=bool(stop),
        )


def mark_spans(text: str, spans, before: str = "⟦", after: str = "⟧") -> str:
    """`text` with `before` and `after` put around each trained span."""
    pieces, at = [], 0
    for start, stop in spans:
        pieces += [text[at:start], before, text[start:stop], after]
        at = stop
    return "".join(pieces) + text[at:]


def _nothing_trained(first, report, policy, max_length):
    lost = report["dropped"] | report["skipped"]
    text = (
        f"nothing is trained in any of {sum(lost.values())} rows "
        f"({', '.join(f'{n} {reason}' for reason, n in lost.items())}): check "
        f"data.train_on={policy.get('train_on', 'assistant')!r} and data.max_length={max_length}."
    )
    if not first:
        return text
    where, example = first
    shown = mark_spans(example.text, example.spans)
    return f"{text} {where}, {len(example.tokens)} tokens, trained spans in ⟦ ⟧:\n{shown}"


def _warn(report):
    fraction = report["trained_fraction"]
    if report["chat"] and fraction == 1:
        logger.warning("every token of the chats is trained, the users' too: see data.train_on")
    if fraction < 0.01:
        logger.warning("only %.2f%% of the tokens are trained: see sftjax inspect", 100 * fraction)
    if report["chat"] and not report["stop_token_trained"]:
        logger.warning("no stop token is trained: the model won't learn to end its answer")
