"""Supervised fine-tuning from a config, on one page; read it from top to bottom.

python -m sftjax.train --config=configs/chat.py --workdir=runs/mine --config.optim.lr=1e-4

A workdir belongs to one config. Started again in the same workdir, a run goes on where its last
checkpoint left it, with the same batches it would have seen.
"""

import functools
import itertools
import json
import sys
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import checkpoint as checkpoint_lib
from sftjax import config as config_lib
from sftjax import data as data_lib
from sftjax import evaluate, losses, metrics, optim, sharding
from sftjax import params as params_lib
from sftjax.models import decoder, hf
from sftjax.step import TrainState, eval_step, train_step


def main(argv):
    config, flags = config_lib.parse(argv, workdir=None)
    train(config, flags.workdir)


def train(config, workdir) -> dict:
    """Run the whole job and return its report: {"before", "after", "steps", ...}."""
    # ==== Machine and workdir ====
    m = config.mesh
    sharding.initialize(m.coordinator, m.processes, m.process_id)
    mesh = sharding.make_mesh({a: m[a] for a in sharding.AXES})
    sharding.check_batch(
        mesh, config.train.batch_size, config.train.micro_batches, config.data.max_length
    )
    workdir = prepare_workdir(config, workdir)
    say(f"devices   {jax.device_count()} x {jax.devices()[0].device_kind}, mesh {mesh_text(mesh)}")

    with jax.set_mesh(mesh):
        # ==== Data ====
        tokenizer = data_lib.load_tokenizer(config)
        stop_ids = data_lib.stop_ids(tokenizer, data_lib.read_template(config))
        data = Data(config, tokenizer, workdir, mesh)
        say(data.summary())

        # ==== Model, optimizer, state ====
        model, trainable = make_model(config, tokenizer)
        lr = make_schedule(config, data)
        tx = optim.make(config.optim, lr, model.abstract, trainable, model.abstract)
        checkpoints = checkpoint_lib.Checkpointer(
            workdir / "checkpoints", keep=config.train.keep, best_metric=config.eval.best
        )
        target = abstract_state(config, model, trainable, tx, mesh)
        if checkpoints.latest_step() is None:
            model, state = first_state(config, model, trainable, tx, target, mesh)
            extra = {"before": None, "stopper": None}
        else:
            state, extra = checkpoints.restore(target)
            say(f"resumed   step {int(state.step)} from {workdir / 'checkpoints'}")
        say(params_lib.table(model.abstract, trainable, config.model))

        # ==== Compile: once, before the first batch ====
        loss = config.loss
        loss_fn = losses.causal_lm(
            model,
            normalise=loss.normalise,
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
            chunk_tokens=loss.chunk_tokens,
        )
        step_fn = functools.partial(
            train_step, loss_fn=loss_fn, tx=tx, micro_batches=config.train.micro_batches
        )
        say("compile   the training step ...", end=" ")
        started = time.monotonic()
        compiled = (
            jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings_of(target), None))
            .lower(target, data.abstract_batch())
            .compile()
        )
        say(f"{time.monotonic() - started:.1f} s")
        evaluator = Evaluator(config, model, tokenizer, stop_ids, data, mesh)

        # ==== Before ====
        if extra["before"] is None:
            extra["before"] = evaluator.full(state.all_params)

        # ==== The loop ====
        writer = metrics.Writer(
            workdir, data.steps, jax.process_index(), config.train.tensorboard
        )
        log = Log(config, model, trainable, data, lr, writer)
        stopper = EarlyStop(config.eval.best, config.eval.patience, extra["stopper"])
        step = int(state.step)
        for batch in data.batches(start=step):
            with jax.transfer_guard("disallow"):
                state, on_device = compiled(state, batch)
            step += 1
            log.step(step, on_device, data.wait)
            values = None
            if data.due(step, config.eval.every, "eval.every"):
                values = evaluator.losses(state.all_params)
                writer.write(step, values)
                stopper.update(values)
            if data.due(step, config.train.checkpoint_every, "train.checkpoint_every") or values:
                extra["stopper"] = stopper.state
                checkpoints.save(step, state, extra, values)
            if stopper.stop:
                say(f"stopped   {config.eval.best} has not improved for {stopper.bad} evaluations")
                break
        log.close()
        checkpoints.close()

        # ==== After ====
        report = {"before": extra["before"], "after": evaluator.full(state.all_params), "steps": step}
        if config.train.export:
            hf.save_pretrained(
                workdir / "export", model, state.all_params, tokenizer, stop_ids=stop_ids
            )
        finish(config, workdir, report, writer)
    return report
