"""Render chat templates in a process of their own: they come with a model, from anybody.

transformers' sandbox keeps a template from objects and attributes that are not its business. It does not keep it from
running for ever, nor from filling the memory, and no thread or signal ends a single long operation of the interpreter.
A process with limits can be ended by the kernel.
"""

import atexit
import json
import os
import subprocess
import sys
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
_workers: dict[int, subprocess.Popen] = {}  # by process id: a fork needs one of its own


def render(template: str, variables: dict[str, Any], chats: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each chat as {"text"} (and "blocks"), or as {"error"} where the template failed.

    variables: what the template sees beside messages, tools and options (special tokens).
    chats: dict(messages, tools, options, blocks, where); blocks: return the spans of generation tags; where: file and
      row, for errors.
    Raises: DataError if the template had to be stopped.
    """
    if not chats:
        return []
    request = dict(template=template, variables=variables, chats=chats)
    with _lock:
        worker: Any = _running_worker()  # with pipes, which its type does not say
        try:
            # What is not plain data, transformers shows to a template by its type.
            text = json.dumps(request, default=lambda x: f"<{type(x).__name__}>")
            worker.stdin.write(text.encode() + b"\n")
            worker.stdin.flush()
            results = [json.loads(worker.stdout.readline() or "null") for _ in chats]
        except BrokenPipeError:  # it ended before it had read all
            results = [None]
        except BaseException:  # interrupted: what is in the pipe would answer the next request
            _stop()
            raise
        if None in results:
            code = worker.wait()
            limits = f"{SECONDS} s of processor time or {MEMORY >> 30} GiB of memory"
            if code >= 0:
                raise RuntimeError(f"{WORKER.name} ended with code {code}; its message is above")
            raise DataError(
                f"the chat template was stopped: it took more than {limits} (signal {-code})",
                "take another with data.template=FILE",
                where=chats[results.index(None)]["where"],
                kind="template_stopped",
            )
    return results


def _running_worker():
    worker = _workers.get(os.getpid())
    if worker is None or worker.poll() is not None:
        limits = map(str, (SECONDS, MEMORY, CHARACTERS))
        worker = _workers[os.getpid()] = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            start_new_session=True,  # Ctrl-C is for us; it ends when our end of the pipe closes
        )
    return worker


def _stop():
    if worker := _workers.pop(os.getpid(), None):
        worker.kill()
        worker.wait()


atexit.register(_stop)
