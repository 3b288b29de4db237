"""JAX's coordination service in a process of its own; arguments: its function's, in JSON."""

import json
import sys
import time

from jaxlib import _jax

LINGER = 3.0  # seconds, in which the other processes learn whose loss it is


def main() -> None:
    """Serve until standard input says "stop", or ends."""
    arguments, options = json.loads(sys.argv[1])
    service = _jax.get_distributed_runtime_service(*arguments, **options)
    print("up", flush=True)
    if sys.stdin.readline() == "stop\n":
        service.shutdown()
    else:
        time.sleep(LINGER)


main()
