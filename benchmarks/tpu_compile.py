"""The training step compiled for TPU slices that are not here: memory, cycles, collectives.

    python benchmarks/tpu_compile.py [--runs=8B-v5e,8B-v5p,1B-v5e] [--trained=1.0] [--out=...]

Needs the extra `tpu`, no TPU. Each run is the whole step of full fine-tuning with AdamW, rows of
4096 tokens, weights, moments and matmuls in bfloat16, splash attention, and is compared with what
MaxText 0.2.5 and Tunix 0.1.7 need for the same work, compiled the same way (jax 0.12.0.1, libtpu
0.0.51; MaxText through its train_compile with its settings for supervised fine-tuning and full
remat, Tunix its own train step; both with the compiler's defaults, sftjax with xla_flags.TABLE. Of
that the vector memory counts most: without it 8B needs 0.88x of MaxText's cycles on v5p).

peak     bytes of a device, as the compiler counts them: arguments + temporaries + outputs - those
         that share memory. Held by remat=offload: "full", with the residual stream before each
         half of a layer on the host.
cycles   the compiler's own estimate, over the clock: the loops' bodies as often as they run. The
         loss takes as many chunks as there are trained tokens; the count assumed is printed. They
         hold neither attention kernels, whose own FLOPs are apart, nor collectives.
wire     what a device sends, against the least that fsdp can do: two gathers of the weights and one
         scatter of their gradients. async: the share that runs beside other work.

The larger runs (8B-v5e-256, 70B-v5p, 70B-4xv6e) are scale on paper: the projection of `plan`, with
its assumptions.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from sftjax import config as config_lib
from sftjax import hf
from sftjax import params as params_lib
from sftjax.plan import compile as plan
from sftjax.plan import hardware as targets
from sftjax.training import workdir

LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, rms_norm_eps=1e-5,
    num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0,
    max_position_embeddings=131072, dtype="bfloat16",
)  # fmt: skip
MODELS = {
    "8B": LLAMA | dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336),
    "1B": LLAMA
    | dict(
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "70B": LLAMA | dict(hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64),
}


@dataclasses.dataclass(frozen=True)
class Run:
    model: str
    target: str
    rows: int
    length: int = 4096
    mesh: tuple = ()
    peers: tuple = ()  # (name, peak GiB, estimated s) of the same work


RUNS = {
    "8B-v5e": Run("8B", "v5e:4x4", 16, peers=(("MaxText full", 6.96, 2.21), ("Tunix", 12.88, 3.32))),
    "8B-v5p": Run("8B", "v5p:2x2x2", 16, peers=(("MaxText full", 12.70, 1.67), ("Tunix", 43.24, 2.79))),
    "1B-v5e": Run("1B", "v5e:2x4", 32, peers=(("MaxText full", 10.57, 1.78), ("Tunix", 14.69, 4.04))),
    "8B-v5e-256": Run("8B", "v5e:16x16", 256, mesh=(("data", 16), ("fsdp", 16))),
    "70B-v5p": Run("70B", "v5p:8x8x4", 512, mesh=(("data", 4), ("fsdp", 64))),
    "70B-4xv6e": Run("70B", "4xv6e:16x16", 2048, mesh=(("data", 16), ("fsdp", 64))),
}


def config_of(run, folder, remat):
    file = Path(folder) / f"{run.model}.json"
    file.write_text(json.dumps(MODELS[run.model]))
    c = config_lib.get_default()
    c.model.path, c.model.init = str(file), "random"
    c.model.param_dtype, c.model.attention, c.model.remat = "bfloat16", "splash", remat
    c.data.max_length, c.train.batch_size = run.length, run.rows
    for axis, size in run.mesh:
        c.mesh[axis] = size
    return c


def measure(name, run, trained, remat, folder):
    target = targets.resolve(run.target)
    p = plan.plan(config_of(run, folder, remat), target, trained)
    cost, seconds = p.cost, p.cost.total_cycles / (target.chip.clock * 1e9)
    kernels = p.hardware_flops / target.n - cost.flops
    weights = 2 * params_lib.count(hf.load_model(str(Path(folder) / f"{run.model}.json")).abstract)
    parts = p.mesh["fsdp"]
    least = 3 * weights * (parts - 1) / parts
    wire = sum(c.wire for c in cost.collectives.values())
    return dict(
        run=name,
        target=p.target,
        mesh=p.mesh,
        remat=remat,
        trained=trained,
        peak_gib=p.total / 2**30,
        memory=p.memory,
        chunks_assumed=max([loop.trips for loop in cost.loops if not loop.known], default=0),
        cycles_s=seconds,
        tflop=cost.flops / 1e12,
        kernel_tflop=kernels / 1e12,
        kernel_s_at_peak=kernels / target.chip.flops,
        wire_gb=wire / 1e9,
        fsdp_least_gb=least / 1e9,
        wire_over_least=wire / least,
        async_share=cost.async_share,
        compile_s=p.seconds,
        projection=p.time,
        collectives={f"{kind} over {n}": dataclasses.asdict(c) for (kind, n), c in cost.collectives.items()},
        ratios={peer: dict(peak=p.total / 2**30 / gib, cycles=seconds / s) for peer, gib, s in run.peers},
    )


def show(r):
    print(
        f"{r['run']:<12}{r['peak_gib']:>9.2f} GiB{r['cycles_s']:>9.3f} s{r['tflop']:>9.0f} TFLOP"
        f"{r['kernel_tflop']:>7.0f} in kernels{r['wire_gb']:>8.1f} GB sent ="
        f" {r['wire_over_least']:.2f} of the least, {r['async_share']:.0%} async;"
        f" {r['chunks_assumed']} chunks of the loss; compiled in {r['compile_s']:.0f} s"
    )
    for peer, ratio in r["ratios"].items():
        print(f"{'':12}against {peer}: peak {ratio['peak']:.2f}x, cycles {ratio['cycles']:.2f}x")
    if p := r["projection"]:
        print(
            f"{'':12}projected step {p['step']:.2f} s, MFU {p['mfu']:.1%},"
            f" {p['trained_tokens_per_s']:,.0f} trained tokens/s"
        )
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="8B-v5e,8B-v5p,1B-v5e")
    parser.add_argument("--trained", type=float, default=1.0, help="share of the tokens")
    parser.add_argument("--remat", default="offload")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    results = []
    for name in args.runs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(name, RUNS[name], args.trained, args.remat, folder))
        show(results[-1])
        if args.out:  # after each: a run takes minutes
            facts = dict(environment=workdir.environment(), results=results)
            Path(args.out).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
