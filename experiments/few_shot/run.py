"""Few examples: SST-2 with 8, 32, 128 and 512 of each label, in full and the last layers alone.

    python experiments/few_shot/run.py [runs/few_shot] [bodies] [seeds]

$SFTJAX_FIXTURES is the directory that holds sst2/ and the models. Trains every case that has no
result yet, and prints the table. Each case has as many steps as 512 of each label make in 3 epochs,
or 30 epochs where that is less; its examples are drawn by its seed.
"""

import csv
import importlib.util
import json
import os
import random
import statistics
import sys
from pathlib import Path

from sftjax.train import train

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
SIZES, MODES = (8, 32, 128, 512), ("full", "last")
CONFIG = Path(__file__).with_name("config.py")


def draw(out, size, seed):
    """The file of `size` sentences of each label."""
    with open(FIXTURES / "sst2" / "train.tsv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    rng, picked = random.Random(f"{size} {seed}"), []
    for label in "01":
        own = [r for r in rows if r["label"] == label and len(r["sentence"].split()) >= 5]
        picked += rng.sample(own, size)
    rng.shuffle(picked)
    path = out / f"{size}_{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in picked))
    return path


def accuracy(out, body, size, mode, seed):
    workdir = out / f"{body}_{size}_{mode}_{seed}"
    if not (workdir / "result.json").exists():
        spec = importlib.util.spec_from_file_location("few_shot_config", CONFIG)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(f"{body},{mode}", str(draw(out / "data", size, seed)))
        config.seed = seed
        config.train.duration = f"{min(30, 3 * 512 // size)} epochs"
        train(config, workdir)
    result = json.loads((workdir / "result.json").read_text())
    return result["after"]["losses"]["dev/accuracy"]


def main(out="runs/few_shot", bodies="minilm-l6,babyllama105-hf", seeds="3"):
    out = Path(out)
    print(
        "| body | trained |",
        " | ".join(f"{n} of each" for n in SIZES),
        "|\n|---|---|---|---|---|---|",
    )
    for body in bodies.split(","):
        for mode in MODES:
            cells = []
            for size in SIZES:
                found = [100 * accuracy(out, body, size, mode, s) for s in range(int(seeds))]
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                cells.append(f"{statistics.mean(found):.1f} ± {spread:.1f}")
            print(f"| {body} | {mode} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
