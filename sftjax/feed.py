"""The run's data: training rows, validation sets and test questions, put on the mesh."""

import itertools
import math
import time
from collections import deque
from pathlib import Path

import jax
import numpy as np

from sftjax import config as config_lib
from sftjax import data as data_lib
from sftjax import sharding
from sftjax.config import ConfigError
from sftjax.data.conversation import to_conversation
from sftjax.models import hf

BATCH_KEYS = ("tokens", "targets", "weights", "positions", "segments")


def load_tokenizer(config):
    """The tokenizer of data.tokenizer, or of the model's directory, with data.template if set."""
    from transformers import AutoTokenizer

    d = config.data
    path = hf.resolve(d.tokenizer or config.model.path, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else path.parent)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"no tokenizer could be loaded from {path} (data.tokenizer, else model.path): {e}"
        ) from e
    if d.template:  # the export then carries it too
        if not Path(d.template).is_file():
            raise ConfigError(f"data.template={d.template!r} does not exist")
        tokenizer.chat_template = Path(d.template).read_text()
    return tokenizer


def policy(config) -> dict:
    """The arguments of data.encode that the config sets."""
    d = config.data
    fields = {k: v for k, v in d.fields.items() if v}
    return dict(train_on=d.train_on, stop_token=d.stop_token, fields=fields, system=d.system)


def sets(text: str) -> dict[str, str]:
    """{"name": path} of a comma-separated list of evaluation sets; the name is the file's stem."""
    paths = [p.strip() for p in text.split(",") if p.strip()]
    names = {Path(p).stem: p for p in paths}
    if len(names) < len(paths):
        raise ConfigError(f"data.validation={text!r}: two sets have the same file name")
    return names


def _pairs(lengths, window):
    """(query, key) pairs of documents of these lengths; window 0 = all before."""
    out = np.maximum(lengths - window, 0) if window else np.zeros_like(lengths)
    return lengths * (lengths + 1) // 2 - out * (out + 1) // 2


class Feed:
    """Everything read from the config's data, and the batches made from it."""

    def __init__(self, config, tokenizer, workdir, mesh):
        d, self.config, self.mesh = config.data, config, mesh
        if not d.train:
            raise ConfigError("data.train is empty; give a file, a glob or a hub data set id")
        self.policy, self.tokenizer = policy(config), tokenizer
        self.cache = Path(d.cache_dir) if d.cache_dir else workdir / "cache" / "tokens"
        self.store = self._store(d.train, d.limit)
        self.batch_size = config.train.batch_size
        self.wait = 0.0  # seconds the last step waited for its batch
        self._plan()
        self.sets = {n: self._store(p, 0) for n, p in sets(d.validation).items()}
        self._check_best()
        self.test = self._questions(d.test, config.eval.test_limit) if d.test else []

    def _store(self, path, limit):
        d = self.config.data
        return data_lib.build_store(
            data_lib.open_source(path, limit),
            self.tokenizer,
            self.policy,
            max_length=d.max_length,
            overlong=d.overlong,
            cache_dir=self.cache,
        )

    def _plan(self):
        """Know the number of steps before the first one."""
        d, t, size = self.config.data, self.config.train, self.batch_size
        lengths = self.store.lengths.astype(np.int64)
        self.rows = data_lib.Rows(self.store, d.max_length, d.packing, self.config.seed)
        epoch = self.rows.per_epoch
        per_row = (len(lengths) / epoch, lengths.sum() / epoch)
        self._units = dict(batch=size, epoch_rows=epoch, per_row=per_row)
        self.steps = config_lib.duration(t.duration, "train.duration", **self._units)
        if self.steps < 1:
            raise ConfigError(f"train.duration={t.duration!r} is no step at all")
        # Whole epochs end with their last row: the last batch is then filled with blank rows.
        epochs = self.steps * size / epoch
        exact = config_lib.epochs(t.duration)
        self.rows.total = self.steps * size if exact is None else math.ceil(exact * epoch - 1e-9)
        self.epochs = epochs if exact is None else exact
        # Model FLOPs count pairs of tokens that see each other, inside documents.
        self.per_row = {
            "tokens": per_row[1],
            "trained": self.store.report["trained_tokens"] / epoch,
            "pairs": lambda window: float(_pairs(lengths, window).sum()) / epoch,
        }

    def _check_best(self):
        """eval.best must be measured, or it would be ignored without a word."""
        e = self.config.eval
        kinds = ("loss", "perplexity", "accuracy")
        names = [f"{name}/{kind}" for name in self.sets for kind in kinds]
        if e.best and e.best not in names:
            raise ConfigError(
                f"eval.best={e.best!r} is not measured; there is {', '.join(names) or 'nothing'}"
                " (data.validation)"
            )
        if e.best and not self.every(e.every, "eval.every"):
            raise ConfigError("eval.best needs evaluations, but eval.every is 0")

    def _questions(self, path, limit):
        source = data_lib.open_source(path, limit)
        policy = {k: v for k, v in self.policy.items() if k not in ("train_on", "stop_token")}
        return [
            data_lib.prompt_and_answer(source[i], self.tokenizer, where=source.where(i), **policy)
            for i in range(len(source))
        ]

    def question(self, i: int) -> str:
        """The last user turn of a test question."""
        source = data_lib.open_source(self.config.data.test)
        keys = {k: self.policy[k] for k in ("fields", "system")}
        return to_conversation(source[i], **keys)["messages"][-2]["content"]

    def every(self, text, what) -> int:
        """Steps between two events of duration `text`; 0 = never."""
        return config_lib.duration(text, what, total=self.steps, **self._units)

    def due(self, step, text, what) -> bool:
        """Is an event of every `text` (a duration; 0 = never) due after this step?"""
        every = self.every(text, what)
        return bool(every) and (step % every == 0 or step == self.steps)

    def abstract_batch(self) -> dict:
        """A global training batch as ShapeDtypeStructs with shardings."""
        shape = (self.batch_size, self.config.data.max_length)
        layout = sharding.named(self.mesh, "batch", "seq")
        return {
            k: jax.ShapeDtypeStruct(
                shape, np.float32 if k == "weights" else np.int32, sharding=layout
            )
            for k in BATCH_KEYS
        }

    def batches(self, start: int):
        """Global batches of steps start, start+1, ... on the mesh, a few made ahead."""
        d = self.config.data
        local = sharding.local_rows(self.mesh, self.batch_size)
        host = data_lib.loader(
            self.rows,
            self.batch_size,
            local=local,
            start_step=start,
            stop_step=self.steps,
            workers=d.workers,
            prefetch=max(d.prefetch, 1),
        )
        on_device = (sharding.put_batch(self.mesh, b, self.batch_size) for b in host)
        ready = deque(itertools.islice(on_device, max(d.prefetch, 1)))
        while ready:
            began = time.monotonic()
            batch = ready.popleft()
            ready.extend(itertools.islice(on_device, 1))
            self.wait = time.monotonic() - began
            yield batch

    def eval_batches(self, name):
        """Every row of a validation set once, in order; blank rows fill the last batch."""
        d, size = self.config.data, self.config.eval.batch_size
        shards = sharding.axis_size(self.mesh, sharding.RULES["batch"])
        size = -(-size // shards) * shards
        rows = data_lib.Rows(self.sets[name], d.max_length, d.eval_packing, shuffle=False)
        local = sharding.local_rows(self.mesh, size)
        for batch in data_lib.loader(rows, size, local=local):
            yield sharding.put_batch(self.mesh, batch, size)

    def summary(self) -> str:
        """What is trained, in a few lines."""
        r = self.store.report
        lines = [
            f"{r['examples']} examples, {r['tokens']:,} tokens,"
            f" {r['trained_fraction']:.1%} trained; stop token {r.get('stop_token')}",
            f"{self.rows.per_epoch} rows an epoch, of {self.config.data.max_length} tokens,"
            f" packing {self.config.data.packing}, {self.rows.efficiency:.1%} full",
            f"{self.steps} steps of {self.batch_size} rows, {self.epochs:.2f} epochs",
        ]
        if r["truncated"] or r["dropped"]:
            lines.insert(1, f"{r['truncated']} truncated; dropped: {r['dropped']}")
        return "\n".join(lines)
