"""Training steps of a BERT classifier on packed rows beside padded ones, at SST-2's lengths.

    python benchmarks/encoder_packing.py --model=<directory> --data=<train.tsv> [--out=FILE]

Padded: batches of 32 random reviews, each as wide as its longest rounded up to 16 tokens, as a
collator pads. Packed: rows of 128 tokens, of as many reviews. Both take the same reviews, in turns;
printed are reviews and real tokens a second of processor time and by the clock.
"""

import argparse
import functools
import json
import tempfile
import time

import jax
import numpy as np
import optax

import sftjax
from sftjax import hf, losses
from sftjax.data import Rows, build_store, open_source
from sftjax.tasks.classification import Classification
from sftjax.training import workdir

PADDED, WIDTH, MULTIPLE = 32, 128, 16


def batches(store, task, reviews: int) -> dict[str, list[dict]]:
    """{"packed", "padded"}: batches that hold the first so many reviews."""
    docs = np.random.default_rng(0).permutation(len(store))[:reviews]

    class Some:
        lengths = store.lengths[docs]

        def __getitem__(self, i):
            return store[docs[i]]

    packed = Rows(Some(), WIDTH, "bfd", layout=task.layout)
    rows = packed.batch(range(len(packed)))
    each = PADDED * len(packed) // reviews or 1
    out = {"packed": [{k: v[i : i + each] for k, v in rows.items()} for i in range(0, len(packed) - each + 1, each)]}
    lone = Rows(Some(), WIDTH, "none", shuffle=False, layout=task.layout)
    out["padded"] = []
    for start in range(0, reviews, PADDED):
        batch = lone.batch(range(start, start + PADDED))
        width = -(-int((batch["segments"] > 0).sum(1).max()) // MULTIPLE) * MULTIPLE
        out["padded"].append({k: v[:, :width] for k, v in batch.items()})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--reviews", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    names = ("negative", "positive")
    task = Classification(AutoTokenizer.from_pretrained(args.model), names)
    with tempfile.TemporaryDirectory() as cache:
        store = build_store(open_source(args.data, 10 * args.reviews), task, WIDTH, "drop", cache)
    model = hf.load_model(args.model, labels=names, scan=False)
    model, params = hf.load_params(model, hf.resolve(args.model))
    tx = optax.adamw(1e-5)
    step = functools.partial(sftjax.train_step, loss_fn=losses.classification(model), tx=tx)
    step = jax.jit(step, donate_argnums=0)
    state = sftjax.TrainState.create(params=params, tx=tx)
    found = batches(store, task, args.reviews)
    for some in found.values():  # compile each width
        for batch in {b["tokens"].shape: b for b in some}.values():
            state, _ = jax.block_until_ready(step(state, batch))
    times = {kind: [] for kind in found}
    for _ in range(args.rounds):
        for kind, some in found.items():
            tokens = sum(int((b["segments"] > 0).sum()) for b in some)
            wall, cpu = time.perf_counter(), time.process_time()
            for batch in some:
                state, _ = step(state, batch)
            jax.block_until_ready(state)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[kind].append((tokens / wall, tokens / cpu))
    result = {
        kind: dict(zip(("tokens_per_s", "tokens_per_cpu_s"), np.median(t, 0).tolist(), strict=True))
        for kind, t in times.items()
    }
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        pairs = [
            a[key == "tokens_per_cpu_s"] / b[key == "tokens_per_cpu_s"]
            for a, b in zip(times["packed"], times["padded"], strict=True)
        ]
        result[f"{key}, packed / padded"] = sorted(pairs)
    print(json.dumps(result, indent=1))
    if args.out:
        with open(args.out, "w") as f:
            json.dump(dict(environment=workdir.environment(), results=result), f, indent=1)


if __name__ == "__main__":
    main()
