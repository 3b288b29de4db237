"""Processes that watch one another: the loss of one ends the others; a slow host is named."""

import atexit
import contextlib
import os
import selectors
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator

from sftjax.errors import ProcessError, UserError
from sftjax.terminal import show, warn

GRACE = 4.0  # seconds for an error of our own, after another process has left by one
NAMED = 2.0  # seconds to hear which process is lost, after an error of our own
JOIN = 60  # seconds for all to connect
SLOW, LINES = 1.5, 3  # times the median, in so many lines of the log one after the other
SHARE = 0.1  # of a step's time that the excess has to be


class Watch:
    """The connections of one process.

    peers: {process: its connection}; of process 0 all others, of another process 0 alone.
    hosts: the host of each process, by its id.
    """

    def __init__(self, me: int, hosts: list[str], peers: dict[int, socket.socket]) -> None:
        self.me, self.hosts, self.peers = me, hosts, peers
        self._text = {id: b"" for id in peers}  # received, and not yet a whole line
        self._done = set[int]()  # those that have come to their end
        self._state = "left"  # what we say as we leave: done, or left (by an error)
        self._leaving, self._lost, self._named = (threading.Event() for _ in range(3))
        self._times, self._slow = dict[int, list[list[float]]](), dict[int, int]()
        self._lock = threading.Lock()  # of the times
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()
        atexit.register(self._leave)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes do: an error that another's loss has caused is not shown."""
        try:
            yield
        except Exception as e:
            # A collective fails in the moment in which a process is lost; its name takes longer.
            self._named.wait(NAMED)
            if self._lost.is_set() or (self._named.is_set() and not isinstance(e, UserError)):
                time.sleep(2 * GRACE)  # the thread ends us before that
            raise
        except BaseException:  # a stop that was asked for
            self._state = "done"
            raise
        self._state = "done"

    def done(self) -> None:
        """Say that this process has come to its end, and that it is not lost."""
        self._state = "done"
        for other in self.peers:
            self._send(other, self._state)

    def told(self, seconds: float, own: list[float]) -> None:
        """Take this process's seconds a step of a log line. own: not spent waiting for others, by several counts."""
        if self.me:
            self._send(0, " ".join(["time", *map(str, [seconds, *own])]))
        else:
            self._take(0, [seconds, *own])

    # ---- the thread ----

    def _run(self):
        with selectors.DefaultSelector() as selector:
            for id, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, id)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._read(key.data, key.fileobj):
                        selector.unregister(key.fileobj)

    def _read(self, id, peer) -> bool:
        """Take what a process says; False once it is at its end."""
        try:
            text = peer.recv(1 << 16)
        except OSError:  # reset, or no answer to the system's own questions
            text = b""
        if not text and id not in self._done:
            self._lose(id, "is gone: it was killed, or its machine was lost")
        *lines, self._text[id] = (self._text[id] + text).split(b"\n")
        for line in lines:
            what, *rest = line.decode().split()
            if what == "done":
                self._done.add(id)
            elif what == "lost":
                self._lose(int(rest[0]), " ".join(rest[1:]))
            elif what == "left":
                self._lose(id, "has ended with an error, which its own output says", GRACE)
            elif what == "time":
                self._take(id, [float(x) for x in rest])
        return bool(text)

    def _lose(self, id, how, grace=0.0):
        """End this process, which can't go on without another."""
        if not grace:
            self._lost.set()
        self._named.set()
        for other in self.peers:
            if other != id:
                self._send(other, f"lost {id} {how}")
        if grace and self._leaving.wait(grace):
            return  # by an error of our own, which Python shows
        if not self._leaving.is_set() or self._state == "done":
            error = ProcessError(
                f"process {id} of {len(self.hosts)}, on {self.hosts[id]}, {how}. Start all"
                " processes again with the same command: the run goes on from its last checkpoint."
            )
            show(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)

    def _take(self, id, times):
        """Of process 0: one process's times. Say who is slow, once all have told theirs."""
        with self._lock:
            self._times.setdefault(id, []).append(times)
            if len(self._times) < len(self.hosts) or not all(self._times.values()):
                return
            line = [self._times[id].pop(0) for id in range(len(self.hosts))]
            self._slow = {id: self._slow.get(id, 0) + 1 for id in slow_ones(line)}
        for id in (id for id, lines in self._slow.items() if lines == LINES):
            took = f"{max(line[id][1:]):.3g} s of {line[id][0]:.3g} s"
            warn(
                f"process {id} of {len(self.hosts)}, on {self.hosts[id]}, is slow: in {LINES} lines"
                f" of the log its own part of a step took {took}, and the others waited for it. See"
                " whether its data, its processors or its disk are slower."
            )

    def _leave(self):
        """As Python ends: say how. The connection stays, and is watched, until we are gone."""
        self._leaving.set()
        for other in self.peers:
            self._send(other, self._state)
        if self._state == "left":  # JAX would wait for the others, which wait for us
            timer = threading.Timer(2 * GRACE, os._exit, [1])
            timer.daemon = True
            timer.start()

    def _send(self, id, text):
        with contextlib.suppress(OSError):  # gone; that is noticed by the thread
            self.peers[id].sendall(text.encode() + b"\n")


def slow_ones(line: list[list[float]]) -> set[int]:
    """The processes whose own part of a step is much longer; line: of each, as in Watch.told."""
    found = set[int]()
    for n in range(1, len(line[0])):
        for id, times in enumerate(line):
            others = statistics.median(told[n] for k, told in enumerate(line) if k != id)
            if times[n] > SLOW * others and times[n] - others > SHARE * times[0]:
                found.add(id)
    return found


# ---- how they connect ----------------------------------------------------------------------


def accept(
    server: socket.socket, word: str, processes: int, seconds: float = JOIN, fix: str = ""
) -> dict[int, socket.socket]:
    """Connections of all others, which say `word` and an id. ProcessError: one is late."""
    peers, deadline = dict[int, socket.socket](), time.monotonic() + seconds
    with server:
        while len(peers) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
                peer.settimeout(5)
                said = peer.recv(len(word) + 8, socket.MSG_WAITALL).decode()
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # somebody else's, who says nothing
                missing = ", ".join(str(id) for id in range(1, processes) if id not in peers)
                raise ProcessError(f"after {seconds} s, process {missing} of {processes} has not come{fix}") from None
            except (OSError, UnicodeDecodeError):
                continue
            id = said[len(word) :]
            if said.startswith(word) and id.isdecimal() and 0 < int(id) < processes:
                peers[int(id)] = _kept(peer)
            else:
                peer.close()
    return peers


def connect(host: str, port: int, word: str, me: int) -> socket.socket:
    """The connection to process 0. Raises: ProcessError."""
    try:
        peer = socket.create_connection((host, port), timeout=JOIN)
        peer.sendall(f"{word}{me:08d}".encode())
    except OSError as e:
        raise ProcessError(
            f"process {me} can't connect to process 0 at {host}:{port}: {e.strerror or e}. All"
            " ports of process 0's machine have to be open to the others"
        ) from None
    return _kept(peer)


def _kept(peer: socket.socket) -> socket.socket:
    """Without a limit of time; the system asks after 10 s whether the other machine is there."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
