"""Eight forced CPU devices, quick compilation and a cache of it, and the fixtures directory."""

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# Before jax is imported anywhere: these are read once, at its start. Subprocesses inherit them.
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    _flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in _flags:
    # Most of what is compiled here runs once: LLVM's optimisations cost more than they bring.
    _flags += " --xla_backend_optimization_level=1"
if "xla_cpu_collective_call_terminate" not in _flags:
    # A machine with other work may start one of the eight a minute after the first.
    _flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
if "xla_cpu_enable_concurrency_optimized_scheduler" not in _flags:
    # As a run does itself: see RACES in sftjax/training/xla_flags.py.
    _flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = _flags.strip()
os.environ.setdefault("NPROC", "128")  # see THREADS there
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def compiled_before() -> Path:
    """Programs that tests compiled, of all checkouts: about half of a suite's work, where cold.

    One folder a kind of processor, as machine code is for one. What is older than two weeks goes.
    """
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    kind = hashlib.sha256("".join(x for x in lines if x.startswith("flags")).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "sftjax-tests" / kind[:12]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        for path in cache.glob("*"):
            with contextlib.suppress(OSError):  # another suite was first, or may and we may not
                if path.stat().st_mtime < time.time() - 14 * 24 * 3600:
                    path.unlink()
    return cache


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_before()))
os.environ.setdefault("SFTJAX_CACHE", str(REPO / ".cache" / "sftjax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As where a shell runs the tests in its background: what they start would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The directory of models and data that tests read: `def test_x(fixtures): fixtures / "gsm8k"`.

    $SFTJAX_FIXTURES, or ../shared/fixtures beside the repository; skipped where that is absent.
    """
    path = Path(os.environ.get("SFTJAX_FIXTURES") or REPO.parent / "shared" / "fixtures")
    if path.is_dir():
        return path
    pytest.skip(f"no fixtures directory at {path}; set SFTJAX_FIXTURES to where it lies")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """SFTJAX_NO_SKIPS=1 makes a skip a failure: .ci/run's groups must have run what they name."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("SFTJAX_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which SFTJAX_NO_SKIPS=1 forbids: {report.longrepr}"
    return report
