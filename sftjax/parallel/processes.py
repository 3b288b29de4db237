"""Several processes: how they start, and what they tell one another."""

import contextlib
import json
import socket
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sftjax.errors import MeshError, ProcessError
from sftjax.terminal import show


def gather(value: Any) -> list:
    """The value, anything JSON holds, of every process, by its id. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - len(text))))
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array, of all processes' parts. All processes must call it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def initialize(
    coordinator: str = "", processes: int = 0, process_id: int = -1, timeout: int = 300
) -> None:
    """Start JAX's distributed runtime when this is one of several processes, and say what it found.

    coordinator: host:port of process 0; "auto" where JAX itself knows the cluster (Cloud TPU,
    Slurm, ...); "" for one process. Raises ProcessError naming the processes that are missing after
    `timeout` seconds.
    """
    if not coordinator:
        return
    known: dict[str, Any] = {}
    if coordinator != "auto":
        _meet(coordinator, processes, process_id, timeout)
        known = dict(
            coordinator_address=coordinator, num_processes=processes, process_id=process_id
        )
    jax.distributed.initialize(initialization_timeout=timeout, **known)
    found = f"process {jax.process_index()} of {jax.process_count()}"
    show(f"{found}: {jax.local_device_count()} of {jax.device_count()} devices")


def _meet(coordinator, processes, me, timeout):
    """Gather all processes at the coordinator's port before JAX uses it.

    JAX ends a process without a name when another does not come; here it can be said who.
    """
    host, _, port = coordinator.rpartition(":")
    if not port.isdecimal() or not 0 <= me < processes:
        raise MeshError(
            f"mesh.coordinator={coordinator!r}, processes={processes}, process_id={me}: expected"
            " host:port, and an id from 0 to processes - 1"
        )
    deadline = time.monotonic() + timeout
    if me == 0:
        _wait_for_all(int(port), processes, deadline, timeout)
        return
    while True:
        with contextlib.suppress(OSError):
            left = max(deadline - time.monotonic(), 0.1)
            with socket.create_connection((host, int(port)), timeout=left) as peer:
                peer.sendall(f"{me:08d}".encode())
                if peer.recv(2) == b"go":
                    return
        if time.monotonic() > deadline:
            raise ProcessError(
                f"process {me} of {processes} found no complete group at {coordinator} within"
                f" {timeout} s: is process 0 running there, and are all others?"
            )
        time.sleep(0.2)


def _wait_for_all(port, processes, deadline, timeout):
    peers: dict[int, Any] = {}
    try:
        server = socket.create_server(("", port))
    except OSError as e:
        raise ProcessError(
            f"mesh.coordinator: port {port} can't be opened: {e.strerror or e}; choose another port"
        ) from None
    with server:
        while len(peers) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, processes)) - set(peers))
                raise ProcessError(
                    f"after {timeout} s, process {', '.join(map(str, missing))} of {processes} has"
                    " not come. Start every process with the same mesh.coordinator and"
                    " mesh.processes, each with its own mesh.process_id (0 is the coordinator)."
                ) from None
            number = _number(peer)
            if 0 < number < processes:
                peers[number] = peer
            else:  # somebody else's connection
                peer.close()
        for peer in peers.values():
            peer.sendall(b"go")
            peer.close()


def _number(peer) -> int:
    """The process id that a connection gives; -1 for one that gives none."""
    peer.settimeout(5)
    try:
        return int(peer.recv(8))
    except (ValueError, OSError):
        return -1
