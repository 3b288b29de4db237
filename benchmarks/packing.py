"""Packing a million documents and gsm8k: seconds to plan, and how full the rows are.

    python benchmarks/packing.py [--documents=1000000] [--lengths=lengths.npy] [--out=packing.json]

The million's lengths are log-normal (mean about 250, 8 to the row's length), or those of a file: an
.npy array, or a folder of the token cache. gsm8k's training rows, with a Qwen tokenizer and its
template, are those of $SFTJAX_FIXTURES (default ../shared/fixtures beside the repository); without
it they are left out. One core; the plan needs lengths only. Seconds are of the processor.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from sftjax.data.packing.pack import STRATEGIES, plan
from sftjax.tasks.causal_lm import CausalLM
from sftjax.training import workdir


def read(path):
    path = Path(path)
    return np.diff(np.load(path / "offsets.npy")) if path.is_dir() else np.load(path)


def gsm8k():
    """The lengths of its documents; None where the fixtures are not."""
    from transformers import AutoTokenizer

    from sftjax.data import build_store, open_source

    here = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    fixtures = Path(os.environ.get("SFTJAX_FIXTURES") or here)
    if not fixtures.is_dir():
        return None
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer-qwen")
    policy = dict(fields=dict(prompt="question", completion="answer"))
    source = open_source(fixtures / "gsm8k" / "train.jsonl")
    with tempfile.TemporaryDirectory() as cache:
        return build_store(source, CausalLM(tokenizer, policy), 0, "error", cache).lengths


def measure(lengths, name, capacity) -> dict:
    began, used = time.perf_counter(), time.process_time()
    packed = plan(lengths, capacity, name)
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    full = float((packed.stop - packed.start).sum() / (len(packed) * capacity))
    found = dict(row=capacity, strategy=name, seconds=seconds, processor_s=processor)
    return found | dict(rows=len(packed), full=full)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--lengths", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    drawn = np.random.default_rng(0).lognormal(5.2, 0.8, args.documents)
    sets = {"documents": read(args.lengths) if args.lengths else np.maximum(drawn, 8).astype(int)}
    sets |= {"gsm8k": found} if (found := gsm8k()) is not None else {}
    results = {}
    for name, lengths in sets.items():
        print(f"{name}: {len(lengths):,}, {lengths.sum():,} tokens")
        print(f"{'row':>6}  {'strategy':<10}{'seconds':>9}{'rows':>10}{'full':>9}")
        results[name] = []
        for capacity in (1024, 2048, 4096, 8192):
            for strategy in STRATEGIES:
                found = measure(lengths, strategy, capacity)
                results[name].append(found)
                print(
                    f"{capacity:>6}  {strategy:<10}{found['processor_s']:>9.2f}{found['rows']:>10}{found['full']:>9.2%}"
                )
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        value = {"environment": workdir.environment(), "results": results}
        Path(args.out).write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
