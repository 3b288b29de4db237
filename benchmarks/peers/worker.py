"""The side of the trained program: steps that are taken when the driver (drive.py) asks for them.

A worker is `python peer_NAME.py JOB` in an environment of its own; JOB is a JSON object:
  model: a Hugging Face directory (a Llama with tied embeddings, fp32 safetensors)
  rows, length: of a batch; in the work "lengths" a row is as long as its longest example, or packed
  trained: share of each example's tokens that are trained, the last ones
  dtype: of the compute; weights and optimizer state are float32 always
  work: steps (the same batch over and over) | lengths (examples of many lengths) | matmul
Everything is trained, by AdamW with the settings below. Needs numpy and the standard library only.
"""

import contextlib
import json
import os
import resource
import sys
import time
from importlib import metadata

import numpy as np

PACKAGES = ("sftjax", "jax", "torch", "transformers", "trl")
PACKAGES += ("google-tunix", "maxtext", "easydel", "levanter")
ADAMW = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
LEARNING_RATE = 1e-4
EXAMPLES = 512  # of the work "lengths": log-normal, 120 tokens on average


def job() -> dict:
    return json.loads(sys.argv[1])


def hf_config(job) -> dict:
    with open(os.path.join(job["model"], "config.json")) as file:
        return json.load(file)


def examples(job) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, is the token trained) of each example; the same in every worker."""
    rng = np.random.default_rng(0)
    lengths = [job["length"]] * job["rows"]
    if job["work"] == "lengths":
        spread = 0.8
        lengths = rng.lognormal(np.log(120) - spread**2 / 2, spread, EXAMPLES)
        lengths = np.clip(lengths.astype(int), 16, job["length"]).tolist()
    vocab = hf_config(job)["vocab_size"]
    return [
        (
            rng.integers(1, vocab, n).astype(np.int32),
            np.arange(n) >= round((1 - job["trained"]) * n),
        )
        for n in lengths
    ]


def batch(job) -> tuple[np.ndarray, np.ndarray]:
    """The work "steps" as arrays: tokens int32 and trained bool, both [rows, length]."""
    tokens, trained = zip(*examples(job), strict=True)
    return np.stack(tokens), np.stack(trained)


class Pace:
    """Between two steps: waits for the driver's word, which is a number of steps.

    facts: told to the driver at the start; of the work "lengths", the number of steps in an epoch.
    """

    def __init__(self, **facts):
        # What a library prints must not mix with the answers.
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.idle = 0
        self._wait(facts | dict(versions=_versions()))

    def step(self, loss, tokens):
        """After each step: its loss, and the number of tokens in it that are no padding."""
        self.losses.append(float(loss))  # waits for the step, where it is still on its way
        self.seconds.append(time.perf_counter() - self.began)
        self.tokens.append(int(tokens))
        self.steps -= 1
        if self.steps:
            self.began = time.perf_counter()
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer = dict(seconds=self.seconds, losses=self.losses, tokens=self.tokens, peak_mib=peak)
        answer |= dict(cpu_s=time.process_time() - self.cpu, idle_cpu_s=self.idle)
        self._wait(answer)

    def _wait(self, answer):
        self.answers.write(json.dumps(answer) + "\n")
        before = time.process_time()
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the driver has closed the pipe: nothing to be saved
        self.cpu = time.process_time()
        self.idle = self.cpu - before
        self.steps, self.seconds, self.losses, self.tokens = int(line), [], [], []
        self.began = time.perf_counter()


def _versions():
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def run(step, tokens):
    """Serve a program that is a function: step() takes a step and returns its loss."""
    pace = Pace()
    while True:
        pace.step(step(), tokens)
