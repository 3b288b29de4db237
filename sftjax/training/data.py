"""The run's data: training rows, validation sets and the test set, put on the mesh."""

import itertools
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax import data as data_lib
from sftjax import parallel, tasks
from sftjax.clean import prepare
from sftjax.config import ConfigError
from sftjax.data.mixing import spec as mix
from sftjax.data.mixing import stream
from sftjax.data.packing import truncate as lengths_lib
from sftjax.data.records.sources import RecordSource
from sftjax.data.token_store import TokenStore, facts_of
from sftjax.evaluation.sets import ANSWERS, Sets, tokenised
from sftjax.parallel import processes

FEW = 10  # steps that are said to be few


def _pairs(lengths, window):
    """(query, key) pairs of documents of these lengths; window 0 = all before."""
    out = np.maximum(lengths - window, 0) if window else np.zeros_like(lengths)
    return lengths * (lengths + 1) // 2 - out * (out + 1) // 2


class Feed(Sets):
    """Everything read from the config's data, and the batches made from it."""

    def __init__(self, config: ConfigDict, task: tasks.Task, workdir: Path, mesh: Mesh) -> None:
        d = config.data
        super().__init__(config, task, Path(d.cache_dir or workdir / "cache" / "tokens"), mesh)
        self.sources = mix.sources(config)
        self.names = tuple(s.name for s in self.sources) if len(self.sources) > 1 else ()
        stream.check(config, self.sources, hasattr(task.layout, "document"))
        self.notes = list[str]()
        self.stores: list[TokenStore] = []
        self.records = list[RecordSource]()  # what each store was made of
        for source in self.sources:
            self._prepare(source, workdir)
        self.batch_size = config.train.batch_size
        self.wait = 0.0  # seconds the last step waited for its batch
        self.open(d.validation, d.test)
        self._plan()
        self._check_best()
        task.saw([store.report for store in self.stores])

    def _prepare(self, source, workdir):
        """Tokenise a source's rows (of a stream, the first ones), and those held out of them."""
        c, tag = source.config, ""
        task = tasks.make(c, self.task.tokenizer) if self.names else self.task
        if self.names:
            workdir, tag = workdir / "sources" / source.name, f"{source.name}: "
        rows = prepare.training_rows(c, task, self.cache, workdir if jax.process_index() == 0 else None)
        self.notes += [tag + note for note in rows.notes]
        self.stores.append(tokenised(rows.train, rows.task, c, self.cache))
        self.task.opened(self.stores[-1].report)  # whose layout all share
        self.records.append(rows.train)
        self.facts["data"][source.name] = facts_of(rows.train, self.stores[-1])
        if rows.validation:
            name = f"validation_{source.name}" if self.names else "validation"
            self.sets[name] = self.measured(name, rows.validation, rows.task, c)

    def _plan(self):
        """Know the number of steps before the first one."""
        d, t, size = self.config.data, self.config.train, self.batch_size
        if d.buckets and (d.streaming or self.names or "none" not in (d.packing, d.eval_packing)):
            raise ConfigError(
                "data.buckets needs data.packing or data.eval_packing none, one source, and no data.streaming"
            )
        packing = "none" if self.task.layout.fixed else d.packing
        options = (d.max_length, packing, self.config.seed)
        if self.names:
            phases = mix.phases(self.config, self.sources, self.stores)
            stores = dict(zip(self.names, self.stores, strict=True))
            rows = data_lib.Mixture(stores, *options, phases=phases, layout=self.task.layout)
        else:
            phases, rows = [], self.rows_of(self.stores[0], d.packing, size, seed=self.config.seed)
        self.widths = getattr(rows, "widths", [d.max_length])
        self.rows, self.store = rows, rows.store
        lengths = rows.store.lengths.astype(np.int64)
        per_row = (rows.mean(np.ones(len(lengths))), rows.mean(lengths))
        # Phases have cycles of their own, a stream has no end: then an epoch has no length.
        epoch = None if len(phases) > 1 or d.streaming else rows.per_epoch
        self._units = dict(batch=size, epoch_rows=epoch, per_row=per_row)
        self.steps = config_lib.duration(t.duration, "train.duration", **self._units)
        if self.steps < 1:
            raise ConfigError(f"train.duration={t.duration!r} is no step at all")
        rows.total, self.epochs = self.steps * size, self.steps * size / rows.per_epoch
        n, unit = config_lib.amount(t.duration, "train.duration")
        if unit == "epochs":  # they end with their last row: the last batch is then filled with blank rows
            rows.total, self.epochs = math.ceil(n * rows.per_epoch - 1e-9), n
        if phases:
            rows.ends = self._phase_ends(phases)
        tokens, trained = (
            np.concatenate([np.full(len(s), s.report[count] / len(s)) for s in self.stores])
            for count in ("tokens", "trained_tokens")
        )
        # Model FLOPs count pairs of tokens that see each other, inside documents.
        self.per_row: dict[str, Any] = {
            "tokens": rows.mean(tokens),
            "trained": rows.mean(trained),
            "pairs": lambda window: rows.mean(_pairs(lengths, window)),
        }

    def _phase_ends(self, phases):
        """The rows at which the phases end, all but the last's."""
        steps = [
            config_lib.duration(p.until, f"data.phases[{i}].until", total=self.steps, **self._units)
            for i, p in enumerate(phases[:-1])
        ]
        if any(b <= a for a, b in itertools.pairwise([0, *steps, self.steps])):
            raise ConfigError(f"data.phases end at the steps {steps} of {self.steps}: each must have a step")
        return tuple(step * self.batch_size for step in steps)

    @property
    def identity(self) -> str:
        """What data this is: the stores' names, and the shards of a stream."""
        parts = [store.folder.name for store in self.stores]
        if self.config.data.streaming:
            parts += [stream.identity(s.config.data.train) for s in self.sources]
        return " ".join(parts)

    def position(self, step: int) -> dict[str, float]:
        """What each of several sources has given before `step`: documents, epochs; for the log."""
        if not self.names or self.config.data.streaming:
            return {}
        given, out = self.rows.position(step * self.batch_size), dict[str, float]()
        for (name, documents), store in zip(given.items(), self.stores, strict=True):
            out |= {f"documents/{name}": documents, f"epochs/{name}": documents / len(store)}
        return out

    def documents(self, step: int) -> list[str]:
        """The files and rows in the batch of `step`, or how far a stream was read."""
        if self.config.data.streaming:
            return [f"a stream, read to {json.dumps(self.state(step))}"]
        rows = range((step - 1) * self.batch_size, min(step * self.batch_size, self.rows.total))
        found = dict.fromkeys(doc for r in rows for doc, _, _ in self.rows.pieces(r))
        starts = np.cumsum([0, *map(len, self.stores)])
        places = []
        for doc in found:
            s = int(np.searchsorted(starts, doc, side="right")) - 1
            places.append(self.records[s].where(int(self.stores[s].records[doc - starts[s]])))
        return list(dict.fromkeys(places))

    def state(self, step: int) -> dict:
        """Where the data stand after the batch of the last step, `step`; for the checkpoint."""
        if not self.config.data.streaming:
            return self.position(step)
        parts = dict(processes.gather(self._state))  # of all processes
        return {"stream": [parts[part] for part in sorted(parts)]}

    def _check_best(self):
        """eval.best must be measured, or it would be ignored without a word."""
        e = self.config.eval
        names = [f"{name}/{kind}" for name in self.sets for kind in ("loss", *self.task.metrics)]
        if e.shots and not self.questions:
            raise ConfigError(f"eval.shots={e.shots} stand before questions, and data.test is empty")
        names += [f"{ANSWERS}/{kind}" for kind in e.metrics if self.questions]
        if e.best and e.best not in names:
            raise ConfigError(
                f"eval.best={e.best!r} is not measured; there is {', '.join(names) or 'nothing'} (data.validation)"
            )
        if e.best and not self.every(e.every, "eval.every"):
            raise ConfigError("eval.best needs evaluations, but eval.every is 0")

    def every(self, text: str, what: str) -> int:
        """Steps between two events of duration `text`; 0 = never."""
        return config_lib.duration(text, what, total=self.steps, **self._units)

    def due(self, step: int, text: str, what: str) -> bool:
        """Is an event of every `text` (a duration; 0 = never) due after this step?"""
        every = self.every(text, what)
        return bool(every) and (step % every == 0 or step == self.steps)

    @property
    def new_tokens(self) -> list[int]:
        """The ids of the tokens of data.add_tokens."""
        added = list(self.config.data.add_tokens)
        return self.task.tokenizer.convert_tokens_to_ids(added) if added else []

    def width(self, batch: Mapping[str, jax.Array]) -> int:
        """Which of `widths` a batch has."""
        return self.widths[0] if self.task.layout.fixed else batch["tokens"].shape[1]

    def abstract_batch(self, width: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """A global training batch as ShapeDtypeStructs with shardings; default the widest."""
        width = int(width or self.config.data.max_length)
        return parallel.abstract_batch(self.mesh, self.spec(self.batch_size, width))

    def batches(self, start: int, state: Mapping | None = None) -> Iterator[dict[str, jax.Array]]:
        """Global batches of steps start, start+1, ...; state: what `state` returned at `start`."""
        prefetch = max(self.config.data.prefetch, 1)
        if self.config.data.streaming:
            host = self._stream(start, state, prefetch)
        else:
            if state and state != self.position(start):
                raise ConfigError(
                    f"the data stood at {state} at step {start}, and would now at"
                    f" {self.position(start)}: use another workdir"
                )
            rows = data_lib.loader(
                self.rows,
                self.batch_size,
                local=parallel.local_rows(self.mesh, self.batch_size),
                start_step=start,
                stop_step=self.steps,
                workers=self.config.data.workers,
                prefetch=prefetch,
            )
            host = ((batch, None) for batch in rows)
        on_device = ((self.put(batch, self.batch_size), state) for batch, state in host)
        ready = deque(itertools.islice(on_device, prefetch))
        while ready:
            began = time.monotonic()
            batch, self._state = ready.popleft()
            ready.extend(itertools.islice(on_device, 1))
            self.wait = time.monotonic() - began
            yield batch

    def _stream(self, start, state, prefetch):
        """(batch of this process, (its part, the stream's state after it)) of each step."""
        parts = parallel.row_parts(self.mesh, self.batch_size)
        local = parallel.local_rows(self.mesh, self.batch_size)
        part = parts.index(local)
        if state and len(state["stream"]) != len(parts):
            raise ConfigError(
                f"the stream was read in {len(state['stream'])} parts, and this mesh reads it in"
                f" {len(parts)}: resume with as many processes, or use another workdir"
            )
        amounts = self.rows.phases[0].amounts if self.names else [1.0]
        specs = []
        for s, weight, store in zip(self.sources, amounts, self.stores, strict=True):
            d, task = s.config.data, tasks.make(s.config, self.task.tokenizer)
            own = (d.overlong, d.on_error, d.max_skipped, weight, store.report["left_out"])
            specs.append(stream.Spec(s.name, d.train, task, *own))
        d = self.config.data
        host = stream.batches(
            specs,
            length=d.max_length,
            rows=len(local),
            packing=d.packing,
            seed=self.config.seed,
            window=d.shuffle_window,
            part=part,
            parts=len(parts),
            prefetch=prefetch,
            rejects=self.cache / f"stream.{part}.rejects.jsonl",
        )
        try:
            if state:
                host.set_state(state["stream"][part])
            for _ in range(start, self.steps):
                yield next(host), (part, host.get_state())
        finally:
            host.close()

    def summary(self) -> str:
        """What is trained, in a few lines."""
        d, rows, lines = self.config.data, self.rows, list(self.notes)
        for source, store in zip(self.sources, self.stores, strict=True):
            tag = f"{source.name}: " * bool(self.names) + "a sample: " * d.streaming
            lines += [tag + self.task.summary(store.report)]
            lines += [] if self.task.layout.fixed else lengths_lib.lines(store.report)
        lines += rows.describe() if self.names else []
        epoch = self._units["epoch_rows"]
        size = f"{epoch} rows an epoch, of" if epoch else "rows of"
        epochs = f", {self.epochs:.2f} epochs" if epoch else ""
        packed = f"{d.max_length} tokens, packing {d.packing}, {rows.efficiency:.1%} full"
        lines += [
            f"{size} {'one example' if self.task.layout.fixed else packed}",
            f"{self.steps} steps of {self.batch_size} rows{epochs}",
        ]
        if self.steps <= FEW and d.packing != "none" and not self.task.layout.fixed:
            lines += [
                f"only {self.steps} steps: packing puts {len(self.store):,} documents into {rows.per_epoch} rows; for"
                " more, lower train.batch_size or data.max_length, or set data.packing=none"
            ]
        return "\n".join(lines)
