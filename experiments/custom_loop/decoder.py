"""sftjax.train_step in a loop of your own on instructions: no trainer, no config, no mesh.

    python experiments/custom_loop/decoder.py [model directory] [records.jsonl]

Expect the loss to fall; the trained model is written to runs/loop as a Hugging Face directory.
"""

import functools
import random
import sys

import jax
import optax
from transformers import AutoTokenizer

import sftjax

QUICKSTART = "experiments/quickstart/base_model", "experiments/quickstart/data/train.jsonl"


def main(path=QUICKSTART[0], records=QUICKSTART[1], out="runs/loop", steps=30):
    model, params = sftjax.load_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    source = sftjax.data.open_source(records, limit=1000)
    docs = [sftjax.data.encode(record, tokenizer) for record in source]
    rows = sftjax.data.pack([len(d.tokens) for d in docs], 256, "bfd")
    random.Random(0).shuffle(rows)

    tx = optax.adamw(1e-3)
    state = sftjax.TrainState.create(params=params, tx=tx)
    step = functools.partial(sftjax.train_step, loss_fn=sftjax.losses.causal_lm(model), tx=tx)
    step = jax.jit(step, donate_argnums=0)
    losses = []
    for i in range(steps):
        first = 4 * i % (len(rows) - 3)  # four rows a step, over and over
        state, metrics = step(state, sftjax.data.make_batch(docs, 256, rows[first : first + 4]))
        losses.append(float(metrics["loss"]))
        print(f"step {i + 1}  loss {losses[-1]:.4f}  trained {metrics['trained_tokens']:.0f} tokens")
    sftjax.save_pretrained(out, model, state.all_params, tokenizer)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
