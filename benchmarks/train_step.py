"""Training steps of sftjax against each other, in one interleaved run: ratios, not absolute times.

    python benchmarks/train_step.py [--shape=S] [--rounds=3] [--out=results.json]

Each variant differs from the first in what its name says. Shape S: vocabulary 32000, width 288,
6 layers, 6 heads of 48, feed-forward 768, 8 rows of 256. M: vocabulary 49152, width 576, 30
layers, 9 query and 3 key/value heads of 64, feed-forward 1536, 2 rows of 512. Half of the tokens
are trained.
"""

import argparse
import functools
import json
import platform
import statistics
import time

import jax
import numpy as np
import optax

import sftjax
from sftjax import params as params_lib
from sftjax.models.decoder import Config

SHAPES = {
    "S": (
        Config(vocab=32000, width=288, layers=6, heads=6, kv_heads=6, head_dim=48, mlp=768,
               tied=True), 8, 256,
    ),
    "M": (
        Config(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
               tied=True), 2, 512,
    ),
}  # fmt: skip

# name -> (changes of the model, share of tokens trained)
VARIANTS = {
    "default": ({}, 0.5),
    "every token trained": ({}, 1.0),
    "whole score matrix": ({"attention": "xla"}, 0.5),
    "layers unrolled": ({"scan": False}, 0.5),
    "full remat": ({"remat": "full"}, 0.5),
}


def make_batch(config, rows, length, share):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab, (rows, length + 1)).astype(np.int32)
    trained = np.arange(length) >= (1 - share) * length  # the answer ends each row
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.tile(trained.astype(np.float32), (rows, 1)),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments=np.ones((rows, length), np.int32),
    )


def prepare(shape, changes, share):
    """A function that takes one step and returns its seconds; compiled and warm."""
    config, rows, length = SHAPES[shape]
    model = sftjax.Model(config).replace(**changes)
    tx = optax.adamw(1e-4)
    params = params_lib.init(model.abstract, jax.random.key(0))
    box = [sftjax.TrainState.create(params=params, tx=tx)]
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0)
    batch = jax.device_put(make_batch(config, rows, length, share))

    def one():
        began = time.perf_counter()
        box[0], metrics = step(box[0], batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    one(), one()
    return one


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="S", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    _, rows, length = SHAPES[args.shape]
    runs = {name: prepare(args.shape, *variant) for name, variant in VARIANTS.items()}
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, one in runs.items():
            seconds[name].append(min(one() for _ in range(3)))
    base = seconds["default"]
    table = {}
    print(f"{'shape ' + args.shape:<22}{'tokens/s':>12}{'speed vs default':>20}")
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        table[name] = {
            "tokens_per_s": rows * length / statistics.median(times),
            "speed_vs_default": [min(ratios), statistics.median(ratios), max(ratios)],
        }
        low, middle, high = table[name]["speed_vs_default"]
        rate = table[name]["tokens_per_s"]
        print(f"{name:<22}{rate:>12,.0f}{middle:>10.2f} ({low:.2f}..{high:.2f})")
    if args.out:
        device = jax.devices()[0].device_kind
        facts = dict(
            command=f"benchmarks/train_step.py --shape={args.shape} --rounds={args.rounds}",
            device=device, machine=platform.machine(), jax=jax.__version__, results=table,
        )  # fmt: skip
        with open(args.out, "w") as f:
            json.dump(facts, f, indent=2)


if __name__ == "__main__":
    main()
