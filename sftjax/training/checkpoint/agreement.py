"""What processes tell one another of a save, in JAX's key-value store: a failure at once."""

import itertools
import time

import jax
from jax._src import distributed

from sftjax.errors import CheckpointError

TIMEOUT = 1200.0  # seconds for the slowest process to write its part
_numbers = itertools.count()


class Agreement:
    """Of one save. All processes must make the same ones in the same order."""

    def __init__(self) -> None:
        self._prefix = f"sftjax/save/{next(_numbers)}"
        self._client = distributed.global_state.client if jax.process_count() > 1 else None

    def post(self, what: str, text: str = "-") -> None:
        """Say that this process has come so far, or that it "failed", and why."""
        if self._client is not None:
            self._client.key_value_set(f"{self._prefix}/{what}/{jax.process_index()}", text, allow_overwrite=True)

    def wait(self, what: str, count: int, timeout: float = TIMEOUT) -> None:
        """Until `count` processes have said so. Raises: CheckpointError if one has failed."""
        end, pause = time.monotonic() + timeout, 0.02
        while self._client is not None and len(self._said(what)) < count:
            if failed := self._said("failed"):
                raise CheckpointError("; ".join(f"process {p}: {t}" for p, t in failed.items()))
            if time.monotonic() > end:
                raise CheckpointError(f"not all processes wrote their part within {timeout:.0f} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """The barrier of Orbax's background threads."""
        self.post(key)
        self.wait(key, jax.process_count(), timeout_ms / 1000)

    def _said(self, what) -> dict[int, str]:
        assert self._client is not None
        found = self._client.key_value_dir_get(f"{self._prefix}/{what}/")
        return {int(key.rpartition("/")[2]): text for key, text in found}
