"""Attention backends, forward and backward, by what a row holds, in one interleaved run.

    python benchmarks/attention.py [--shape=S M long] [--rounds=5] [--out=results.json]

Compared: rows of one document each and rows packed with many short ones (log-normal lengths, mean
120, clipped to 16 and 512), for each backend that this platform has. Ratios are to `xla`, which
forms every score, on rows of one document. Seconds are of processor time on a CPU, which others'
load disturbs least, and of the clock elsewhere. Shapes: rows, length, query heads, key/value heads,
head width.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.ops.attention import BACKENDS, attention

SHAPES = {"S": (8, 256, 6, 6, 48), "M": (2, 512, 9, 3, 64), "long": (1, 2048, 9, 3, 64)}


def rows_of(kind, rows, length):
    """(segments, positions), int32 [rows, length]."""
    rng = np.random.default_rng(0)
    segments, positions = (np.zeros((rows, length), np.int32) for _ in range(2))
    for row in range(rows):
        at = segment = 0
        while at < length:
            n = int(np.clip(rng.lognormal(np.log(120) - 0.32, 0.8), 16, 512))
            n = min(length if kind == "one document" else n, length - at)
            segment += 1
            segments[row, at : at + n], positions[row, at : at + n] = segment, np.arange(n)
            at += n
    return segments, positions


def prepare(shape, kind, backend):
    """A function that runs forward and backward once and returns its seconds; compiled and warm."""
    rows, length, heads, kv_heads, width = SHAPES[shape]
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    *qkv, g = (jax.random.normal(key, (rows, length, n, width)) for key, n in zip(keys, sizes, strict=True))
    segments, positions = map(jnp.asarray, rows_of(kind, rows, length))

    @jax.jit
    def both(qkv, g, segments, positions):
        out, vjp = jax.vjp(lambda *a: attention(*a, segments=segments, positions=positions, backend=backend), *qkv)
        return out, vjp(g)

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def one():
        began = clock()
        jax.block_until_ready(both(qkv, g, segments, positions))
        return clock() - began

    one(), one()
    return one


def measure(shape, rounds):
    """{"kind, backend": {seconds, speed_vs_xla: [least, median, greatest]}}; prints it too."""
    names = [b for b, x in BACKENDS.items() if jax.default_backend() in x.platforms]
    kinds = ("one document", "many documents")
    runs = {f"{kind}, {name}": prepare(shape, kind, name) for kind in kinds for name in names}
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, one in runs.items():
            seconds[name].append(min(one() for _ in range(3)))
    base, table = seconds["one document, xla"], {}
    print(f"shape {shape}: {SHAPES[shape]}")
    for name, times in seconds.items():
        ratios = sorted(b / t for b, t in zip(base, times, strict=True))
        middle = statistics.median(ratios)
        table[name] = {
            "seconds": statistics.median(times),
            "speed_vs_xla": [ratios[0], middle, ratios[-1]],
        }
        milli = 1e3 * table[name]["seconds"]
        print(f"  {name:<28}{milli:9.1f} ms{middle:7.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})")
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    results = {shape: measure(shape, args.rounds) for shape in args.shape}
    if args.out:
        shapes = " ".join(args.shape)
        facts = dict(
            command=f"benchmarks/attention.py --shape {shapes} --rounds={args.rounds}",
            device=jax.devices()[0].device_kind, machine=platform.machine(),
            processor=_processor(), jax=jax.__version__, results=results,
        )  # fmt: skip
        with open(args.out, "w") as f:
            json.dump(facts, f, indent=2)


def _processor():
    """The name that Linux gives the processor, where there is one."""
    try:
        with open("/proc/cpuinfo") as f:
            return next((x.split(":")[1].strip() for x in f if x.startswith("model name")), "")
    except OSError:
        return platform.processor()


if __name__ == "__main__":
    main()
