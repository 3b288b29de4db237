"""The process in which chat templates are rendered, under limits that the kernel keeps.

Started by `sandbox.py`, which writes a request a line and reads a result a line. We import transformers' renderer and
nothing of sftjax: a start must be quick.
"""

import contextlib
import json
import resource
import signal
import sys
import time
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main(seconds: int, memory: int, characters: int) -> None:
    """Answer the requests on standard input until it ends. seconds: of processor time a chat; memory: bytes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the run; we end when it closes our input
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # macOS refuses; the limits of time and characters remain.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for chat in request["chats"]:
            # Counted in processor time, so a busy machine stops nobody. SIGXCPU ends us.
            last = int(time.process_time()) + seconds + 1
            resource.setrlimit(resource.RLIMIT_CPU, (last, resource.RLIM_INFINITY))
            result = render(request["template"], request["variables"], chat, characters)
            sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
            sys.stdout.buffer.flush()  # should we end, the next chat is to blame


def render(template: str, variables: dict[str, Any], chat: dict[str, Any], characters: int) -> dict[str, Any]:
    """{"text", and "blocks" where they are asked for}, or {"error"}."""
    try:
        texts, blocks = render_jinja_template(  # type: ignore[str-unpack] # its type says str
            [chat["messages"]],
            tools=chat["tools"],
            chat_template=template,
            return_assistant_tokens_mask=chat["blocks"],
            **variables | chat["options"],
        )
        if len(texts[0]) > characters:
            return {"error": f"it wrote {len(texts[0]):,} characters, more than {characters:,}"}
        return {"text": texts[0]} | ({"blocks": blocks[0]} if chat["blocks"] else {})
    except MemoryError:
        return {"error": "it used more memory than a chat template is given"}
    except Exception as error:  # a template may fail in any way
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:]))
