"""The loss from hidden states to gradients: memory by compiling, time by running; no model.

    python benchmarks/loss.py [--tokens=16384] [--vocab=128256] [--width=2048] [--rounds=5]
                              [--out=loss.json]

plain    logits of every position at once, softmax cross-entropy, gradients by autodiff.
chunked  every position, a chunk of 1024 at a time, recomputed in the backward pass: what most
         trainers do about the memory.
sftjax   ops.cross_entropy.linear_cross_entropy: trained positions only, gradients in one pass.

Memory: temporary bytes of the compiled value and gradients of hidden states and head, for the whole
size and for vocabularies from an eighth of it on; nothing is run. In bf16 sftjax adds up the head's
gradient in float32, a temporary as large as the head; in float32 that is the result itself.

Time: value and gradients at a size that a CPU runs in seconds (--run-tokens, --run-vocab,
--run-width), float32, for shares of trained tokens, interleaved; a ratio compares neighbours in
time. On a CPU, processor time: what else runs on the machine counts less.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.ops.cross_entropy import linear_cross_entropy
from sftjax.training import workdir

CHUNK = 1024
ROWS = 4


def position_losses(h, w, targets):
    """float32 cross-entropy of each position. h [..., D], w [V, D]."""
    logits = jnp.einsum("...d,vd->...v", h, w, preferred_element_type=jnp.float32)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - target


def plain(h, w, targets, weights):
    return jnp.sum(position_losses(h, w, targets) * weights)


def chunked(h, w, targets, weights):
    h, targets, weights = (x.reshape(-1, min(CHUNK, targets.size), *x.shape[2:]) for x in (h, targets, weights))

    @jax.checkpoint
    def body(total, chunk):
        h, targets, weights = chunk
        return total + plain(h, w, targets, weights), None

    return jax.lax.scan(body, jnp.float32(0), (h, targets, weights))[0]


def fused(h, w, targets, weights):
    return linear_cross_entropy(h, w, targets, weights)[0]


LOSSES = {"plain": plain, "chunked": chunked, "sftjax": fused}


def temporary_bytes(fn, tokens, vocab, width, dtype=jnp.bfloat16) -> int:
    """Of value and gradients, compiled for this device from shapes."""
    shape = (ROWS, tokens // ROWS)
    arguments = (
        jax.ShapeDtypeStruct((*shape, width), dtype),
        jax.ShapeDtypeStruct((vocab, width), dtype),
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    step = jax.jit(jax.value_and_grad(fn, (0, 1)))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def inputs(tokens, vocab, width, share, seed=0):
    """Random arguments; the answer, `share` of each row, ends it."""
    rng, S = np.random.default_rng(seed), tokens // ROWS
    trained = np.tile(np.arange(S) >= round((1 - share) * S), (ROWS, 1))
    return jax.device_put(
        (
            rng.normal(size=(ROWS, S, width)).astype(np.float32),
            rng.normal(size=(vocab, width)).astype(np.float32) / width**0.5,
            rng.integers(0, vocab, (ROWS, S)).astype(np.int32),
            trained.astype(np.float32),
        )
    )


def times(tokens, vocab, width, shares, rounds):
    """{(name, share): seconds of each round}, interleaved; and the largest difference of values."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    steps = {name: jax.jit(jax.value_and_grad(fn, (0, 1))) for name, fn in LOSSES.items()}
    data = {share: inputs(tokens, vocab, width, share) for share in shares}
    found, worst = {(name, share): [] for share in shares for name in LOSSES}, 0.0
    for share in shares:  # compiled and warm, and all the same loss
        values = [float(step(*data[share])[0]) for step in steps.values()]
        worst = max(worst, max(abs(v / values[0] - 1) for v in values))
    for _ in range(rounds):
        for (name, share), seconds in found.items():
            began = clock()
            jax.block_until_ready(steps[name](*data[share]))
            seconds.append(clock() - began)
    return found, worst


def memory_table(tokens, vocab, width, dtype):
    rows, name = [], jnp.dtype(dtype).name
    print(f"temporary MiB, {tokens:,} tokens, width {width}, {name}")
    print(f"{'vocabulary':>12}" + "".join(f"{name:>12}" for name in LOSSES) + f"{'plain/ours':>14}")
    for v in (vocab // 8, vocab // 4, vocab // 2, vocab):
        found = {k: temporary_bytes(fn, tokens, v, width, dtype) for k, fn in LOSSES.items()}
        rows.append(dict(tokens=tokens, vocab=v, width=width, dtype=name, temp_bytes=found))
        cells = "".join(f"{b / 2**20:>12,.0f}" for b in found.values())
        print(f"{v:>12,}{cells}{found['plain'] / found['sftjax']:>13.1f}x")
    return rows


def time_table(tokens, vocab, width, shares, rounds):
    found, worst = times(tokens, vocab, width, shares, rounds)
    rows = []
    print(f"\nseconds, {tokens:,} tokens x {vocab:,} x {width}, float32 (values agree to {worst:.0e})")
    print(f"{'trained':>12}" + "".join(f"{name:>12}" for name in LOSSES) + f"{'chunked/ours':>26}")
    for share in shares:
        middle = {name: statistics.median(found[name, share]) for name in LOSSES}
        pairs = zip(found["chunked", share], found["sftjax", share], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        speed = [ratios[0], statistics.median(ratios), ratios[-1]]
        rows.append(dict(trained=share, seconds=middle, speed_vs_chunked=speed))
        cells = "".join(f"{s:>12.3f}" for s in middle.values())
        print(f"{share:>12.0%}{cells}" + "{1:>11.2f} ({0:.2f}..{2:.2f})".format(*speed))
    return dict(tokens=tokens, vocab=vocab, width=width, rounds=rounds, shares=rows, agree=worst)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    number = functools.partial(parser.add_argument, type=int)
    number("--tokens", default=16384)
    number("--vocab", default=128256)
    number("--width", default=2048)
    number("--run-tokens", default=4096)
    number("--run-vocab", default=8192)
    number("--run-width", default=256)
    number("--rounds", default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    sizes, timing = (args.tokens, args.vocab, args.width), None
    memory = [row for dtype in (jnp.bfloat16, jnp.float32) for row in memory_table(*sizes, dtype)]
    if args.rounds:
        sizes = (args.run_tokens, args.run_vocab, args.run_width)
        timing = time_table(*sizes, (0.1, 0.25, 0.5, 1.0), args.rounds)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        value = dict(environment=workdir.environment(), memory=memory, time=timing)
        Path(args.out).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
