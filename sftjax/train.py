"""Supervised fine-tuning from a config, on one page; read it from top to bottom.

python -m sftjax.train --config=configs/chat.py --workdir=runs/mine --config.optim.lr=1e-4

A workdir belongs to one config. Started again in the same workdir, a run goes on where its last checkpoint left it,
with the batches it would have seen.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax import exits, optim, parallel, tasks
from sftjax import params as params_lib
from sftjax.adapters import lora as adapters
from sftjax.evaluation.evaluator import EarlyStop, Evaluator
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.parallel import processes
from sftjax.reports import run as report
from sftjax.training import build, nan, resume, trackers, xla_flags
from sftjax.training import workdir as workdir_lib
from sftjax.training.checkpoint import Checkpointer
from sftjax.training.data import Feed
from sftjax.training.health import Health
from sftjax.training.log import Log, say
from sftjax.training.profiler import Profiler
from sftjax.training.running import Run
from sftjax.training.stops import Stop


def main(argv: Sequence[str]) -> None:
    """Train by the command line: sftjax train --config=FILE.py --workdir=DIR."""
    with Stop() as stop:
        config, flags = config_lib.parse(argv, workdir=None, **{"debug.nan": False})
        train(config, flags.workdir, stop, getattr(flags, "debug.nan"))


def train(config: ConfigDict, workdir: Path | str, stop: Stop | None = None, debug_nan: bool = False) -> dict[str, Any]:
    """Run the whole job; returns {"before", "after", "steps"}: see Evaluator.full.

    debug_nan: wait for each step, and end with the first operation that makes a NaN.
    Raises: Stopped, with a checkpoint saved, when `stop` or JAX's preemption notice asks for it; DivergenceError, see
    Health.
    """
    # ==== Machine and workdir ====
    config_lib.check(config)
    config, rate = config_lib.settle(config)
    m = config.mesh
    xla_flags.settle()
    processes.initialize(m.coordinator, m.processes, m.process_id, m.timeout)
    stop = stop or Stop()
    stop.listen()  # again: the runtime of several processes takes SIGTERM for itself
    stop.grace = config.train.grace
    run = Run(workdir, stop)  # takes the lock: one run a workdir
    with run.starting():
        mesh = parallel.make_mesh({axis: m[axis] for axis in parallel.AXES})
        for length in (*config.data.buckets, config.data.max_length):
            parallel.check_batch(mesh, config.train.batch_size, config.train.micro_batches, length)
        workdir = workdir_lib.prepare_workdir(config, workdir)
        workdir_lib.warn(config)
        told = trackers.start(config.train.trackers, workdir, config_lib.to_dict(config))
        if (home := workdir_lib.began_in(workdir)) != Path.cwd():
            say("paths", f"relative ones are taken from {home}, where this run began")
        axes = parallel.mesh_text(mesh.shape) or "of one device"
        say("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {axes}")

    with (
        run,
        trackers.closing(told),
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
        best = config.eval.best
        lower = task.lower_is_better(best)
        manifest = workdir_lib.manifest(config, feed, model)
        checkpoints = Checkpointer(
            workdir / "checkpoints",
            manifest=manifest,
            keep=config.train.keep,
            best_metric=best,
            lower=lower,
            frozen=not (config.adapter.kind or config.model.quantize),
        )
        checkpoints.check_space(target, config.train.export)
        how: Any = dict(seed=config.seed, new=feed.new_tokens)
        if checkpoints.latest_step() is None:
            state = build.first_state(config.model, model, trainable, tx, target, mesh, **how)
            extra: dict[str, Any] = dict.fromkeys(("before", "early_stop", "data", "health"))
        else:
            base = None if checkpoints.frozen else build.make_params(config.model, model, trainable, mesh, **how)[0]
            state, extra = checkpoints.restore(target, params_lib.partition(base, trainable)[1] if base else None)
            extra = resume.comparable(extra, manifest, feed)
            say("resumed", f"step {checkpoints.latest_step()} of {workdir / 'checkpoints'}")
        health = Health(config.train, workdir, feed, extra["health"])
        health.check(state, "the weights as they were read")
        flops = build.flops_per_step(model, trainable, feed)
        say("model", params_lib.table(state.all_params, trainable))
        if config.adapter.kind:
            say("adapters", f"{adapters.table(model)}\n{rate}".rstrip())
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
        evaluator = Evaluator(task, model, feed, config)
        if extra["before"] is None:
            extra["before"] = evaluator.full(state.all_params, state.model_state)

        # ==== The loop ====
        step = checkpoints.latest_step() or 0
        log = Log(config.train, workdir, feed, lr, flops, step, extra.get("log", ()), health.see, told)
        early_stop = EarlyStop(best, config.eval.patience, lower, extra["early_stop"])
        run.say(state="running", step=step, steps=feed.steps, best=best, lower=lower)
        stop.hold(step)  # from here on a signal waits for the end of a step
        for batch in feed.batches(start=step, state=extra.get("data")):
            if early_stop.stop:
                say("stopped", f"{best} did not improve {config.eval.patience} times")
                break
            with profiler.step(step + 1), jax.transfer_guard("disallow"):
                state, metrics = steps[feed.width(batch)](state, batch)
            step += 1
            profiler.end(step, metrics)
            checkpoints.check()  # a save that failed behind the loop is said now
            if debug_nan:
                nan.check(step, metrics, state, batch, loss_fn, tx)
            log.step(step, metrics, feed.wait)
            if health.ill:
                state = health.mend(state, step, target, checkpoints)
            values = None
            if evaluator.measures and feed.due(step, config.eval.every, "eval.every"):
                with log.pause():
                    values = evaluator.losses(state.all_params, state.model_state)
                log.writer.write(step, values)
                early_stop.update(values)
                extra["early_stop"] = early_stop.state
            stopping = stop.due(step)
            saves = feed.due(step, config.train.checkpoint_every, "train.checkpoint_every")
            if stopping or saves or (values and best):
                with log.pause():
                    extra |= {"data": feed.state(step), "log": log.state()}
                    extra["health"] = health.record()
                    if health.may_save(step, state):
                        checkpoints.save(step, state, extra, values)
            if stopping:
                break
        profiler.close()
        log.close(rest=not stop.asked)
        if stop.asked:
            checkpoints.wait()
        run.say(step=step)
        stop.release(step, feed.steps, checkpoints.latest_step())
        health.finish(step, checkpoints)

        # ==== After ====
        after = evaluator.full(state.all_params, state.model_state, rows=True)
        if config.train.export:
            build.export(workdir / "export", task, model, state)
        result = {"before": extra["before"], "after": after, "steps": step}
        report.finish(workdir, task, feed, result, config.eval.samples)
        checkpoints.close()  # last: a save that failed takes neither the export nor the report
    return result


if __name__ == "__main__":
    exits.run(main)
