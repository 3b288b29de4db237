"""Training steps of sftjax beside those of other libraries: ratios of one interleaved run.

    benchmarks/peers/install.sh  # once: an environment for each library, in .peers/
    python benchmarks/train_step.py [--shape=S] [--peers=all] [--rounds=3] [--dtype=float32]
                                    [--out=results.json]
    python benchmarks/train_step.py --variants [--shape=S] [--rounds=3] [--out=results.json]

Every library trains the same weights (read from one Hugging Face directory) on the same tokens, the
last half of each row trained, by AdamW, everything trained, in float32 or with bfloat16 compute, by
its own public step in a process of its own (peers/peer_NAME.py). That the work is the same is
checked by the first step's loss. A library is measured in rounds, each next to one of sftjax, and
a ratio compares these two, in time and in processor time. TRL comes three times: as shipped, with
malloc told to keep memory, and with huge pages too (GLIBC_TUNABLES, Linux); so does sftjax beside
itself, as a process gets its memory anew in each step.

Shape S: vocabulary 32000, width 288, 6 layers, 6 heads of 48, feed-forward 768, 8 rows of 256.
M: vocabulary 49152, width 576, 30 layers, 9 query and 3 key/value heads of 64, feed-forward 1536,
2 rows of 512. T: a toy, to see that everything runs.

At S and T also 512 examples of log-normal length (120 tokens on average, 16 to 512), half of each
trained, in batches of 8 rows: TRL padded, TRL packed into rows of 512 (bfd), and sftjax packed
likewise. Tokens that are no padding count. Half of an epoch is timed.

The share is the model's FLOPs (sftjax/models/flops.py: the vocabulary projection of trained tokens
only) per second over those of a large matmul by XLA in the same dtype, measured in the same run.

--variants compares sftjax with itself: each variant differs from the first in what its name says.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

import sftjax
from sftjax import params as params_lib
from sftjax.models import flops
from sftjax.models.decoder import Config
from sftjax.training import workdir

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import drive

SHAPES = {
    "S": (
        Config(vocab=32000, width=288, layers=6, heads=6, kv_heads=6, head_dim=48, mlp=768,
               tied=True), 8, 256,
    ),
    "M": (
        Config(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
               tied=True), 2, 512,
    ),
    "T": (
        Config(vocab=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128,
               tied=True), 4, 64,
    ),
}  # fmt: skip

# name -> (changes of the model, share of tokens trained)
VARIANTS = {
    "default": ({}, 0.5),
    "every token trained": ({}, 1.0),
    "whole score matrix": ({"attention": "xla"}, 0.5),
    "layers unrolled": ({"scan": False}, 0.5),
    "remat none": ({"remat": "none"}, 0.5),
    "remat full": ({"remat": "full"}, 0.5),
}


def make_batch(config, rows, length, share):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, config.vocab, (rows, length + 1)).astype(np.int32)
    trained = np.arange(length) >= (1 - share) * length  # the answer ends each row
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.tile(trained.astype(np.float32), (rows, 1)),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments=np.ones((rows, length), np.int32),
    )


def prepare(shape, changes, share):
    """A function that takes one step and returns its seconds; compiled and warm."""
    config, rows, length = SHAPES[shape]
    model = sftjax.Model(config).replace(**changes)
    tx = optax.adamw(1e-4)
    params = params_lib.init(model.abstract, jax.random.key(0))
    box = [sftjax.TrainState.create(params=params, tx=tx)]
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0)
    batch = jax.device_put(make_batch(config, rows, length, share))

    def one():
        began = time.perf_counter()
        box[0], metrics = step(box[0], batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    one(), one()
    return one


def variants(shape, rounds):
    """{variant: facts}: each beside the first."""
    _, rows, length = SHAPES[shape]
    runs = {name: prepare(shape, *variant) for name, variant in VARIANTS.items()}
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, one in runs.items():
            seconds[name].append(min(one() for _ in range(3)))
    base, table = seconds["default"], {}
    print(f"{'shape ' + shape:<22}{'tokens/s':>12}{'speed vs default':>20}")
    for name, times in seconds.items():
        low, middle, high = drive.spread([b / t for b, t in zip(base, times, strict=True)])
        tokens = rows * length / statistics.median(times)
        table[name] = dict(tokens_per_s=tokens, speed_vs_default=[low, middle, high])
        print(f"{name:<22}{tokens:>12,.0f}{middle:>10.2f} ({low:.2f}..{high:.2f})")
    return table


# ---- beside other libraries ----------------------------------------------------------------

MALLOC = dict(
    MALLOC_MMAP_THRESHOLD_="4294967296",
    MALLOC_TRIM_THRESHOLD_="17179869184",
    MALLOC_TOP_PAD_="268435456",
)
HUGE_PAGES = dict(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
# name in the table -> (its environment, variables of its process)
PEERS = {
    "sftjax, huge pages": ("sftjax", HUGE_PAGES),
    "Tunix": ("tunix", {}),
    "MaxText": ("maxtext", {}),
    "EasyDeL": ("easydel", {}),
    "Levanter": ("levanter", {}),
    "TRL, as shipped": ("trl", {}),
    "TRL, malloc tuned": ("trl", MALLOC),
    "TRL, and huge pages": ("trl", MALLOC | HUGE_PAGES),
}
NO_BFLOAT16 = ("tunix",)  # none on float32 weights
ROUND_S = 3  # the least time of one side of a round


def beside_peers(args, names, folder):
    """{row of the table: facts} of the same batch over and over."""
    config, rows, length = SHAPES[args.shape]
    job = dict(model=str(folder), rows=rows, length=length, trained=0.5, dtype=args.dtype)
    job["work"] = "steps"
    per_step = step_flops(config, rows, length)
    table = {}
    with start("sftjax", "sftjax", job, folder) as base:
        ours = drive.warm(base)
        machine = matmul_rate(base, ours, job, per_step / (rows * length), folder, args.rounds)
        table["sftjax"] = ours | machine
        say("sftjax", table["sftjax"])
        others = [(name, *PEERS[name], job) for name in names]
        if args.dtype != "float32":
            others.insert(0, ("sftjax, float32", "sftjax", {}, job | dict(dtype="float32")))
        for name, peer, env, its_job in others:
            table[name] = attempt(pair, base, ours, name, peer, its_job, folder, args.rounds, env)
            say(name, table[name], machine["matmul_flops"], per_step / (rows * length))
    return table


def lengths(args, names, folder):
    """{row of the table: facts} of examples of many lengths."""
    job = dict(model=str(folder), rows=8, length=512, trained=0.5, dtype=args.dtype)
    job["work"] = "lengths"
    table = {}
    with start("sftjax, packed", "sftjax", job, folder) as base:
        ours = drive.warm(base)
        ours["steps"] = max(1, base.facts["epoch"] // (2 * args.rounds))
        for name, packing in {"TRL, padded": False, "TRL, packed": True}.items():
            its_job = job | dict(packing=packing)
            table[name] = attempt(pair, base, ours, name, "trl", its_job, folder, args.rounds, MALLOC)
            say(name, table[name])
            ours["tokens_per_s"] = table[name].get("base_tokens_per_s")
        table["sftjax, packed"] = ours
        say("sftjax, packed", ours)
    return table


def start(name, peer, job, folder, env=None):
    return drive.Worker(peer, job, folder / f"{name}.log", env=PLATFORM | (env or {}))


# The driver's platform is everyone's, whatever else a library would look for.
PLATFORM = dict(JAX_PLATFORMS="cpu") if jax.default_backend() == "cpu" else {}


def pair(base, ours, name, peer, job, folder, rounds, env):
    with start(name, peer, job, folder, env) as worker:
        theirs = drive.warm(worker)
        same_work(name, job, ours["losses"], theirs["losses"])
        if "epoch" in worker.facts and job["work"] == "lengths":
            base_steps, steps = ours["steps"], max(1, worker.facts["epoch"] // (2 * rounds))
        else:
            base_steps, steps = (math.ceil(ROUND_S / x["step_s"]) for x in (ours, theirs))
        return theirs | drive.compare(base, worker, rounds, base_steps, steps)


def attempt(fn, *args):
    """The facts, or {"failed": why}: one library that does not run here must not end the run."""
    try:
        return fn(*args)
    except drive.WorkerError as e:
        return dict(failed=str(e))


def same_work(name, job, ours, theirs):
    """The first loss is that of the same weights and tokens; batches of many lengths differ."""
    allowed = 1e-4 if job["dtype"] == "float32" else 5e-3
    if job["work"] == "lengths":
        allowed = 0.05
    if abs(ours[0] - theirs[0]) > allowed * ours[0]:
        raise drive.WorkerError(f"{name} starts with the loss {theirs[0]}, sftjax with {ours[0]}: not the same work")


def step_flops(config, rows, length):
    """Model FLOPs of a step with the last half of each row trained."""
    everything = jax.tree.map(lambda _: True, sftjax.Model(config).abstract, is_leaf=params_lib.is_param)
    of = flops.train_flops(config, everything)
    pairs = rows * length * (length + 1) / 2
    return of(rows * length, rows * (length - length // 2), lambda window: pairs)


def matmul_rate(base, ours, job, per_token, folder, rounds):
    """FLOP/s of a large matmul, and the share of it that sftjax reaches, round by round."""
    with start("matmul", "sftjax", job | dict(work="matmul"), folder) as worker:
        worker.ask(3)
        step_s = worker.ask(3)["seconds"][-1]
        steps = (math.ceil(ROUND_S / s) for s in (ours["step_s"], step_s))
        found = drive.compare(base, worker, rounds, *steps)
    return dict(
        tokens_per_s=found["base_tokens_per_s"],
        matmul_flops=found["tokens_per_s"],
        flops_per_token=per_token,
        share=[x * per_token for x in found["ratio"]],
    )


def say(name, facts, matmul=None, per_token=None):
    """One line of the table."""
    if "failed" in facts:
        print(f"{name:<20}failed: {facts['failed'].splitlines()[-1]}", flush=True)
        return
    if matmul:
        facts["share"] = [x * per_token / matmul[1] for x in facts["tokens_per_s"]]
    ratio = ""
    if "ratio" in facts:
        ratio = "{1:.2f} ({0:.2f}..{2:.2f})".format(*facts["ratio"])
        ratio += f"{facts['cpu_ratio'][1]:>8.2f}"
    share = f"{facts['share'][1]:.1%}" if "share" in facts else ""
    line = f"{name:<20}{facts['tokens_per_s'][1]:>10,.0f}{ratio:>28}{facts['first_step_s']:>8.1f}"
    print(f"{line}{facts['peak_mib']:>8,.0f}{share:>8}", flush=True)


def chosen(peers, dtype):
    """Names of PEERS that are installed; those asked for by name have to be."""
    known = {peer for peer, _ in PEERS.values()}
    asked = known if peers == "all" else set(filter(None, peers.split(",")))
    if asked - known:
        raise SystemExit(f"--peers={peers}: expected all or some of {', '.join(sorted(known))}")
    lacking = sorted(peer for peer in asked if drive.python(peer) is None)
    if lacking:
        text = f"not installed: {', '.join(lacking)} (benchmarks/peers/install.sh)"
        if peers != "all":
            raise SystemExit(text)
        print(text)
    asked -= set(lacking)
    if dtype != "float32":
        print(f"no {dtype} compute on float32 weights: {', '.join(NO_BFLOAT16)}")
        asked -= set(NO_BFLOAT16)
    return [name for name, (peer, _) in PEERS.items() if peer in asked]


def peers(args):
    names = chosen(args.peers, args.dtype)
    print(f"shape {args.shape}, {args.dtype}, {jax.devices()[0].device_kind}")
    columns = ("tokens/s", 10), ("sftjax beside it", 20), ("by CPU", 8), ("first s", 8)
    columns += ("MiB", 8), ("share", 8)
    print(" " * 20 + "".join(f"{name:>{wide}}" for name, wide in columns), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        drive.write_model(folder, SHAPES[args.shape][0])
        results = {"steps": beside_peers(args, names, folder)}
        if args.shape in "ST" and any(PEERS[name][0] == "trl" for name in names):
            results["lengths"] = lengths(args, names, folder)
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="S", choices=SHAPES)
    parser.add_argument("--peers", default="all", help="all, or names with commas, or '' for none")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    shape, rounds = args.shape, args.rounds
    results = {"variants": variants(shape, rounds)} if args.variants else peers(args)
    if args.out:
        value = {"environment": workdir.environment() | drive.machine(), "results": results}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(value, indent=2) + "\n")
    failed = [name for table in results.values() for name, row in table.items() if "failed" in row]
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
