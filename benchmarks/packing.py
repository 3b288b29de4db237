"""Packing a million documents: seconds to plan, and how full the rows are.

    python benchmarks/packing.py [--documents=1000000] [--lengths=lengths.npy] [--out=packing.json]

Lengths are log-normal (mean about 250, 8 to the row's length), or those of a file: an .npy array,
or a folder of the token cache. One core; the plan needs lengths only.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from sftjax import setup
from sftjax.data.pack import STRATEGIES, plan


def read(path):
    path = Path(path)
    return np.diff(np.load(path / "offsets.npy")) if path.is_dir() else np.load(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--lengths", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    drawn = np.maximum(rng.lognormal(5.2, 0.8, args.documents), 8).astype(int)
    lengths = read(args.lengths) if args.lengths else drawn
    print(f"{len(lengths)} documents, {lengths.sum():,} tokens")
    print(f"{'row':>6}  {'strategy':<10}{'seconds':>9}{'rows':>10}{'full':>9}")
    for capacity in (1024, 2048, 4096, 8192):
        for name in STRATEGIES:
            began = time.perf_counter()
            packed = plan(lengths, capacity, name)
            seconds = time.perf_counter() - began
            full = float((packed.stop - packed.start).sum() / (len(packed) * capacity))
            rows.append(dict(row=capacity, strategy=name, seconds=seconds, full=full))
            print(f"{capacity:>6}  {name:<10}{seconds:>9.2f}{len(packed):>10}{full:>9.2%}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        value = {"environment": setup.environment(), "results": rows}
        Path(args.out).write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
