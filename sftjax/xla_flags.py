"""XLA's options for the training step, by platform: one table.

They go with the step as compile options, so that `plan` compiles what `train` runs, and XLA refuses
a name it does not know. An option that you set in XLA_FLAGS or LIBTPU_INIT_ARGS is left to you.
"""

import os
import re

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

TABLE: dict[str, dict[str, bool | int | str]] = {
    "tpu": {
        # Multiply by gathered weights, not by each device's small slice as it comes by: matmuls of
        # 8B on v5e 4x4 need a fifth fewer cycles (benchmarks/tpu_compile.py).
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
        # Vector memory for the tiles of one operation. By the compiler's cycles, matmuls of an 8B
        # reach 73% of v5p's peak with 16 MiB, the default, and 95% with 48 MiB.
        "xla_tpu_scoped_vmem_limit_kib": 48 * 1024,
        # Schedule other work between the start and the end of a collective.
        "xla_tpu_enable_latency_hiding_scheduler": True,
        # Let gathers and scatters run inside the fusions that they overlap, over several of them.
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        # Scatter on the SparseCores, beside all else; a v5e has none: see ops.gather.RINGS.
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    },
    "gpu": {
        # Schedule other work between the start and the end of a collective.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Start the next layer's gather while this one computes, and end the last one's scatter.
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
    },
    "cpu": {
        # It widens bfloat16 sums, and ends the process at those inside a shard_map of some axes.
        "xla_disable_hlo_passes": "all-reduce-promotion",
        # A step over eight forced devices, right on one, gave other sums each time it ran: never
        # without this schedule, with jax 0.10.2. It makes a step no faster.
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
    },
}


def yours() -> dict[str, str]:
    """{option: value} of what the user has set in the environment."""
    found = {}
    for variable in VARIABLES:
        for name, value in re.findall(r"--(\w+)(?:=(\S+))?", os.environ.get(variable, "")):
            found[name] = value or "true"
    return found


def options(platform: str) -> dict:
    """The compile options of a platform: the table's, without those that the user has set."""
    own = yours()
    return {k: v for k, v in TABLE[platform].items() if k not in own}


def text(platform: str) -> str:
    """What is set, and what of it is left to the user; "" for nothing."""
    own, table = yours(), TABLE[platform]
    lines = [f"{k}={str(v).lower()}" for k, v in options(platform).items()]
    lines += [
        f"{k}={own[k]} is yours, and stays (here: {str(v).lower()})"
        for k, v in table.items()
        if k in own
    ]
    return "\n".join(lines)
