"""How trace and compile time of the train step grow with depth: they must not.

    python benchmarks/startup.py --depths 4,64 --out startup.json

For each kind of decoder (one kind of layer; a window alternating with global attention; a mixture
of experts) the whole step with AdamW is traced, lowered and compiled at each depth, `repeat` times
in turn, with the compile cache off. Prints the least processor time of each (other programs on the
machine count less than in wall time), its ratio to the shallowest, and the lines of StableHLO,
which should not depend on the depth at all.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import optax

import sftjax
from sftjax import params as params_lib
from sftjax import setup
from sftjax.models import decoder
from sftjax.ops.rope import Rope

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", default="4,64")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    depths = [int(d) for d in args.depths.split(",")]
    configs = {
        (name, n): decoder.Config(layers=n, **BASE | extra)
        for name, extra in KINDS.items()
        for n in depths
    }
    compile_step(next(iter(configs.values())))  # what the first compile of a process costs
    times = {key: [] for key in configs}
    for _ in range(args.repeat):
        for key, config in configs.items():
            times[key].append(compile_step(config))
    rows = []
    print(f"{'model':<16}{'layers':>8}{'seconds':>10}{'ratio':>8}{'lines':>8}")
    for (name, n), found in times.items():
        least, lines = min(found)
        ratio = least / min(times[name, depths[0]])[0]
        rows.append(dict(model=name, layers=n, seconds=least, ratio=ratio, lines=lines))
        print(f"{name:<16}{n:>8}{least:>10.2f}{ratio:>8.2f}{lines:>8}")
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"environment": setup.environment(), "results": rows}, f, indent=2)
            f.write("\n")


if __name__ == "__main__":
    main()
