"""A training step of an encoder classifier beside torch and transformers, at SST-2's lengths.

    python benchmarks/encoders.py --model=DIR --data=train.tsv [--bodies=minilm,base] [--out=FILE]
    python benchmarks/encoders.py --model=DIR --data=train.tsv --variants [--bodies=minilm]
    python benchmarks/encoders.py --quick --model=DIR --data=train.tsv

Both sides take forward, loss, backward and AdamW (torch's fused one) of the same weights in
float32, on the same sentences, in one process of two threads (--threads), in turns: A B A B ... A
turn goes once through the sentences, in as many steps of about as many sentences each. torch
batches as its users do:

padded   batches in random order, every sentence padded to 128 tokens
sorted   batches of sentences alike in length (group_by_length), each padded to its longest

and sftjax as `train` does: rows that hold many sentences. Before that both sides must have the same
loss on the same batch, before and after a step, to 1e-4. Printed are sentences a second, and the
median of the turns' ratios, of time and of processor time, with the 95% interval of that median.

Bodies: `minilm`, the weights of --model; `base`, a BERT of 12 layers of 768, drawn at random, read
with the same tokenizer. Dropout is off on both sides, or with --dropout=0.1 that of hidden states
is on, on both. malloc is told to keep memory, for both: without it torch needs much longer. On a
machine with other work take --threads=1: torch's threads wait for each other, and spin meanwhile.

--variants compares sftjax with itself instead: what each setting of a config changes.
"""

# ruff: noqa: E402 (the process starts again before anything is imported)

import os
import sys

THREADS = int(next((x.split("=")[1] for x in sys.argv if x.startswith("--threads=")), 2))
KEEP = dict(  # as TRL's in train_step.py
    MALLOC_MMAP_THRESHOLD_="4294967296",
    MALLOC_TRIM_THRESHOLD_="17179869184",
    MALLOC_TOP_PAD_="268435456",
)


def settle() -> None:
    """Start again on two processors and with malloc's settings: both are read at the start."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    if any(os.environ.get(key) != value for key, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)


if __name__ == "__main__":
    settle()

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

import sftjax
from sftjax import hf, losses
from sftjax.data import open_source, pack
from sftjax.tasks.classification import Classification
from sftjax.training import workdir, xla_flags

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import drive
from revisions import interval

NAMES, FIXED, ALLOWED = ("negative", "positive"), 128, 1e-4
ADAMW = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
LEARNING_RATE = 1e-5
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
TOY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
# body -> (changes of the model's config.json, None: its weights; sentences of a turn, steps of it)
BODIES = {"minilm": (None, 384, 12), "base": (BASE, 96, 6), "toy": (TOY, 48, 3)}
# What a config can set that counts here: the first is measured beside torch.
SETTINGS = {
    "as measured": dict(),
    "attention blockwise": dict(attention="blockwise"),
    "scan": dict(scan=True),
    "remat dots": dict(remat="dots"),
    "rows of 64": dict(width=64),
    "rows of 256": dict(width=256),
    "the defaults": dict(attention="blockwise", scan=True, remat="dots"),
}
MEASURED = dict(attention="xla", scan=False, remat="none", width=FIXED)


# ---- the same sentences --------------------------------------------------------------------


def examples(model: str, data: str, n: int) -> tuple[Classification, list]:
    """(task, the arrays of n sentences drawn from a file)."""
    from transformers import AutoTokenizer

    task, source = Classification(AutoTokenizer.from_pretrained(model), NAMES), open_source(data)
    chosen = np.random.default_rng(0).choice(len(source), n, replace=False)
    found = task.examples([source[int(i)] for i in chosen], [f"row {i}" for i in chosen])
    return task, [one.arrays for one in found]


def packed(task, docs, width: int, steps: int) -> list[dict]:
    """So many batches of rows of `width` tokens that hold all sentences, each once."""
    rows = pack([len(doc[0]) for doc in docs], width, "bfd")
    np.random.default_rng(1).shuffle(rows)
    each, out = -(-len(rows) // steps), []
    for start in range(0, each * steps, each):
        fields = task.layout.spec(each, width)
        batch = {key: np.zeros(field.shape, field.dtype) for key, field in fields.items()}
        for r, row in enumerate(rows[start : start + each]):
            task.layout.fill({key: value[r] for key, value in batch.items()}, docs, row)
        out.append(batch)
    return out


def padded(docs, steps: int, width: int = 0, by_length: bool = False) -> list[dict]:
    """So many batches, in random order, as torch's arrays; width 0: each batch's longest."""
    rng, out = np.random.default_rng(2), []
    order = rng.permutation(len(docs))
    if by_length:
        order = order[np.argsort([-len(docs[i][0]) for i in order], kind="stable")]
    parts = np.array_split(order, steps)
    for part in [parts[i] for i in rng.permutation(steps)]:
        n = width or max(len(docs[i][0]) for i in part)
        batch = {"input_ids": np.zeros((len(part), n), np.int64)}
        batch["attention_mask"] = np.zeros_like(batch["input_ids"])
        for row, i in enumerate(part):
            tokens = docs[i][0]
            batch["input_ids"][row, : len(tokens)] = tokens
            batch["attention_mask"][row, : len(tokens)] = 1
        # A label stands where its weight does, at the first token.
        batch["labels"] = np.array([docs[i][2][docs[i][1] > 0][0] for i in part], np.int64)
        out.append(batch)
    return out


# ---- the two sides -------------------------------------------------------------------------


def write_body(folder: Path, model: str, changes: dict | None, dropout: float) -> None:
    """A directory with the weights of both sides, and a head of classes drawn by torch."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    own = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, num_labels=2)
    torch.manual_seed(0)
    if changes is None:
        found = AutoModelForSequenceClassification.from_pretrained(model, **own)
    else:
        config = AutoConfig.from_pretrained(model, **own, **changes)
        found = AutoModelForSequenceClassification.from_config(config)
    found.save_pretrained(folder)


class OfTorch:
    """transformers' model, the loss that it gives, torch's AdamW."""

    def __init__(self, folder: Path, batches: dict[str, list[dict]]) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(THREADS)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        self.model.train()
        o = ADAMW | dict(lr=LEARNING_RATE, betas=(ADAMW["b1"], ADAMW["b2"]), fused=True)
        own = {key: o[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
        self.tx = torch.optim.AdamW(self.model.parameters(), **own)
        self.batches = {
            kind: [{k: torch.as_tensor(v) for k, v in batch.items()} for batch in some]
            for kind, some in batches.items()
        }

    def step(self, batch) -> float:
        loss = self.model(**batch).loss
        loss.backward()
        self.tx.step()
        self.tx.zero_grad(set_to_none=True)
        return float(loss.detach())

    def turn(self, kind: str) -> None:
        for batch in self.batches[kind]:
            self.step(batch)


class OfSftjax:
    """The step that `train` compiles, with settings of a config."""

    def __init__(self, folder: Path, batches: list[dict], settings: dict) -> None:
        own = {key: value for key, value in settings.items() if key != "width"}
        model = hf.load_model(folder, labels=NAMES, **own)
        model, params = hf.load_params(model, folder)
        tx = optax.adamw(LEARNING_RATE, **ADAMW)
        self.state = sftjax.TrainState.create(params=params, tx=tx)
        loss_fn = losses.classification(model)
        self.compiled = jax.jit(
            functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx),
            donate_argnums=0,
            compiler_options=xla_flags.options(jax.default_backend()),
        )
        self.batches = batches

    def step(self, batch) -> float:
        self.state, metrics = self.compiled(self.state, batch)
        return float(metrics["loss"])  # waits for the step

    def turn(self, kind: str = "") -> None:
        for batch in self.batches:
            self.step(batch)


def same_losses(folder: Path, task, docs) -> list[list[float]]:
    """[[loss, loss after a step] of torch, of sftjax] on one batch. Raises: ValueError."""
    [theirs], [ours] = padded(docs, 1, FIXED), packed(task, docs, FIXED, 1)
    torch_side, side = OfTorch(folder, {"": [theirs]}), OfSftjax(folder, [ours], MEASURED)
    found = [[torch_side.step(torch_side.batches[""][0]) for _ in range(2)]]
    found.append([side.step(ours) for _ in range(2)])
    if not np.allclose(*found, rtol=ALLOWED, atol=0):
        raise ValueError(f"torch has the losses {found[0]}, sftjax {found[1]}: not the same work")
    return found


# ---- turns ---------------------------------------------------------------------------------


def timed(turn) -> tuple[float, float]:
    """(seconds, seconds of processor time) of one turn."""
    wall, cpu = time.perf_counter(), time.process_time()
    turn()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(sides: dict, rounds: int) -> dict[str, list]:
    """{name: [(seconds, processor seconds)] of each round}; each has had two turns before.

    Two, as the second step may be compiled anew: its state comes from a step.
    """
    for turn in [*sides.values()] * 2:
        turn()
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, turn in sides.items():
            found[name].append(timed(turn))
    return found


def ratios(slow: list, fast: list) -> dict[str, list[float]]:
    """Of time and of processor time: [low, median, high] of slow / fast, round by round."""
    pairs = list(zip(slow, fast, strict=True))
    return {name: interval([a[i] / b[i] for a, b in pairs]) for i, name in enumerate(("time", "processor time"))}


def measure(body: str, args) -> dict:
    """Facts of one body: each way of batching beside the packed rows."""
    changes, n, steps = BODIES[body]
    n, steps = args.sentences or n, args.steps or steps
    task, docs = examples(args.model, args.data, n)
    lengths = [len(doc[0]) for doc in docs]
    found = {"sentences": n, "steps": steps, "mean_tokens": float(np.mean(lengths))}
    ways = {"padded": padded(docs, steps, FIXED), "sorted": padded(docs, steps, by_length=True)}
    ways = {way: ways[way] for way in args.ways.split(",")}
    rows = packed(task, docs, FIXED, steps)
    places = {way: sum(b["input_ids"].size for b in some) for way, some in ways.items()}
    places["packed"] = sum(b["tokens"].size for b in rows)
    found["full"] = {way: round(sum(lengths) / size, 3) for way, size in places.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_body(folder, args.model, changes, 0.0)
        found["losses"] = same_losses(folder, task, docs[: n // steps])
        if args.dropout:
            write_body(folder, args.model, changes, args.dropout)
        if args.variants:
            return found | {"variants": variants(folder, task, docs, steps, args.rounds)}
        ours, theirs = OfSftjax(folder, rows, MEASURED), OfTorch(folder, ways)
    for way in ways:
        sides = {"torch": functools.partial(theirs.turn, way), "sftjax": ours.turn}
        times = in_turns(sides, args.rounds)
        found[way] = {
            f"{side}_sentences_per_s": round(n / float(np.median([t for t, _ in times[side]])), 1) for side in times
        }
        found[way] |= ratios(times["torch"], times["sftjax"])
        print(f"{body}, {way}: {json.dumps(found[way])}", flush=True)
    return found


def variants(folder, task, docs, steps, rounds) -> dict:
    """{setting: how many times as long as with what is measured}."""
    sides = {}
    for name, changes in SETTINGS.items():
        settings = MEASURED | changes
        batches = packed(task, docs, settings["width"], steps)
        sides[name] = OfSftjax(folder, batches, settings).turn
    times = in_turns(sides, rounds)
    found = {name: ratios(times[name], times["as measured"]) for name in times}
    for name, ratio in found.items():
        print(f"{name:<22}{json.dumps(ratio)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of a BERT, with its tokenizer")
    parser.add_argument("--data", required=True)
    parser.add_argument("--bodies", default="minilm,base")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--sentences", type=int, default=0, help="of a turn, if not the body's")
    parser.add_argument("--ways", default="padded,sorted")
    parser.add_argument("--steps", type=int, default=0, help="of a turn, if not the body's")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all of it runs")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if args.quick:
        args.bodies, args.rounds = "toy", 2
    if unknown := set(args.bodies.split(",")) - set(BODIES):
        raise SystemExit(f"--bodies={args.bodies}: {', '.join(unknown)} is none of {list(BODIES)}")
    facts = dict(environment=workdir.environment() | drive.machine() | of_torch(), results={})
    for body in args.bodies.split(","):
        facts["results"][body] = measure(body, args)
        if args.out:  # after each: a body takes minutes
            Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")


def of_torch() -> dict:
    import torch

    return {"torch": torch.__version__, "threads": THREADS, "settings": MEASURED}


if __name__ == "__main__":
    main()
