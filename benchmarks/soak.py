"""A long run of small steps: do memory, open files, threads or compilations grow with it?

    python benchmarks/soak.py [--steps=20000] [--legs=5] [--out=FILE]

A small model trains with an evaluation every 200 steps and a checkpoint every 100, in processes
that are asked to stop (SIGTERM) after each of `legs` equal parts and started again, as after a
preemption. Twice a second each process writes down its resident memory, its open files, its
threads, and how many programs it has compiled. Of each part this prints them after its first
fifth and at its end, with the slope of memory in bytes a step between (least squares).

Exit status 1 where files, threads or compilations have grown in any part, or where memory grows
by more than 500 bytes a step in the mean of the parts after the first: 8 MB over 16,000 steps.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from chaos import REPO, configured

LIMIT = 500.0  # bytes a step
SLACK = {"files": 2, "threads": 2, "compiled": 0}  # a save under way has one or two
NAMES = ("step", "memory", "files", "threads", "compiled")


def inner(config: str, workdir: str, samples: str) -> None:
    """In the process that trains: write samples, a line each, until the run ends."""
    import jax

    from sftjax import exits, train

    compiled = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def sample() -> None:
        page, log = os.sysconf("SC_PAGE_SIZE"), Path(workdir) / "metrics.jsonl"
        with open(samples, "w") as file:
            while True:
                time.sleep(0.5)
                memory = int(Path("/proc/self/statm").read_text().split()[1]) * page
                files, threads = (len(os.listdir(f"/proc/self/{x}")) for x in ("fd", "task"))
                file.write(f"{last(log)} {memory} {files} {threads} {len(compiled)}\n")
                file.flush()

    jax.monitoring.register_event_duration_secs_listener(listen)
    threading.Thread(target=sample, daemon=True).start()
    sys.argv = ["sftjax train", f"--config={config}", f"--workdir={workdir}"]
    exits.run(train.main)


def last(log: Path) -> int:
    """The step of the last whole line of a log; 0 where there is none."""
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - 4096, 0))
        lines = file.read().decode().split("\n")[:-1]
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


def measured(path: Path) -> dict:
    """What the samples of a part say, from its first fifth of steps to before its last ones.

    Of files and threads, which come and go with each save, the medians of two fifths.
    """
    rows = [list(map(int, line.split())) for line in path.read_text().splitlines()]
    last = max(row[0] for row in rows)
    rows = [row for row in rows if 0 < row[0] < last - 20]  # after these it exports
    table = np.array(rows[len(rows) // 5 :])
    steps, memory, fifth = table[:, 0], table[:, 1], len(table) // 5
    found = {"steps": [int(steps[0]), int(steps[-1])], "samples": len(table)}
    found["bytes a step"] = round(float(np.polyfit(steps, memory, 1)[0]), 1)
    for i, name in enumerate(NAMES[1:], 1):
        ends = [np.median(part[:, i]) for part in (table[:fifth], table[-fifth:])]
        found[name] = [int(x) for x in ends]
    return found


def leg(config: Path, folder: Path, stop_after: int | None) -> tuple[Path, int]:
    """Train until that step, or to the end; returns the samples and the exit status."""
    samples = folder / f"samples{stop_after}"
    command = [sys.executable, __file__, "--inner", config, folder / "run", samples]
    with open(folder / "out", "a") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, cwd=REPO)
    while process.poll() is None:
        time.sleep(0.2)
        if stop_after and last(folder / "run" / "metrics.jsonl") >= stop_after:
            process.send_signal(signal.SIGTERM)
            stop_after = None
    return samples, process.returncode


def main() -> None:
    """Print a line for each part, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--legs", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    parts = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured("packing", folder)
        more = {
            "train.duration": f"{args.steps} steps",
            "train.log_every": "20 steps",
            "train.checkpoint_every": "100 steps",
            "eval.every": "200 steps",
        }
        lines = [f"    c.{key} = {value!r}" for key, value in more.items()]
        text = config.read_text().replace("    return c", "\n".join([*lines, "    return c"]))
        config.write_text(text)
        for n in range(1, args.legs + 1):
            stop_after = args.steps * n // args.legs if n < args.legs else None
            samples, status = leg(config, folder, stop_after)
            if status != (75 if stop_after else 0):
                sys.exit(f"exit status {status}\n{(folder / 'out').read_text()[-2000:]}")
            parts.append(measured(samples))
            print(json.dumps(parts[-1]), flush=True)
    # Not of the first part, in which what compiling took is given back.
    slope = float(np.mean([part["bytes a step"] for part in parts[1:] or parts]))
    grown = [k for k, n in SLACK.items() for part in parts if part[k][1] > part[k][0] + n]
    print(f"{args.steps} steps: {slope:.0f} bytes a step; grown: {', '.join(grown) or 'nothing'}")
    if args.out:
        text = {"command": sys.argv, "steps": args.steps, "bytes a step": slope, "parts": parts}
        Path(args.out).write_text(json.dumps(text, indent=1) + "\n")
    sys.exit(bool(grown) or slope > LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inner"]:
        inner(*sys.argv[2:])
    else:
        main()
