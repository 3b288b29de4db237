"""Supervised fine-tuning from a config, on one page; read it from top to bottom.

python -m sftjax.train --config=configs/chat.py --workdir=runs/mine --config.optim.lr=1e-4

A workdir belongs to one config. Started again in the same workdir, a run goes on where its last
checkpoint left it, with the batches it would have seen.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax import optim, parallel, tasks
from sftjax import params as params_lib
from sftjax.evaluation.evaluator import EarlyStop, Evaluator
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.parallel import processes
from sftjax.reports import run as report
from sftjax.training import build, xla_flags
from sftjax.training import workdir as workdir_lib
from sftjax.training.checkpoint import Checkpointer
from sftjax.training.data import Feed
from sftjax.training.log import Log, say
from sftjax.training.profiler import Profiler


def main(argv: Sequence[str]) -> None:
    """Train by the command line: sftjax train --config=FILE.py --workdir=DIR."""
    config, flags = config_lib.parse(argv, workdir=None)
    train(config, flags.workdir)


def train(config: ConfigDict, workdir: Path | str) -> dict[str, Any]:
    """Run the whole job; returns {"before", "after", "steps"}: see Evaluator.full."""
    # ==== Machine and workdir ====
    config_lib.check(config)
    m = config.mesh
    processes.initialize(m.coordinator, m.processes, m.process_id, m.timeout)
    mesh = parallel.make_mesh({axis: m[axis] for axis in parallel.AXES})
    for length in (*config.data.buckets, config.data.max_length):
        parallel.check_batch(mesh, config.train.batch_size, config.train.micro_batches, length)
    workdir = workdir_lib.prepare_workdir(config, workdir)
    workdir_lib.warn(config)
    if (home := workdir_lib.began_in(workdir)) != Path.cwd():
        say("paths", f"relative ones are taken from {home}, where this run began")
    say("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}, {mesh_text(mesh)}")

    with (
        processes.together(),
        contextlib.chdir(home),  # relative paths mean what they did when the run began
        build.advice(config),
        workdir_lib.compile_cache(workdir),
        jax.set_mesh(mesh),
    ):
        # ==== Data ====
        task = tasks.make(config, load_tokenizer(config))
        feed = Feed(config, task, workdir, mesh)
        say("data", feed.summary())

        # ==== Model, optimizer, state ====
        model, trainable = build.make_model(config, task)
        profiler = Profiler(config.profile.steps, workdir, feed.steps)
        lr = build.make_schedule(config.optim, feed.steps)
        tx = optim.make(config.optim, lr, model.abstract, trainable)
        target = build.abstract_state(config.model, model, trainable, tx, mesh)
        lower = task.lower_is_better(config.eval.best)
        checkpoints = Checkpointer(
            workdir / "checkpoints",
            manifest=workdir_lib.manifest(config, feed),
            keep=config.train.keep,
            best_metric=config.eval.best,
            best_mode="min" if lower else "max",
        )
        if checkpoints.latest_step() is None:
            how = dict(seed=config.seed, new=feed.new_tokens)
            state = build.first_state(config.model, model, trainable, tx, target, mesh, **how)
            extra: dict[str, Any] = {"before": None, "early_stop": None, "data": None}
        else:
            state, extra = checkpoints.restore(target)
            say("resumed", f"step {checkpoints.latest_step()} of {workdir / 'checkpoints'}")
        flops = build.flops_per_step(model, trainable, feed)
        say("model", params_lib.table(state.all_params, trainable))
        say("state", build.state_text(state, flops))

        # ==== Compile: once for each batch shape there is, the widest last ====
        if xla_flags.text(jax.default_backend()):
            say("flags", xla_flags.text(jax.default_backend()))
        loss_fn = task.loss_fn(model, config.loss.to_dict(), feed.names)
        step_fn = build.make_step(loss_fn, tx, target, config.train.micro_batches)
        began = time.monotonic()
        steps = {w: step_fn.lower(target, feed.abstract_batch(w)).compile() for w in feed.widths}
        say("compiled", build.compiled_text(steps[feed.widths[-1]], time.monotonic() - began))

        # ==== Before ====
        generation = dict(mesh=mesh, seed=config.seed, **config.generate.to_dict())
        evaluator = Evaluator(task, model, feed, config.loss.to_dict(), **generation)
        if extra["before"] is None:
            extra["before"] = evaluator.full(state.all_params, state.model_state)

        # ==== The loop ====
        step = checkpoints.latest_step() or 0
        log = Log(config.train, workdir, feed, lr, flops, start=step)
        early_stop = EarlyStop(config.eval.best, config.eval.patience, lower, extra["early_stop"])
        for batch in feed.batches(start=step, state=extra.get("data")):
            if early_stop.stop:
                say("stopped", f"{config.eval.best} did not improve {config.eval.patience} times")
                break
            with profiler.step(step + 1), jax.transfer_guard("disallow"):
                state, metrics = steps[feed.width(batch)](state, batch)
            step += 1
            profiler.end(step, metrics)
            checkpoints.check()  # a save that failed behind the loop ends it now
            log.step(step, metrics, feed.wait)
            values = None
            if feed.sets and feed.due(step, config.eval.every, "eval.every"):
                with log.pause():
                    values = evaluator.losses(state.all_params, state.model_state)
                log.write(step, values)
                early_stop.update(values)
                extra["early_stop"] = early_stop.state
            if feed.due(step, config.train.checkpoint_every, "train.checkpoint_every") or (
                values and config.eval.best
            ):
                with log.pause():
                    extra["data"] = feed.state(step)
                    checkpoints.save(step, state, extra, values)
        profiler.close()
        log.close()
        checkpoints.close()

        # ==== After ====
        after = evaluator.full(state.all_params, state.model_state)
        if config.train.export:
            build.export(workdir / "export", task, model, state)
        result = {"before": extra["before"], "after": after, "steps": step}
        report.finish(workdir, task, feed, result, config.eval.samples)
    return result


def mesh_text(mesh: Mesh) -> str:
    """The axes of a mesh that have more than one device, and their sizes."""
    sizes = [f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1]
    return f"mesh {' x '.join(sizes) or 'of one device'}"


if __name__ == "__main__":
    config_lib.run(main)
