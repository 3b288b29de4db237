"""How a command ends: its message, its exit status, and threads that must not keep it."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from sftjax.errors import CheckpointError, Stopped, UserError
from sftjax.terminal import printable, show

LEAVE = 5.0  # seconds that threads have to end after the message that a checkpoint failed


def run(main_fn: Callable[[list[str]], object], argv: list[str] | None = None) -> None:
    """Run a command: a UserError is shown as one message, and the exit status is 1.

    A stop ends with status 75 (docs/runs.md), or 130; any other error keeps its traceback.
    """
    # transformers is here for tokenizers and templates; its advice to install torch is not wanted.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        main_fn(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        if isinstance(e, CheckpointError):
            threading.Thread(target=_leave, daemon=True).start()
        raise SystemExit(printable(f"{type(e).__name__}: {e}")) from e
    except Stopped as e:
        if str(e):  # of several processes, one says it
            show(f"Stopped: {e}", file=sys.stderr)
        atexit.register(_end_soon)
        raise SystemExit(Stopped.status) from None
    except KeyboardInterrupt:
        atexit.register(_end_soon)
        show("Stopped: by Ctrl-C", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _end_soon() -> None:
    """As Python ends, where libraries wait: one more signal ends it, and so do ten seconds."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    timer = threading.Timer(10, os._exit, [Stopped.status])
    timer.daemon = True
    timer.start()


def _leave():
    """End the process LEAVE seconds after its main thread, though another hangs in a lost disk."""
    threading.main_thread().join()
    time.sleep(LEAVE)
    sys.stdout.flush()
    os._exit(1)
