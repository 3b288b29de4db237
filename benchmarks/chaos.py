"""Runs that are killed over and over, beside the same run undisturbed: is a bit lost?

    python benchmarks/chaos.py [--kills=100] [--case=NAME ...] [--seed=0] [--out=FILE]

Each case is a small training run: packing, a mixture, a stream, micro-batches, a classification,
a task of the user's own. It runs once to its end; then again and again in another workdir, ended
by SIGKILL at a moment drawn at random over the run's length, every other one when the next
checkpoint begins to be written after it, until one gets to its end. What it leaves then (the loss
and gradient norm of every step, what was measured, the bytes of the export) must be what the
undisturbed run has left. Exit status 1 where it is not.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = REPO / "experiments" / "quickstart"
CASES = {
    "packing": {},
    "wrapped, micro-batches": {"data.packing": "wrapped", "train.micro_batches": 2},
    "mixture": {"data.train": ""},
    "stream": {"data.streaming": True},
    "classification": {"task": "classification"},
    "custom": {"task": f"{REPO / 'experiments' / 'custom_task' / 'task.py'}:Regression"},
}
LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)


def model(where: Path) -> Path:
    """A small random Llama's directory, with the quickstart's tokenizer."""
    where.mkdir()
    for file in (QUICKSTART / "base_model").iterdir():
        if file.suffix != ".safetensors":
            (where / file.name).write_bytes(file.read_bytes())
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | LLAMA))
    return where


def write(path: Path, rows: list[dict]) -> str:
    """The rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configured(case: str, folder: Path) -> Path:
    """The config file of a case: 24 steps, an evaluation and a checkpoint after every third."""
    lines = (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()
    rows, rng = list(map(json.loads, lines)), random.Random(0)
    changes = {
        "model.path": str(model(folder / "model")),
        "model.init": "random",
        "model.dtype": "float32",
        "data.max_length": 64,
        "data.train": write(folder / "train.jsonl", rows[:400]),
        "data.validation": write(folder / "validation.jsonl", rows[400:430]),
        "train.batch_size": 8,
        "train.duration": "24 steps",
        "train.log_every": "1 step",
        "train.checkpoint_every": "3 steps",
        "eval.every": "6 steps",
        "optim.lr": 3e-3,
    } | CASES[case]
    if case == "mixture":
        parts = {"first": rows[:250], "second": rows[250:400]}
        files = [write(folder / f"{name}.jsonl", part) for name, part in parts.items()]
        changes["data.sources"] = tuple(dict(path=f, weight=w) for f, w in zip(files, (2, 1), strict=True))
    if case == "classification":
        words = {"good": "fine glad warm", "bad": "dull sour cold"}
        changes["data.labels"] = tuple(words)
        for name, n in (("train", 400), ("validation", 40)):
            labels = [rng.choice(list(words)) for _ in range(n)]
            texts = [" ".join(rng.choices(words[x].split(), k=9)) for x in labels]
            rows = [dict(text=t, label=x) for t, x in zip(texts, labels, strict=True)]
            changes[f"data.{name}"] = write(folder / f"{name}.jsonl", rows)
    if case == "custom":
        del changes["model.path"]
        for name, n in (("train", 400), ("validation", 40)):
            features = [[rng.gauss(0, 1) for _ in range(10)] for _ in range(n)]
            rows = [dict(features=x, target=sum(x[:3])) for x in features]
            changes[f"data.{name}"] = write(folder / f"{name}.jsonl", rows)
    text = ["from sftjax import config", "", "def get_config():", "    c = config.get_default()"]
    text += [f"    c.{key} = {value!r}" for key, value in changes.items()]
    path = folder / "config.py"
    path.write_text("\n".join([*text, "    return c", ""]))
    return path


def start(config: Path, workdir: Path) -> subprocess.Popen:
    """`sftjax train`, in a process group of its own; it writes to files beside the workdir."""
    command = [sys.executable, "-m", "sftjax.train", f"--config={config}", f"--workdir={workdir}"]
    with open(f"{workdir}.out", "a") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=REPO, start_new_session=True, env=os.environ)


def kill(process: subprocess.Popen) -> None:
    """End it at once, with all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def left(workdir: Path) -> dict:
    """What a finished run has left, as far as it has to be the same."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    files = sorted(p for p in (workdir / "export").glob("*") if p.is_file())
    own = lambda p: p.read_bytes().replace(workdir.name.encode(), b"")  # noqa: E731, of its card
    return {
        "steps": [(x["step"], x["loss"], x["grad_norm"]) for x in lines if "loss" in x],
        "measured": [x for x in lines if "loss" not in x],
        "result": json.loads((workdir / "result.json").read_text())["after"],
        "export": {p.name: hashlib.sha256(own(p)).hexdigest() for p in files},
    }


def phase(workdir: Path) -> str:
    """What a run was at when it was killed, by its last words and by what lies in its workdir."""
    if (workdir / "export").exists() and not (workdir / "result.json").exists():
        return "end"
    checkpoints = workdir / "checkpoints"
    if any(not p.name.isdecimal() and p.is_dir() for p in checkpoints.glob("*")):
        return "save"
    if list(workdir.glob("cache/tokens/.building-*")):
        return "tokenising"
    output = Path(f"{workdir}.out").read_text().rstrip().rpartition("\n")[2]
    if output.startswith("step "):
        return "step"
    return "start" if not output else "before the first step"


def wait(process: subprocess.Popen, workdir: Path, seconds: float, at_save: bool) -> bool:
    """Wait for the moment of a kill; False where the run was through before.

    at_save: the moment is when something begins to be written among the checkpoints, after
    `seconds`, and a random part of a tenth of a second more.
    """
    began, known = time.monotonic(), None
    while process.poll() is None:
        late = time.monotonic() - began > seconds
        if late and not at_save:
            return True
        there = {p.name for p in (workdir / "checkpoints").glob("*")}
        if late and at_save and known is not None and there - known:
            time.sleep(random.random() / 10)
            return process.poll() is None
        known = there
        time.sleep(0.002)
    return False


def main() -> None:
    """Print a line for each case, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    random.seed(args.seed)
    names, found, lost = args.case or list(CASES), {}, 0
    for i, case in enumerate(names):
        share = args.kills // len(names) + (i < args.kills % len(names))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = configured(case, folder)
            began = time.monotonic()
            if start(config, folder / "whole").wait():
                sys.exit(f"{case}: {Path(f'{folder}/whole.out').read_text()[-2000:]}")
            length, expected = time.monotonic() - began, left(folder / "whole")
            phases, runs = Counter[str](), 0
            while share:
                workdir, runs = folder / f"killed{runs}", runs + 1
                process, at_save = start(config, workdir), False
                while share and wait(process, workdir, random.random() * length, at_save):
                    kill(process)
                    phases[phase(workdir)] += 1
                    share, at_save = share - 1, not at_save
                    process = start(config, workdir)
                if status := process.wait():
                    said = Path(f"{workdir}.out").read_text()[-2000:]
                    sys.exit(f"{case}: exit status {status}\n{said}")
                differs = [k for k, v in left(workdir).items() if v != expected[k]]
                lost += bool(differs)
                if differs:
                    print(f"{case}: other {', '.join(differs)} in {workdir}", flush=True)
            found[case] = {"kills": sum(phases.values()), "runs": runs, "in": dict(phases)}
            print(f"{case:<24}{json.dumps(found[case])}", flush=True)
    total = sum(x["kills"] for x in found.values())
    print(f"{total} kills, {lost} runs that differ")
    if args.out:
        text = {"command": sys.argv, "kills": total, "runs that differ": lost, "cases": found}
        Path(args.out).write_text(json.dumps(text, indent=1) + "\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
