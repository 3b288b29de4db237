"""The training step of two revisions of this repository, in turns: has it become slower?

    python benchmarks/revisions.py BEFORE [AFTER] [--shape=S] [--rounds=15] [--steps=4] [--out=FILE]

Each revision lies in a git worktree of its own and trains by its own step, as train_step.py asks
it (peers/peer_sftjax.py); AFTER is HEAD. A round is some steps of one and then of the other.
Printed are the median of the rounds' ratios, after to before, of time and of processor time, each
with the 95% interval of that median by 10,000 draws of the rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import drive
from train_step import PLATFORM, SHAPES

REPO = Path(__file__).resolve().parents[1]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPO, check=True, capture_output=True, text=True).stdout.strip()


def interval(ratios: list[float]) -> list[float]:
    """[low, median, high]: the 95% interval of the median."""
    rng, x = np.random.default_rng(0), np.array(ratios)
    medians = np.median(x[rng.integers(len(x), size=(10_000, len(x)))], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return [round(float(v), 4) for v in (low, np.median(x), high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--shape", default="S", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    config, rows, length = SHAPES[args.shape]
    found = {"revisions": [git("rev-parse", "--short", x) for x in (args.before, args.after)]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        drive.write_model(folder / "model", config)
        job = dict(
            model=str(folder / "model"), rows=rows, length=length, trained=0.5, dtype="float32",
            work="steps",
        )  # fmt: skip
        workers = []
        try:
            for i, revision in enumerate((args.before, args.after)):
                tree = folder / f"tree{i}"
                git("worktree", "add", "--detach", str(tree), revision)
                env = PLATFORM | {"PYTHONPATH": str(tree)}
                home = tree / "benchmarks" / "peers"
                workers.append(drive.Worker("sftjax", job, folder / f"{i}.log", env, home))
            facts = [drive.warm(worker) for worker in workers]
            found["first losses"] = [fact["losses"] for fact in facts]
            pairs = [[w.ask(args.steps) for w in workers] for _ in range(args.rounds)]
        finally:
            for worker in workers:
                worker.__exit__()
            for i in range(2):
                subprocess.run(["git", "worktree", "remove", "--force", str(folder / f"tree{i}")],
                               cwd=REPO, check=False, capture_output=True)  # fmt: skip
    seconds = [sum(b["seconds"]) / sum(a["seconds"]) for a, b in pairs]
    found |= {"time": interval(seconds), "processor time": interval(
        [b["cpu_s"] / a["cpu_s"] for a, b in pairs])}  # fmt: skip
    found |= drive.machine() | {"command": sys.argv[1:]}
    print(json.dumps(found, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
