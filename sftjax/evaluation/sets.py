"""The sets that a model is measured on, and their batches on the mesh."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import data as data_lib
from sftjax import parallel
from sftjax.config import ConfigError
from sftjax.data.masking.conversation import read_field
from sftjax.data.packing.pack import Field
from sftjax.data.token_store import TokenStore, facts_of
from sftjax.tasks import Task


def named(text: str) -> dict[str, str]:
    """{"name": path} of a comma-separated list of evaluation sets; the name is the file's stem."""
    paths = [p.strip() for p in text.split(",") if p.strip()]
    names = {Path(p).stem: p for p in paths}
    if len(names) < len(paths):
        raise ConfigError(f"data.validation={text!r}: two sets have the same file name")
    return names


def tokenised(source: Any, task: Task, config: ConfigDict, cache: Path | str) -> TokenStore:
    """A source's rows, tokenised as the config's section `data` says."""
    d = config.data
    store = data_lib.build_store(source, task, d.max_length, d.overlong, cache, d.on_error, d.max_skipped)
    task.opened(store.report)
    return store


ANSWERS = "answers"  # stands for the name of a set before the metrics of generated answers


class Sets:
    """What is measured: sets with a loss, test sets, and questions that are answered.

    sets, tests: {name: its tokenised rows}; questions: what the task asks of data.test.
    facts: what is known of each set's rows, see token_store.facts_of.
    """

    names: tuple[str, ...] = ()  # of several training sources: then a batch says which is whose

    def __init__(self, config: ConfigDict, task: Task, cache: Path, mesh: Mesh) -> None:
        """cache: the folder of tokenised rows."""
        self.config, self.task, self.cache, self.mesh = config, task, cache, mesh
        self.sets, self.tests = dict[str, TokenStore](), dict[str, TokenStore]()
        self.questions, self.groups = list[Any](), list[Any]()  # groups: of the questions
        self.opened = dict[str, Any]()  # the source of each set
        self.readers = dict[str, Task]()  # and the task that reads it
        self.records = list[Any]()  # the training rows, a source each, where there are any
        self.facts: dict[str, dict[str, Any]] = {"data": {}, "evaluation": {}}

    def open(self, validation: str, test: str) -> None:
        """Read data.validation's sets and data.test: questions where the task generates."""
        for name, path in named(validation).items():
            if name == ANSWERS:
                raise ConfigError(
                    f"data.validation: a set called {ANSWERS!r} would stand under the name of the"
                    f" answers to data.test; call {path} something else"
                )
            self.sets[name] = self.measured(name, data_lib.open_source(path), self.task)
        if not test:
            return
        source = data_lib.open_source(test, self.config.eval.test_limit)
        if self.task.generates:
            self.facts["evaluation"][ANSWERS] = facts_of(source)
            shots = self.shots()
            self.questions = self.task.questions(source, *([shots] if shots else []))
            self.groups = self._groups(source, range(len(source)))
            return
        [name] = named(test) if "," not in test else ["test"]
        if name in self.sets:
            name = f"test_{name}"
        self.tests[name] = self.measured(name, source, self.task)

    def shots(self) -> Callable[[int, dict], list[dict]] | None:
        """What draws the examples before each question from the training rows; None for none.

        It gets the question's number and record. Raises: ConfigError where there are too few rows.
        """
        k, seed, rows = self.config.eval.shots, self.config.seed, self.records
        if not k:
            return None
        if not rows:
            raise ConfigError(f"eval.shots={k} takes its examples from data.train, which is empty")
        starts = np.cumsum([0, *map(len, rows)])
        if starts[-1] <= k:
            raise ConfigError(f"eval.shots={k}: data.train has {starts[-1]} rows, and takes one more")

        def draw(question: int, record: dict) -> list[dict]:
            chosen = np.random.default_rng([seed, question]).choice(starts[-1], k + 1, replace=False)
            at = np.searchsorted(starts, chosen, side="right") - 1
            found = (rows[i][int(n - starts[i])] for i, n in zip(at, chosen, strict=True))
            return [one for one in found if one != record][:k]

        return draw

    def measured(self, name: str, source: Any, task: Task, config: ConfigDict | None = None) -> TokenStore:
        """The tokenised rows of a set. config: of the source that it was held out of."""
        store = tokenised(source, task, config or self.config, self.cache)
        self.opened[name], self.readers[name] = source, task
        self.facts["evaluation"][name] = facts_of(source, store)
        return store

    def rows_of(self, store: TokenStore, packing: str, batch_size: int, **options: Any) -> Any:
        """A store's rows in batches' widths: data.Rows, or data.Buckets."""
        d, options["layout"] = self.config.data, self.task.layout
        packing = "none" if self.task.layout.fixed else packing
        if d.buckets and packing == "none":
            options |= dict(widths=d.buckets, batch_size=batch_size)
            return data_lib.Buckets(store, d.max_length, **options)
        return data_lib.Rows(store, d.max_length, packing, **options)

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """The arrays of a batch; those of several sources say which is whose."""
        spec = self.task.layout.spec(rows, width)
        if self.names:
            spec["sources"] = spec["weights"]._replace(dtype=np.int32)
        return spec

    def put(self, batch: Any, size: int) -> dict[str, jax.Array]:
        """This process's part of a batch of `size` rows, on the mesh."""
        axes = {name: field.axes for name, field in self.spec(1, 1).items()}
        return parallel.put_batch(self.mesh, batch, size, axes)

    def record_order(self, store: TokenStore) -> np.ndarray | None:
        """The record of each document, in the order of `eval_batches`; None where one is cut."""
        rows = self._eval_rows(store)[0]
        documents = [doc for r in range(rows.total) for doc, _, _ in rows.pieces(r)]
        if len(set(documents)) < len(documents):
            return None
        return store.records[np.array(documents, np.int64)]

    def file_hash(self, name: str) -> str:
        """A hash of the files of a set, by which its rows are known elsewhere."""
        files = self.facts["evaluation"][name]["files"]
        return hashlib.sha256(" ".join(f["sha256"] for f in files).encode()).hexdigest()[:16]

    def groups_of(self, name: str, store: TokenStore) -> list[Any]:
        """What each document has under eval.group; [] for "". Raises: ConfigError, DataError."""
        if not self.config.eval.group:
            return []
        if (records := self.record_order(store)) is None:
            raise ConfigError("eval.group needs whole documents: set data.eval_packing='bfd'")
        return self._groups(self.opened[name], records)

    def _groups(self, source, records):
        key, rows = self.config.eval.group, map(int, records)
        return [read_field(source[i], key, source.where(i), "eval.group") for i in rows if key]

    def _eval_rows(self, store):
        """(rows, how many of them are a batch)."""
        size = self.config.eval.batch_size
        shards = parallel.axis_size(self.mesh, parallel.RULES["batch"])
        size = -(-size // shards) * shards
        return self.rows_of(store, self.config.data.eval_packing, size, shuffle=False), size

    def eval_batches(self, store: TokenStore) -> Iterator[dict[str, jax.Array]]:
        """Every row of a validation or test set once, in order; blank rows fill the last batch."""
        rows, size = self._eval_rows(store)
        local = parallel.local_rows(self.mesh, size)
        for batch in data_lib.loader(rows, size, local=local):
            yield self.put(batch, size)
