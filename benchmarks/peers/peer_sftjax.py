"""sftjax: its train_step under jit; also this machine's matmul rate, as the work "matmul"."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import worker

import sftjax
from sftjax import data, hf
from sftjax.training import xla_flags

SIDE = 4096  # of the square matrices of the work "matmul"


def matmul(job):
    """A step is one product of large matrices, its tokens are FLOPs: what the machine can do."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (SIDE, SIDE), job["dtype"]) for key in keys)
    multiply = jax.jit(jnp.matmul)

    def step():
        jax.block_until_ready(multiply(a, b))
        return 0.0

    worker.run(step, 2 * SIDE**3)


def batches(job):
    """The whole batches of an epoch, each with its number of tokens that are no padding."""
    docs = worker.examples(job)
    rows = data.pack([len(tokens) for tokens, _ in docs], job["length"], "bfd")
    np.random.default_rng(1).shuffle(rows)
    made, n = [], job["rows"]
    for start in range(0, len(rows) // n * n, n):
        batch = data.make_batch(docs, job["length"], rows[start : start + n])
        made.append((batch, (batch["segments"] > 0).sum()))
    return made


def main():
    job = worker.job()
    if job["work"] == "matmul":
        matmul(job)
    model = hf.load_model(job["model"], dtype=job["dtype"])
    model, params = hf.load_params(model, job["model"])
    tx = optax.adamw(worker.LEARNING_RATE, **worker.ADAMW)
    state = sftjax.TrainState.create(params=params, tx=tx)
    del params
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(
        functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx),
        donate_argnums=0,
        compiler_options=xla_flags.options(jax.default_backend()),  # as train compiles it
    )
    epoch = batches(job)
    pace = worker.Pace(epoch=len(epoch))
    for batch, tokens in itertools.cycle(epoch):
        state, metrics = step(state, batch)
        pace.step(metrics["loss"], tokens)  # reads the loss, so waits for the step


main()
