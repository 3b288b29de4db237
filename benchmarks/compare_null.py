"""How often does `sftjax compare` call a model better where the two are equally good?

    python benchmarks/compare_null.py [--simulations=200] [--out=FILE]

Each simulation draws two results of models that are equally good on the same rows: answers that are
right with a chance that differs from row to row, and losses with a shared part. It counts how often
any metric is called better, which should be at most 5% of the time; and, to see that the comparison
finds what is there, how often a model with up to 5 points more accuracy (4.5 in the mean) is called
better by its accuracy, and by its loss, which follows the chance itself and tells much sooner.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from sftjax.reports.compare import Measured, differences


def side(rng: np.random.Generator, hard: np.ndarray, gain: float = 0.0) -> Measured:
    """A model's rows: right with the chance of the row, and a loss that follows it."""
    chance = np.clip(1 - hard + gain, 0, 1)
    right = (rng.random(len(hard)) < chance).astype(float)
    loss = -np.log(np.maximum(chance, 0.02)) * rng.lognormal(0, 0.5, len(hard))
    rows = {"record": list(range(len(hard))), "accuracy": right.tolist(), "loss": loss.tolist()}
    return Measured("", {}, {}, {"set": rows})


def main() -> None:
    """Print the shares, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    rng, found = np.random.default_rng(args.seed), {}
    for n in (50, 436, 2000):
        called = {"equal": 0, "better by accuracy": 0, "better by loss": 0}
        for _ in range(args.simulations):
            hard = rng.beta(1, 4, n)
            a = side(rng, hard)
            called["equal"] += any(d.better for d in differences(a, side(rng, hard)))
            more = differences(a, side(rng, hard, 0.05))
            for d in more:
                called[f"better by {d.metric.removeprefix('set/')}"] += d.better == "b"
        found[n] = {k: v / args.simulations for k, v in called.items()}
        print(f"{n:>5} rows: {json.dumps(found[n])}", flush=True)
    if args.out:
        text = {"command": sys.argv, "simulations": args.simulations, "called better": found}
        Path(args.out).write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
