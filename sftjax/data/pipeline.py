"""Tokenise once into memory-mapped arrays; plan rows from lengths; read any row by its index.

A row's content is a function of (store, length, packing, seed, row index) and of nothing else, so
every host reads its own rows, the number of steps is known before training, and resuming is an
index.
"""

import hashlib
import json
import logging
import math
import operator
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from sftjax.data.chat import encode_batch, stop_ids
from sftjax.data.pack import Batch, Plan, blank_batch, fill_row, plan
from sftjax.data.sources import DataError, Source
from sftjax.data.template import template_text

FORMAT = 1  # of the files below; part of the cache's key
CHUNK = 1000  # records in one call of the tokenizer
OVERLONG = ("truncate_end", "drop", "split", "error")
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
    source: Source, tokenizer, policy: dict, max_length: int, overlong: str, cache_dir
) -> TokenStore:
    """Tokenise all of `source`, or open what an earlier call with the same inputs has written.

    Args:
      policy: the keywords of `encode`: train_on, stop_token, template, fields, system.
      max_length: the most tokens of a document; 0 = no limit.
      overlong: what becomes of a longer one: "truncate_end" | "drop" | "split" (pieces) | "error".
        A document or piece without a trained token is dropped and counted.
      cache_dir: a folder for the result, named by a hash of everything that changes it.

    Raises: DataError for a bad row, or if nothing at all is trained.
    """
    if overlong not in OVERLONG:
        raise DataError(f"data.overlong={overlong!r}: expected {' | '.join(OVERLONG)}")
    folder = Path(cache_dir) / store_key(source, tokenizer, policy, max_length, overlong)
    if not (folder / "report.json").exists():
        _write_atomically(folder, source, tokenizer, policy, max_length, overlong)
    store = TokenStore(folder)
    _warn(store.report)
    return store


def store_key(source, tokenizer, policy, max_length, overlong) -> str:
    """The name of a store: a hash of the data, the tokenizer, the template and the settings."""
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    settings = {k: dict(v) if k == "fields" and v else v for k, v in policy.items()}
    settings["template"] = template_text(tokenizer, policy.get("template"))
    limits = [len(source), max_length, overlong, FORMAT]
    known = json.dumps([settings, special, limits], sort_keys=True, default=str)
    digest = hashlib.sha256(source.fingerprint().encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(known.encode())
    return digest.hexdigest()[:32]


def _write_atomically(folder, source, tokenizer, policy, max_length, overlong):
    """Write beside `folder`, then rename: a killed or second process leaves no half of a store."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise DataError(f"data.cache_dir={folder.parent}: can't be written: {error}") from None
    try:
        _write(temporary, source, tokenizer, policy, max_length, overlong)
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "report.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder, source, tokenizer, policy, max_length, overlong):
    tally, lengths, first = _Tally(stop_ids(tokenizer, policy.get("template"))), [], None
    with open(folder / "tokens.i32", "wb") as tokens_file:
        with open(folder / "weights.f32", "wb") as weights_file:
            for where, example in _examples(source, tokenizer, policy):
                first = first or (where, example)
                for tokens, weights in tally.fit(example, max_length, overlong, where):
                    tokens.tofile(tokens_file)
                    weights.tofile(weights_file)
                    lengths.append(len(tokens))
    if not lengths:
        raise DataError(_nothing_trained(*first, tally, policy, max_length))
    np.save(folder / "offsets.npy", np.append(0, np.cumsum(lengths, dtype=np.int64)))
    (folder / "report.json").write_text(json.dumps(tally.report(tokenizer, lengths), indent=1))


def _examples(source, tokenizer, policy):
    from tqdm import tqdm

    quiet = len(source) < 2 * CHUNK or not sys.stderr.isatty()
    with tqdm(total=len(source), desc="tokenise", unit="row", disable=quiet) as progress:
        for start in range(0, len(source), CHUNK):
            rows = range(start, min(start + CHUNK, len(source)))
            wheres = [source.where(i) for i in rows]
            yield from zip(
                wheres,
                encode_batch([source[i] for i in rows], wheres, tokenizer, **policy),
                strict=True,
            )
            progress.update(len(rows))


def fit(tokens, weights, max_length: int, overlong: str) -> list[tuple]:
    """A document as the pieces, of at most `max_length` tokens, in which something is trained.

    The first token of a piece has nothing before it that could predict it, so it doesn't count.
    """
    limit = max_length or len(tokens)
    pieces = [(tokens, weights)]
    if len(tokens) > limit and overlong == "drop":
        return []
    if len(tokens) > limit and overlong == "truncate_end":
        pieces = [(tokens[:limit], weights[:limit])]
    if len(tokens) > limit and overlong == "split":
        starts = range(0, len(tokens), limit)
        pieces = [(tokens[at : at + limit], weights[at : at + limit]) for at in starts]
    return [piece for piece in pieces if piece[1][1:].any()]


class _Tally:
    """Counts what `fit` does, for the report."""

    def __init__(self, stops):
        self.stops, self.stopped = stops, Counter()
        self.examples = self.truncated = self.trained = self.chats = 0
        self.dropped = Counter()

    def fit(self, example, max_length, overlong, where):
        tokens, weights = example.tokens, example.weights
        self.examples += 1
        self.chats += example.kind == "chat"
        too_long = bool(max_length) and len(tokens) > max_length
        if too_long and overlong == "error":
            raise DataError(
                f"{where}: {len(tokens)} tokens, more than data.max_length={max_length}: raise "
                "it, or set data.overlong to truncate_end, drop or split"
            )
        pieces = fit(tokens, weights, max_length, overlong)
        self.truncated += too_long and bool(pieces) and overlong != "drop"
        if not pieces:
            self.dropped[self._reason(weights, too_long, overlong)] += 1
        for tokens, weights in pieces:
            self.trained += int(np.count_nonzero(weights[1:]))
            self.stopped.update(tokens[np.isin(tokens, self.stops) & (weights > 0)].tolist())
        return pieces

    def _reason(self, weights, too_long, overlong):
        if too_long and overlong == "drop":
            return "too_long"
        return "no_trained_token_left" if too_long and weights[1:].any() else "no_trained_token"

    def report(self, tokenizer, lengths):
        stop = self.stopped.most_common(1)
        tokens = int(np.sum(lengths))
        return dict(
            examples=self.examples,
            documents=len(lengths),
            dropped=dict(self.dropped),
            truncated=int(self.truncated),
            tokens=tokens,
            trained_tokens=self.trained,
            trained_fraction=self.trained / max(tokens - len(lengths), 1),
            longest=int(max(lengths)),
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


def _nothing_trained(where, example, tally, policy, max_length):
    reasons = ", ".join(f"{n} {reason}" for reason, n in tally.dropped.items())
    return (
        f"nothing is trained in any of {tally.examples} rows ({reasons}): check "
        f"data.train_on={policy.get('train_on', 'assistant')!r} and data.max_length={max_length}."
        f" {where}, {len(example.tokens)} tokens, trained spans in ⟦ ⟧:\n"
        + mark_spans(example.text, example.spans)
    )


def _warn(report):
    fraction = report["trained_fraction"]
    if report["chat"] and fraction == 1:
        logger.warning("every token of the chats is trained, the users' too: see data.train_on")
    if fraction < 0.01:
        logger.warning("only %.2f%% of the tokens are trained: see sftjax inspect", 100 * fraction)
    if report["chat"] and not report["stop_token_trained"]:
        logger.warning("no stop token is trained: the model won't learn to end its answer")


class Rows:
    """The stream of packed rows over all epochs, by index: `rows[r]` -> Batch row of arrays [S].

    Each epoch has a shuffle and so a packing of its own, drawn from (seed, epoch). Best-fit
    decreasing makes a number of rows that depends on the lengths alone: every epoch has
    `per_epoch` of them. From `total` on, rows are blank, so that a last batch can be full.
    """

    def __init__(
        self,
        store,
        length: int,
        packing: str = "bfd",
        seed: int = 0,
        total_rows: int | None = None,
        *,
        epochs: float = 1,
        shuffle: bool = True,
        pad_id: int = 0,
    ):
        """Args:
        store: a TokenStore, or anything with `lengths` and [i] -> (tokens, weights).
        length: tokens in a row.
        packing: a strategy of `pack`.
        total_rows: how many rows there are in all; default as many as `epochs` has,
        epochs: how often to go through the data, fractions too.
        """
        self.store, self.length, self.packing = store, length, packing
        self.seed, self.shuffle, self.pad_id = seed, shuffle, pad_id
        self._plans, self._lock = {}, Lock()
        longest = int(max(store.lengths, default=0))
        if longest > length and packing in ("bfd", "none"):
            raise DataError(
                f"a document of {longest} tokens is longer than a row of {length}: build the store "
                f"with max_length={length}, or set data.packing to bfd_split or wrapped"
            )
        self.per_epoch = len(self._plan(0))
        if total_rows is None:
            total_rows = math.ceil(epochs * self.per_epoch - 1e-9)
        self.total = operator.index(total_rows)

    def __len__(self):
        return self.total

    @property
    def efficiency(self) -> float:
        """The share of an epoch's cells that hold a token rather than padding."""
        first = self._plan(0)
        return float((first.stop - first.start).sum() / max(len(first) * self.length, 1))

    def __getitem__(self, r: int) -> Batch:
        return {k: v[0] for k, v in self.batch([r]).items()}

    def batch(self, indices) -> Batch:
        """The rows of these indices as arrays [B, S]; blank from `total` on."""
        batch = blank_batch(len(indices), self.length, self.pad_id)
        for b, r in enumerate(indices):
            if r < 0:
                raise IndexError(f"row {r}")
            if r < self.total:
                epoch, row = divmod(int(r), self.per_epoch)
                pieces = self._plan(epoch).row(row)
                fill_row({k: v[b] for k, v in batch.items()}, self.store, pieces)
        return batch

    def _plan(self, epoch) -> Plan:
        with self._lock:
            if epoch not in self._plans:
                # Two, because prefetching reads across the border of two epochs.
                self._plans = dict(list(self._plans.items())[-1:])
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch):
        lengths = np.asarray(self.store.lengths)
        if not self.shuffle:
            return plan(lengths, self.length, self.packing)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        order = rng.permutation(len(lengths))  # breaks the ties of equal lengths
        packed = plan(lengths[order], self.length, self.packing)
        return _permute_rows(replace(packed, doc=order[packed.doc]), rng)

    def __getstate__(self):
        return self.__dict__ | {"_plans": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=Lock())


def _permute_rows(packed: Plan, rng) -> Plan:
    sizes = np.diff(packed.offsets)
    order = rng.permutation(len(packed))
    offsets = np.append(0, np.cumsum(sizes[order]))
    within = np.arange(len(packed.doc)) - np.repeat(offsets[:-1], sizes[order])
    pieces = np.repeat(packed.offsets[:-1][order], sizes[order]) + within
    return Plan(packed.doc[pieces], packed.start[pieces], packed.stop[pieces], offsets)


def loader(
    rows: Rows,
    batch_size: int,
    *,
    local: Sequence[int] | None = None,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
):
    """Batches in order, read ahead by threads, or by `workers` processes.

    Step b is the global rows [b * batch_size, (b + 1) * batch_size); this process reads those
    at the places `local` within them, so that all processes together read what one would.

    Args:
      start_step: the first step; nothing before it is read.
      stop_step: one past the last; default as many as hold all rows, the last one padded.
      prefetch: batches read ahead, by each worker where there are any.

    Returns: a grain iterator of Batch, numpy [local rows, S], with get_state() and set_state().
    """
    import grain

    if stop_step is None:
        stop_step = -(-rows.total // batch_size)
    local = range(batch_size) if local is None else local
    if not local or min(local) < 0 or max(local) >= batch_size:
        raise ValueError(f"local rows {local} are not within a batch of {batch_size}")
    steps = grain.MapDataset.range(start_step, max(stop_step, start_step))
    batches = steps.map(_Read(rows, batch_size, local))
    options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
    batches = batches.to_iter_dataset(options)
    if workers:
        _settle_flags()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, prefetch))
    return iter(batches)


def _settle_flags():
    """grain reads absl flags when it starts processes, and fails where nobody parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class _Read:
    """Step -> batch. A class, not a closure: worker processes get it pickled."""

    def __init__(self, rows, batch_size, local):
        self.rows, self.batch_size, self.local = rows, batch_size, local

    def __call__(self, step) -> Batch:
        first = int(step) * self.batch_size
        return self.rows.batch([first + at for at in self.local])
