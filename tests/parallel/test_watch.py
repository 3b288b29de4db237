"""What a process says of another that is lost, has failed, or is slow; without processes."""

import logging
import socket
import threading
import time

import pytest

from sftjax.errors import ConfigError, MeshError, ProcessError
from sftjax.parallel import processes, watch
from sftjax.parallel.watch import Watch, slow_ones


class Ended(BaseException):
    pass


@pytest.fixture
def group(monkeypatch):
    """make(me, n): (the Watch of process `me` of n, the others' ends, the event of its end)."""
    monkeypatch.setattr(watch, "GRACE", 0.2)
    monkeypatch.setattr(watch, "NAMED", 0.2)
    monkeypatch.setattr(watch.atexit, "register", lambda fn: None)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    ended = threading.Event()
    codes, open_, all_ = [], [], []

    def leave(code):
        codes.append(code)
        ended.set()
        raise Ended

    monkeypatch.setattr(watch.os, "_exit", leave)

    def make(me, n):
        others = [k for k in range(n) if k != me] if me == 0 else [0]
        pairs = {k: socket.socketpair() for k in others}
        made = Watch(me, [f"host{k}" for k in range(n)], {k: a for k, (a, _) in pairs.items()})
        open_.extend(end for pair in pairs.values() for end in pair)
        all_.append(made)
        return made, {k: b for k, (_, b) in pairs.items()}, ended

    yield make
    for made in all_:  # before os._exit is the real one again
        made._done.update(made.peers)
    for end in open_[1::2]:
        end.close()
    for made in all_:
        made._thread.join(5)
        assert not made._thread.is_alive()
    for end in open_:
        end.close()
    assert set(codes) <= {1}


def line(capsys):
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def test_a_process_that_is_gone_is_named_to_all(group, capsys):
    _, others, ended = group(0, 3)
    others[2].close()
    assert ended.wait(5)
    assert others[1].recv(1000).startswith(b"lost 2 is gone")
    said = "ProcessError: process 2 of 3, on host2, is gone: it was killed, or its machine was lost. "
    assert line(capsys).startswith(said + "Start all processes again with the same command")


def test_process_0_may_be_the_one(group, capsys):
    _, others, ended = group(2, 3)
    others[0].close()
    assert ended.wait(5) and line(capsys).startswith("ProcessError: process 0 of 3, on host0, is")


def test_the_others_hear_it_of_process_0(group, capsys):
    _, others, ended = group(1, 4)
    others[0].sendall(b"lost 3 is go")
    others[0].sendall(b"ne: x\n")
    assert ended.wait(5)
    assert line(capsys).startswith("ProcessError: process 3 of 4, on host3, is gone: x. Start all")


def test_a_process_that_is_done_may_go(group, capsys):
    made, others, ended = group(0, 2)
    others[1].sendall(b"done\n")
    others[1].close()
    with made.together():
        time.sleep(0.3)
    assert not ended.is_set() and not capsys.readouterr().err
    made._leave()


def test_a_process_that_failed_is_named_unless_we_fail_too(group, capsys):
    made, others, ended = group(0, 2)
    with pytest.raises(ConfigError), made.together():
        others[1].sendall(b"left\n")
        raise ConfigError("the same")
    made._leaving.set()
    assert not ended.wait(0.5) and not capsys.readouterr().err
    _, others, ended = group(0, 2)
    others[1].sendall(b"left\n")
    assert ended.wait(5)
    assert "process 1 of 2, on host1, has ended with an error, which its own" in line(capsys)


def test_an_error_that_a_loss_has_caused_is_not_shown(group, capsys):
    made, others, ended = group(0, 2)
    began = time.monotonic()
    with pytest.raises(RuntimeError), made.together():
        others[1].close()
        raise RuntimeError("Gloo: connection closed by peer")
    # Shown by Python only if the thread had not ended us long before.
    assert ended.is_set() and time.monotonic() - began >= 2 * watch.GRACE
    assert "is gone" in line(capsys)


@pytest.mark.parametrize("error, said", [(None, b"done\n"), (KeyboardInterrupt, b"done\n"), (ValueError, b"left\n")])
def test_how_we_leave_is_said(group, error, said):
    made, others, ended = group(1, 2)
    try:
        with made.together():
            if error:
                raise error
    except BaseException as e:
        assert type(e) is error
    made._leave()
    assert others[0].recv(100) == said
    if error is ValueError:  # JAX would wait for the others
        assert ended.wait(5)


def test_a_process_that_python_does_not_end_says_it_too(group, monkeypatch):
    made, others, _ = group(0, 3)
    monkeypatch.setattr(processes, "_watch", made)
    processes.done()
    assert [others[k].recv(100) for k in (1, 2)] == [b"done\n"] * 2


def test_a_slow_host_is_named_once(group, caplog):
    made, others, _ = group(0, 3)
    for step in range(6):
        slow = 0.9 if step > 0 else 0.01
        others[1].sendall(f"time 1.0 {slow} {slow}\n".encode())
        others[2].sendall(b"time 1.0 0.02 0.5\n")
        made.told(1.0, [0.01, 0.5])
        for _ in range(100):
            if not any(made._times.values()):
                break
            time.sleep(0.01)
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().startswith(
        "process 1 of 3, on host1, is slow: in 3 lines of the log its own part of a step took 0.9 s"
    )


def test_times_are_sent_to_process_0(group):
    made, others, _ = group(1, 2)
    made.told(2.0, [0.5, 1.0])
    assert others[0].recv(100) == b"time 2.0 0.5 1.0\n"


@pytest.mark.parametrize(
    "line, slow",
    [
        ([[1, 0.1], [1, 0.1]], set()),
        ([[1, 0.1], [1, 0.9]], {1}),
        ([[1, 0.0], [1, 0.05]], set()),  # many times, of nothing
        ([[1, 0.5], [1, 0.7], [1, 0.5]], set()),
        ([[1, 0.9], [1, 0.5], [1, 0.5], [1, 0.8]], {0, 3}),
        ([[1, 0.1, 0.9], [1, 0.9, 0.9]], {1}),  # of one way of counting
    ],
)
def test_slow_ones(line, slow):
    assert slow_ones(line) == slow


# --- the port of the coordinator ---


def free_port(host="127.0.0.1"):
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def test_a_port_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ProcessError, match=f"mesh.coordinator: {address} can't be opened: ") as e:
            processes.initialize(address, 2, 0, timeout=5)
    assert "another program listens there: choose another port in mesh.coordinator" in str(e.value)


def test_an_address_of_another_machine_is_said(monkeypatch):
    with pytest.raises(ProcessError, match=r"192.0.2.1:1234 can't be opened: .*name one of process"):
        processes.initialize("192.0.2.1:1234", 2, 0, timeout=5)
    port = free_port()
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ProcessError, match="process 1 of 2 has not come"):
        processes.initialize(f"192.0.2.1:{port}", 2, 0, timeout=1)


@pytest.mark.parametrize("address", ["no.such.host.invalid:12", "a" * 300 + ":12"])
def test_a_host_that_is_not_known_is_said(address):
    with pytest.raises(ProcessError, match="mesh.coordinator: the host .* is not known"):
        processes.initialize(address, 2, 0, timeout=1)


@pytest.mark.parametrize("address", ["localhost", ":12", "localhost:x", "localhost:70000"])
def test_what_is_no_address(address):
    with pytest.raises(MeshError, match="expected host:port"):
        processes.initialize(address, 2, 0, timeout=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_rendezvous_listens_where_the_address_says(host):
    port, failed = free_port(), []

    def first():
        try:
            processes.initialize(f"{host}:{port}", 2, 0, timeout=1)
        except ProcessError as e:
            failed.append(str(e))

    thread = threading.Thread(target=first)
    thread.start()
    while thread.is_alive():
        try:
            socket.create_connection((host, port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.01)
    with pytest.raises(OSError):  # another address of this machine
        socket.create_connection(("127.0.0.2", port), timeout=1)
    assert thread.is_alive()  # while it listened
    thread.join()
    assert "process 1 of 2 has not come" in failed[0]
