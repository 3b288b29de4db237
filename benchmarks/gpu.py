"""Training steps on one GPU, sftjax beside torch on the same card: tokens/s, MFU, peak memory.

    python benchmarks/gpu.py [--cases 1B-4096 ...] [--rounds=3] [--steps=10] [--out=gpu.json]
    python benchmarks/gpu.py --tune [--cases 1B-8192]     block sizes of the attention kernels
    python benchmarks/gpu.py --toy                        all of it on a CPU, at a toy size

Packed rows of log-normal documents (mean 700 tokens), the second half of each trained; compute in
bf16. 1B and 8B are Llama-3.2-1B and Llama-3.1-8B with random weights: 1B in full with float32
parameters, 8B with all but its last four layers frozen in bf16 (float32 for the trained), and 8B
in full with bf16 parameters and moments (for cards of 100 GB and more). LoRA is not part of sftjax
yet, so no case uses it.

torch (benchmarks/gpu_torch.py): transformers' Llama, torch.compile, fused AdamW, cross-entropy that
ignores untrained positions, the same batches, dtypes and recomputation, with each attention that is
installed and isolates documents: sdpa and flex_attention, FlashAttention 2 and 3. Every measurement
is a process of its own, so that each has the whole card; the processes of a round take turns, and a
ratio compares neighbours in time. MFU counts what the model needs: attention inside documents, the
vocabulary for trained tokens only, no recomputation; both sides by the same count. A measurement
that fails (out of memory, not installed) is a line of the table and says why.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for benchmarks.triton_attention
TRITON = f"{HERE}/triton_attention.py:TRITON"
LLAMA = dict(vocab=128256, max_positions=131072)
SHAPES = {
    "1B": LLAMA
    | dict(width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192, tied=True),
    "8B": LLAMA
    | dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, tied=False),
    "toy": dict(vocab=512, max_positions=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16,
                mlp=128, tied=True),
}  # fmt: skip
ROPE_THETA = 500_000.0


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str
    rows: int
    length: int
    trained_layers: int = 0  # the last so many; 0 = every parameter
    dtype: str = "float32"  # of trained parameters and their moments; frozen ones are bf16
    remat: str = "dots"  # model.remat; torch checkpoints each layer where it is "full"


CASES = {
    "1B-4096": Case("1B", 4, 4096),
    "1B-8192": Case("1B", 2, 8192),
    "8B-last4-4096": Case("8B", 4, 4096, trained_layers=4),
    "8B-last4-8192": Case("8B", 2, 8192, trained_layers=4),
    "8B-full-4096": Case("8B", 2, 4096, dtype="bfloat16"),
    "8B-full-8192": Case("8B", 1, 8192, dtype="bfloat16"),
    "toy": Case("toy", 2, 128),
    "toy-last1": Case("toy", 2, 128, trained_layers=1, remat="full"),
}


def make_batch(case, seed=0):
    """(the Batch as numpy, (query, key) pairs inside its documents)."""
    rng, vocab = np.random.default_rng(seed), SHAPES[case.shape]["vocab"]
    shape = (case.rows, case.length)
    batch = {k: np.zeros(shape, np.int32) for k in ("positions", "segments")}
    batch["tokens"] = rng.integers(1, vocab, shape, dtype=np.int32)
    batch["targets"] = np.roll(batch["tokens"], -1, 1)
    batch["weights"], pairs = np.zeros(shape, np.float32), 0
    for row in range(case.rows):
        start, segment = 0, 1
        while start < case.length:
            n = int(np.clip(rng.lognormal(6.3, 0.7), 8, case.length - start))
            n = case.length - start if case.length - start - n < 8 else n
            stop = start + n
            batch["segments"][row, start:stop], batch["positions"][row, start:stop] = (
                segment, np.arange(n),
            )  # fmt: skip
            batch["weights"][row, start + n // 2 : stop - 1] = 1  # the last predicts nothing
            pairs, start, segment = pairs + n * (n + 1) // 2, stop, segment + 1
    return batch, pairs


# ---- sftjax --------------------------------------------------------------------------------


def build(case, attention):
    """(model, trainable, dtypes of the parameters, the train step), without an array."""
    import jax.numpy as jnp
    import optax

    import sftjax
    from sftjax import params as params_lib
    from sftjax.models import decoder
    from sftjax.ops.rope import Rope

    config = decoder.Config(
        **SHAPES[case.shape], kinds=(decoder.Kind(rope=Rope(ROPE_THETA)),), dtype="bfloat16",
        attention=attention, remat=case.remat,
    )  # fmt: skip
    rules = [(".*", True)]
    if case.trained_layers:
        first = config.layers - case.trained_layers
        config = dataclasses.replace(config, split=(first,))
        rules = [(f"layers/{first}-.*", True), ("norm/.*", True), (".*", False)]
    model, tx = sftjax.Model(config), optax.adamw(1e-5)
    trainable = params_lib.match_rules(rules, model.abstract, "trainable")
    dtypes = params_lib.map_named(lambda _, on: jnp.dtype(case.dtype if on else "bfloat16"), trainable)
    loss_fn = sftjax.losses.causal_lm(model)
    return (
        model,
        trainable,
        tx,
        dtypes,
        functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx),
    )


def flops_needed(case):
    """Model FLOPs of one step."""
    from sftjax.models import flops

    model, trainable, *_ = build(case, "xla")
    batch, pairs = make_batch(case)
    count = flops.train_flops(model.config, trainable)
    return count(batch["tokens"].size, int(batch["weights"].sum()), lambda window: pairs)


def stand_in():
    """A context to lower a program in for an H100 that is not here."""
    import jax

    # Newer JAX lowers a Triton kernel for a kind that it is told; a mesh without axes is none.
    device = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def lower(case, attention=TRITON, platform="cuda", sharding=None):
    """The train step lowered for a platform that need not be here; from shapes alone.

    sharding: of every argument, for a device that is not here either.
    """
    import jax

    import sftjax
    from sftjax import params as params_lib

    model, trainable, tx, dtypes, step = build(case, attention)
    params = jax.tree.map(lambda x, d: jax.ShapeDtypeStruct(x.shape, d), params_lib.shapes(model.abstract), dtypes)
    create = functools.partial(sftjax.TrainState.create, tx=tx, trainable=trainable)
    state = jax.eval_shape(lambda p: create(params=p), params)
    batch = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, make_batch(case)[0]))
    state, batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch))
    with stand_in():
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        return traced.lower(lowering_platforms=(platform,))


def measure_sftjax(case, steps, attention, profile=""):
    """One process's measurement: seconds of each step, peak bytes, losses, facts.

    profile: a folder for a trace of two more steps, "" = none.
    """
    import jax

    import sftjax
    from sftjax import params as params_lib
    from sftjax.training import metrics as metrics_lib
    from sftjax.training import workdir

    attention = attention or (TRITON if jax.default_backend() == "gpu" else "blockwise")
    model, trainable, tx, dtypes, step = build(case, attention)
    leaves = params_lib.flatten(dtypes)

    @jax.jit
    def make(rng):
        whole = params_lib.init(model.abstract, rng)
        return params_lib.map_named(lambda name, x: x.astype(leaves[name]), whole)

    state = sftjax.TrainState.create(params=make(jax.random.key(0)), tx=tx, trainable=trainable)
    step = jax.jit(step, donate_argnums=0)
    batch = jax.device_put(make_batch(case)[0])
    began = time.perf_counter()
    state, metrics = step(state, batch)
    losses = [float(metrics["loss"])]
    first = time.perf_counter() - began
    seconds = []
    for _ in range(steps + 1):  # the first of them warms up
        began = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    peak, held_by = metrics_lib.peak_memory()
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(2):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
    return dict(
        seconds=seconds[1:], first_step=first, peak_bytes=peak, peak_of=held_by, losses=losses,
        device=jax.devices()[0].device_kind, attention=attention,
        environment=workdir.environment(),
    )  # fmt: skip


# ---- block sizes of the attention kernels --------------------------------------------------


def candidates():
    from benchmarks.triton_attention import Blocks

    for q, k in itertools.product((32, 64, 128), repeat=2):
        for warps, stages in itertools.product((4, 8), (1, 2, 3)):
            yield Blocks(q, k, warps, stages)


def tune(case, tries, kernels=range(3)):
    """[(kernel, Blocks, milliseconds forward and backward)] with the others' sizes as they are."""
    import jax
    import jax.numpy as jnp

    from benchmarks import triton_attention as gpu_attention
    from sftjax.ops.attention.asked import Extra, Options, Where

    shape, (batch, _) = SHAPES[case.shape], make_batch(case)
    H = shape["head_dim"]
    base = next(s for most, s in gpu_attention.SIZES.items() if most >= H)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (case.rows, case.length, n, H), jnp.bfloat16)
        for i, n in enumerate((shape["heads"], shape["kv_heads"], shape["kv_heads"]))
    )
    segments, positions = batch["segments"], batch["positions"]

    def loss(sizes, q, k, v):
        where, o = Where(segments, segments, positions, positions), Options(True, 0, 0.0, H**-0.5)
        out = gpu_attention.triton(q, k, v, Extra(), where, o, sizes)
        return jnp.sum(out, dtype=jnp.float32)

    def time_of(sizes):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, sizes), (0, 1, 2)))
        jax.block_until_ready(step(q, k, v))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(step(q, k, v))
            times.append(1e3 * (time.perf_counter() - began))
        return min(times)

    rows = [("as in the table", base, time_of(base))]
    for kernel, blocks in itertools.product(kernels, tries):
        sizes = (*base[:kernel], blocks, *base[kernel + 1 :])
        name = ("forward", "keys", "queries")[kernel]
        try:
            rows.append((name, blocks, time_of(sizes)))
        except Exception as e:  # too much shared memory, say: not a candidate
            print(f"{name} {blocks}: {str(e).splitlines()[0][:80]}")
    return sorted(rows, key=lambda row: (row[0], row[2]))


# ---- the table -----------------------------------------------------------------------------


def variants(platform):
    """{name: command of the child process}; torch's are those whose packages are installed."""
    here = Path(__file__).resolve()
    out = {"sftjax": [str(here), "--child"]}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        needs = {"sdpa": "torch", "flex_attention": "torch", "flash_attention_2": "flash_attn",
                 "flash_attention_3": "flash_attn_interface"}  # fmt: skip
        names = [n for n, package in needs.items() if importlib.util.find_spec(package)]
        names = names if platform == "gpu" else ["sdpa"]
        child = str(here.with_name("gpu_torch.py"))
        out |= {f"torch {name}": [child, f"--attention={name}"] for name in names}
    return out


def run_child(command, case, steps, timeout):
    """What the child measured, or {"error": why}."""
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    command = [sys.executable, *command, f"--cases={case}", f"--steps={steps}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {timeout} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1][:300] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def summary(name, case, found, reference):
    """One line of the table. found: this variant's runs; reference: sftjax's; by round."""
    from sftjax.training import metrics as metrics_lib

    good = [r for r in found if "error" not in r]
    if not good:
        return dict(variant=name, error=found[0]["error"])
    seconds = [statistics.median(r["seconds"]) for r in good]
    ratios = [
        statistics.median(theirs["seconds"]) / statistics.median(ours["seconds"])
        for theirs, ours in zip(found, reference, strict=True)
        if "error" not in theirs and "error" not in ours
    ]
    needed, middle = flops_needed(case), statistics.median(seconds)
    return dict(
        variant=name, seconds=seconds, tokens_per_s=case.rows * case.length / middle,
        mfu=metrics_lib.mfu(needed, middle, good[0]["device"], 1),
        peak_gib=max(r["peak_bytes"] for r in good) / 2**30, peak_of=good[0]["peak_of"],
        sftjax_speed=[min(ratios), statistics.median(ratios), max(ratios)] if ratios else None,
        first_loss=good[0]["losses"][0], failed=len(found) - len(good),
    )  # fmt: skip


def show(case_name, rows):
    print(f"\n{case_name:<24}{'tokens/s':>12}{'MFU':>8}{'peak GiB':>10}{'sftjax is faster by':>26}")
    for row in rows:
        if "error" in row:
            print(f"{row['variant']:<24}  {row['error']}")
            continue
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        ratio = row["sftjax_speed"]
        ratio = "{1:.2f} ({0:.2f}..{2:.2f})".format(*ratio) if ratio else "-"
        print(f"{row['variant']:<24}{row['tokens_per_s']:>12,.0f}{mfu:>8}{row['peak_gib']:>10.2f}{ratio:>26}")


def measure(case_name, rounds, steps, timeout, commands):
    case = CASES[case_name]
    found = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(run_child(command, case_name, steps, timeout))
    rows = [summary(name, case, runs, found["sftjax"]) for name, runs in found.items()]
    return dict(case=dataclasses.asdict(case), variants=rows, runs=found)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a process may take")
    parser.add_argument("--attention", default="", help="sftjax's backend; default our Triton kernels on a GPU")
    parser.add_argument("--profile", default="", help="with --child: a folder for a trace")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--child", action="store_true", help="measure sftjax in this process, print its JSON")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    real = [name for name, case in CASES.items() if case.shape != "toy"]
    cases = args.cases or (["toy", "toy-last1"] if args.toy else real)
    if args.profile and not args.child:
        parser.error("--profile traces one process: give --child too")
    if args.child:
        found = measure_sftjax(CASES[cases[0]], args.steps, args.attention, args.profile)
        print(json.dumps(found))
        return
    if args.tune:
        for kernel, blocks, ms in tune(CASES[cases[0]], list(candidates())):
            print(f"{kernel:<18}{ms:>10.3f} ms  {blocks}")
        return
    if args.toy:
        os.environ["JAX_PLATFORMS"] = "cpu"
    commands = variants("cpu" if args.toy else "gpu")
    if args.attention:
        commands["sftjax"].append(f"--attention={args.attention}")
    if len(commands) == 1:
        print("torch and transformers are not installed: sftjax is measured alone")
    results = {}
    for name in cases:
        results[name] = measure(name, args.rounds, args.steps, args.timeout, commands)
        show(name, results[name]["variants"])
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        value = dict(command=sys.argv, results=results)
        Path(args.out).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
