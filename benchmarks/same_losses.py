"""Record the loss of every step of three configs, to show that a change of the code changed none.

    python benchmarks/same_losses.py before.json            # in the checkout before the change
    python benchmarks/same_losses.py after.json             # in the one after it
    python benchmarks/same_losses.py --compare before.json after.json

The losses are written as the text of their float32 values, so equal text is equal bits. They depend
on the processor and on the version of JAX: record both files on one machine.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# config -> (steps recorded, options). A run is stopped after so many steps, so that its schedule
# is the config's own.
RUNS = {
    "configs/quickstart.py": (100, ["--config.data.test=", "--config.data.validation="]),
    "experiments/gsm8k/config.py": (30, []),
    "configs/curriculum.py": (800, ["--config.data.test=", "--config.data.validation="]),
}


def losses(config: str, steps: int, options: list[str]) -> list[str]:
    """The first `steps` losses of a run of `config`."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "sftjax.train", f"--config={config}", *options]
        command += [f"--workdir={workdir}", "--config.train.log_every=1 steps"]
        command += ["--config.train.checkpoint_every=0 steps", "--config.train.tensorboard=False"]
        with open(Path(workdir) / "log", "w") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while run.poll() is None and len(_read(workdir)) < steps:
                    time.sleep(0.5)
            finally:
                run.kill()
                run.wait()
        found = _read(workdir)
        if len(found) < steps:
            text = (Path(workdir) / "log").read_text()
            raise SystemExit(f"{config} ended after {len(found)} of {steps} steps:\n{text[-2000:]}")
    return found[:steps]


def _read(workdir) -> list[str]:
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return [repr(v["loss"]) for v in values if "loss" in v]


def compare(before: dict, after: dict) -> bool:
    """Print where two records differ; True when they are the same."""
    same = True
    for config in before:
        pairs = list(zip(before[config], after[config], strict=True))
        wrong = [(i, a, b) for i, (a, b) in enumerate(pairs, 1) if a != b]
        same &= not wrong
        if wrong:
            worst = max(abs(float(a) - float(b)) / abs(float(a)) for _, a, b in wrong)
            i, a, b = wrong[0]
            text = f"{len(wrong)} differ, first step {i}: {a}, {b}; worst relative {worst:.1e}"
        print(f"{config}: {len(pairs)} steps, {text if wrong else 'all bit-equal'}")
    return same


def main(argv: list[str]) -> None:
    if argv[0] == "--compare":
        before, after = (json.loads(Path(file).read_text()) for file in argv[1:])
        raise SystemExit(not compare(before, after))
    data = ["sh", "experiments/curriculum/make_data.sh"]
    subprocess.run(data, check=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"})
    found = {config: losses(config, *how) for config, how in RUNS.items()}
    Path(argv[0]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
