"""How long until the first step is done; and that compile time does not grow with depth.

    python benchmarks/startup.py [--depths 4,64] [--repeat=3] [--rounds=3] [--out startup.json]

start   Processes that import sftjax and train one step of a small Llama (shape S of
        benchmarks/train_step.py): seconds of the import; from then to the end of the first step
        without a compile cache, and again with the cache that the start before has filled. A round
        is a first and a second start, one after the other; the ratio compares these two. That
        first step is also computed, which no cache can save: another step is timed after it, and
        the last ratio compares the starts less this time.

depth   For each kind of decoder (one kind of layer; a window alternating with global attention; a
        mixture of experts) the whole step with AdamW is traced, lowered and compiled at each
        depth, `repeat` times in turn, with the compile cache off. Prints the ratio to the
        shallowest, and the lines of StableHLO, which should not depend on the depth at all.

Seconds of depth are processor time: other programs on the machine count less than in wall time.
Starts are given by the clock on the wall, which is what a user waits for, and by processor time: a
step keeps all cores busy, compiling mostly one of them.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

import sftjax
from sftjax import params as params_lib
from sftjax.models import decoder
from sftjax.ops.rope import Rope
from sftjax.training import workdir

BASE = dict(vocab=512, width=64, heads=4, kv_heads=2, head_dim=16, mlp=128, remat="full")
LOCAL = decoder.Kind(window=32, rope=Rope(10_000.0))
GLOBAL = decoder.Kind(rope=Rope(1_000_000.0))
KINDS = {
    "one kind": {},
    "local, global": dict(kinds=(LOCAL, GLOBAL)),
    "mixture": dict(experts=4, experts_per_token=2),
}


def compile_step(config) -> tuple[float, int]:
    """Processor seconds to trace, lower and compile the train step; lines of its program."""
    model, tx = decoder.Model(config), optax.adamw(1e-3)
    params = params_lib.shapes(model.abstract)
    state = jax.eval_shape(lambda p: sftjax.TrainState.create(params=p, tx=tx), params)
    batch = {
        k: jax.ShapeDtypeStruct((4, 128), jnp.float32 if k == "weights" else jnp.int32)
        for k in ("tokens", "targets", "weights", "positions", "segments")
    }
    loss_fn = sftjax.losses.causal_lm(model)
    step = functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx)
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    lowered.compile()
    return time.process_time() - start, lowered.as_text().count("\n")


# ---- from the command to the first step ----------------------------------------------------

CHILD = """
import time, json
began = time.perf_counter()
now = lambda: numpy.array([time.perf_counter() - began, time.process_time()])
import sftjax, jax, functools, numpy, optax
imported = now()
from sftjax import params as params_lib
from sftjax.models.decoder import Config
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
config = Config(**{config})
model, tx = sftjax.Model(config), optax.adamw(1e-4)
step = functools.partial(sftjax.train_step, loss_fn=sftjax.losses.causal_lm(model), tx=tx)
params = params_lib.init(model.abstract, jax.random.key(0))
create = jax.jit(functools.partial(sftjax.TrainState.create, tx=tx))
tokens = numpy.ones(({rows}, {length}), numpy.int32)
batch = dict(tokens=tokens, targets=tokens, weights=tokens.astype(numpy.float32),
             positions=tokens.cumsum(1, dtype=numpy.int32) - 1, segments=tokens)
step = jax.jit(step, donate_argnums=0)
state, metrics = jax.block_until_ready(step(create(params=params), batch))
first_step = now()
jax.block_until_ready(step(state, batch))
found = dict(imported=imported, first=first_step - imported, step=now() - first_step)
print(json.dumps({k: v.tolist() for k, v in found.items()} | {"loss": float(metrics["loss"])}))
"""
SMALL = dict(vocab=32000, width=288, layers=6, heads=6, kv_heads=6, head_dim=48, mlp=768, tied=True)
CLOCKS = ("wall", "processor")


def start(cache, config, rows, length) -> dict:
    """One process: seconds, by each of CLOCKS, of the import, from there to the end of the first
    step, and of another step; the first one's loss."""
    code = CHILD.replace("{config}", repr(config)).replace("{rows}", str(rows))
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code.replace("{length}", str(length))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"a start failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def starts(rounds, config=None, rows=8, length=256) -> dict:
    """{clock: {what: a value of each round}}: import, first and second start, step, ratios."""
    names = ("imported", "first", "second", "step", "ratio", "ratio_less_step")
    out = {clock: {name: [] for name in names} for clock in CLOCKS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            pair = [start(cache, config or SMALL, rows, length) for _ in range(2)]
        if pair[0]["loss"] != pair[1]["loss"]:
            raise RuntimeError(f"two starts with different losses: {pair}")
        for i, clock in enumerate(CLOCKS):
            imported, step = (min(s[key][i] for s in pair) for key in ("imported", "step"))
            first, second = (s["first"][i] for s in pair)
            ratios = second / first, (second - step) / (first - step)
            for name, value in zip(names, (imported, first, second, step, *ratios), strict=True):
                out[clock][name].append(value)
    return out


def show_starts(found):
    names = dict(
        imported="import of sftjax and jax",
        first="import to first step, no cache",
        second="the same, second start",
        step="of that, the step itself",
        ratio="second / first",
        ratio_less_step="the same, less the step itself",
    )
    print(f"{'':<34}" + "".join(f"{clock:>8}{'':<14}" for clock in CLOCKS).rstrip())
    for key, name in names.items():
        cells = ""
        for clock in CLOCKS:
            values = found[clock][key]
            spread = f"({min(values):.2f}..{max(values):.2f})"
            cells += f"{statistics.median(values):>8.2f} {spread:<13}"
        print(f"{name:<34}{cells}".rstrip())


def depth(depths, repeat) -> list[dict]:
    jax.config.update("jax_enable_compilation_cache", False)
    configs = {(name, n): decoder.Config(layers=n, **BASE | extra) for name, extra in KINDS.items() for n in depths}
    compile_step(next(iter(configs.values())))  # what the first compile of a process costs
    times = {key: [] for key in configs}
    for _ in range(repeat):
        for key, config in configs.items():
            times[key].append(compile_step(config))
    rows = []
    print(f"{'model':<16}{'layers':>8}{'seconds':>10}{'ratio':>8}{'lines':>8}")
    for (name, n), found in times.items():
        least, lines = min(found)
        ratio = least / min(times[name, depths[0]])[0]
        rows.append(dict(model=name, layers=n, seconds=least, ratio=ratio, lines=lines))
        print(f"{name:<16}{n:>8}{least:>10.2f}{ratio:>8.2f}{lines:>8}")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", default="4,64", help="none: leave this part out")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of starts; 0: leave this part out")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    results = {}
    if args.rounds:
        results["start"] = starts(args.rounds)
        show_starts(results["start"])
    if args.depths != "none":
        results["depth"] = depth([int(d) for d in args.depths.split(",")], args.repeat)
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"environment": workdir.environment(), "results": results}, f, indent=2)
            f.write("\n")


if __name__ == "__main__":
    main()
