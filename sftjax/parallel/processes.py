"""Several processes: how they start, and what they tell one another."""

import contextlib
import errno
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxlib import _jax

from sftjax.errors import MeshError, ProcessError
from sftjax.parallel import watch
from sftjax.terminal import show

SERVICE = Path(__file__).with_name("service_worker.py")
_watch: watch.Watch | None = None  # of this process, where it is one of several


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


def initialize(coordinator: str = "", processes: int = 0, process_id: int = -1, timeout: int = 300) -> None:
    """Start JAX's distributed runtime when this is one of several processes, and say what it found.

    coordinator: host:port of process 0; "auto" where JAX itself knows the cluster (Cloud TPU, Slurm, ...); "" for one
    process. Raises ProcessError, naming who is late by `timeout` seconds.
    """
    global _watch
    if not coordinator:
        return
    known: dict[str, Any] = {}
    if coordinator != "auto":
        host, port = _split(coordinator, processes, process_id)
        known = dict(coordinator_address=coordinator, num_processes=processes, process_id=process_id)
        if process_id == 0:
            family, address = _own_address(host, port)
            known["coordinator_bind_address"] = _written(*address)
            _wait_for_all(family, address, processes, timeout)
        else:
            _meet((host, port), processes, process_id, timeout)
    try:
        # The service of JAX that process 0 starts gets a process of its own: JAX aborts each one that cannot reach it,
        # before it is told that process 0 is lost.
        with mock.patch.object(_jax, "get_distributed_runtime_service", _Service):
            jax.distributed.initialize(initialization_timeout=timeout, **known)
    except RuntimeError as e:
        raise ProcessError(f"mesh.coordinator={coordinator}: JAX could not start: {e}") from e
    if jax.process_count() > 1:
        _watch = _connected("" if coordinator == "auto" else host)
    found = f"process {jax.process_index()} of {jax.process_count()}"
    show(f"{found}: {jax.local_device_count()} of {jax.device_count()} devices")


class _Service:
    """In place of JAX's DistributedRuntimeService."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(SERVICE), json.dumps([arguments, options])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us
        )
        if self._worker.stdout is None or self._worker.stdout.readline() != "up\n":
            raise RuntimeError(f"{SERVICE.name} ended with code {self._worker.wait()}")

    def shutdown(self) -> None:
        """End it, once all processes are done."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._worker.communicate("stop\n", timeout=10)


def together() -> contextlib.AbstractContextManager[None]:
    """Around what all processes do together; the loss of one then ends the others, by its name."""
    return _watch.together() if _watch else contextlib.nullcontext()


def done() -> None:
    """Say that this process ends as it should, where it ends by another way than Python's."""
    if _watch:
        _watch.done()


def told(seconds: float, own: list[float]) -> None:
    """Compare this process's times with the others', see Watch.told; nothing where it is alone."""
    if _watch:
        _watch.told(seconds, own)


def _connected(host: str) -> watch.Watch:
    """host: of process 0; "" where JAX alone knows it, and then the name that it has for itself."""
    me, n, name = jax.process_index(), jax.process_count(), socket.gethostname()
    if me == 0:
        family, address = _own_address(host, 0) if host else (socket.AF_INET, ("", 0))
        server = socket.create_server(address, family=family)
        port, word = server.getsockname()[1], secrets.token_hex(16)  # by the word ours are known
        hosts = gather([name, port, word])
        peers = watch.accept(server, word, n)
    else:
        hosts = gather([name, 0, ""])
        _, port, word = hosts[0]
        peers = {0: watch.connect(host or hosts[0][0], port, word, me)}
    return watch.Watch(me, [name for name, _, _ in hosts], peers)


def _split(coordinator, processes, me):
    """(host, port) of mesh.coordinator."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16 or not 0 <= me < processes:
        raise MeshError(
            f"mesh.coordinator={coordinator!r}, processes={processes}, process_id={me}: expected"
            " host:port, and an id from 0 to processes - 1"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _own_address(host, port):
    """(family, (address, port)) of process 0: the coordinator's, or of JAX's own variable."""
    own = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0]
    host = own.removeprefix("[").removesuffix("]") or host
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as e:
        raise ProcessError(
            f"mesh.coordinator: the host {host!r} is not known: {getattr(e, 'strerror', None) or e}"
        ) from None
    return family, address[:2]


def _written(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _meet(address, processes, me, timeout):
    """Wait at the coordinator's port for all: JAX would not say whom it waits for in vain."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(OSError):
            left = max(deadline - time.monotonic(), 0.1)
            with socket.create_connection(address, timeout=left) as peer:
                peer.sendall(f"{me:08d}".encode())
                if peer.recv(2) == b"go":
                    return
        if time.monotonic() > deadline:
            raise ProcessError(
                f"process {me} of {processes} found no complete group at {_written(*address)}"
                f" within {timeout} s: is process 0 running there, and are all others?"
            )
        time.sleep(0.2)


def _wait_for_all(family, address, processes, timeout):
    try:
        server = socket.create_server(address, family=family)
    except OSError as e:
        fix = {
            errno.EADDRINUSE: "another program listens there: choose another port in"
            " mesh.coordinator, the same for all processes",
            errno.EADDRNOTAVAIL: "it is no address of this machine: name one of process 0's, or set"
            " JAX_COORDINATOR_BIND_ADDRESS=ADDRESS:PORT for process 0",
        }.get(e.errno or 0, "choose another host or port in mesh.coordinator")
        raise ProcessError(
            f"mesh.coordinator: {_written(*address)} can't be opened: {e.strerror or e}; {fix}"
        ) from None
    fix = (
        ". Start every process with the same mesh.coordinator and mesh.processes, each with its own"
        " mesh.process_id (0 is the coordinator)."
    )
    for peer in watch.accept(server, "", processes, timeout, fix).values():
        peer.sendall(b"go")
        peer.close()
