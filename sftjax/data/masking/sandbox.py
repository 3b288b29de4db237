"""Render chat templates in a process of their own: they come with a model, from anybody.

transformers' sandbox keeps a template from objects and attributes that are not its business. It
does not keep it from running for ever, nor from filling the memory, and no thread or signal ends
a single long operation of the interpreter. A process with limits can be ended by the kernel.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from sftjax.errors import DataError

SECONDS = 10  # of processor time for one conversation
MEMORY = 4 << 30  # bytes, of the process
CHARACTERS = 1 << 26  # of one rendered conversation
WORKER = Path(__file__).with_name("sandbox_worker.py")

_lock = Lock()
_workers: dict[int, tuple] = {}  # process id -> (worker, progress): a fork needs one of its own


def render(
    template: str, variables: dict[str, Any], chats: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each chat as {"text"} (and "blocks"), or as {"error"} where the template failed.

    variables: what the template sees beside messages, tools and options (special tokens).
    chats: dict(messages, tools, options, blocks, where); blocks: return the spans of generation
      tags; where: file and row, for errors.

    Raises: DataError if the template had to be stopped.
    """
    if not chats:
        return []
    request = dict(template=template, variables=variables, chats=chats)
    with _lock:
        worker, progress = _running_worker()
        try:
            worker.stdin.write(json.dumps(request, default=_placeholder).encode() + b"\n")
            worker.stdin.flush()
            results = [json.loads(worker.stdout.readline() or "null") for _ in chats]
        except BrokenPipeError:  # it ended before it had read all
            results = [None]
        except BaseException:  # interrupted: what is in the pipe would answer the next request
            _stop()
            raise
        if None in results:
            code, at = worker.wait(), int.from_bytes(os.pread(progress.fileno(), 8, 0))
            limits = f"{SECONDS} s of processor time or {MEMORY >> 30} GiB of memory"
            if code >= 0:
                raise RuntimeError(f"{WORKER.name} ended with code {code}; its message is above")
            raise DataError(
                f"the chat template was stopped: it took more than {limits} (signal {-code})",
                "take another with data.template=FILE",
                where=chats[at]["where"],
                kind="template_stopped",
            )
    return results


def _running_worker():
    worker, progress = _workers.get(os.getpid(), (None, None))
    if worker is None or worker.poll() is not None:
        progress = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as the worker is)
        progress.write(bytes(8))
        progress.flush()
        arguments = [progress.fileno(), SECONDS, MEMORY, CHARACTERS]
        worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            pass_fds=[progress.fileno()],
            start_new_session=True,  # Ctrl-C is for us; it ends when our end of the pipe closes
        )
        _workers[os.getpid()] = worker, progress
    return worker, progress


def _stop():
    worker, _ = _workers.pop(os.getpid(), (None, None))
    if worker:
        worker.kill()
        worker.wait()


atexit.register(_stop)


def _placeholder(value):
    return f"<{type(value).__name__}>"  # as transformers shows a template what is not plain data
