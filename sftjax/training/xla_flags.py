"""XLA's options for the training step, by platform: one table, for `train` and `plan` alike."""

import functools
import os
import re

import jax

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

TABLE: dict[str, dict[str, bool | int | str]] = {
    "tpu": {
        # Multiply by gathered weights, not by each device's small slice as it comes by: matmuls of 8B on v5e 4x4 need a
        # fifth fewer cycles (benchmarks/tpu_compile.py).
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
        # Vector memory for the tiles of one operation. By the compiler's cycles, matmuls of an 8B reach 73% of v5p's
        # peak with 16 MiB, the default, and 95% with 48 MiB.
        "xla_tpu_scoped_vmem_limit_kib": 48 * 1024,
        # Schedule other work between the start and the end of a collective.
        "xla_tpu_enable_latency_hiding_scheduler": True,
        # Let gathers and scatters run inside the fusions that they overlap, over several of them.
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        # Scatter on the SparseCores, beside all else; a v5e has none, and waits.
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
        "xla_disable_hlo_passes": "all-reduce-promotion"
    },
}

# Over several CPU devices, this schedule of older XLAs lets programs give other sums, or NaN, now and then: 70 of 300
# runs of one with jax 0.10.2, none of 600 without it, none with jax 0.12. It is read from XLA_FLAGS alone; as a compile
# option it is taken, and changes nothing.
RACES = "xla_cpu_enable_concurrency_optimized_scheduler"

# A collective on a CPU device blocks one of the threads that all devices of the process share. By default there are as
# many as devices, and two collectives at once may wait for ever. XLA takes this variable for its number of threads.
THREADS, THREADS_A_DEVICE = "NPROC", 16


def settle() -> None:
    """Set in the environment what can be set nowhere else, before the first device."""
    if jax.__version_info__ < (0, 12) and RACES not in yours():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{RACES}=false".strip()
    forced = yours().get("xla_force_host_platform_device_count", "0")
    own = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined] # as in workdir.py
    devices = max(int(forced) if forced.isdecimal() else 0, own)
    if devices > 1:
        os.environ.setdefault(THREADS, str(THREADS_A_DEVICE * devices))


def yours() -> dict[str, str]:
    """{option: value} of what the user has set in the environment."""
    given = " ".join(os.environ.get(variable, "") for variable in VARIABLES)
    return {name: value or "true" for name, value in re.findall(r"--(\w+)(?:=(\S+))?", given)}


@functools.cache
def known(platform: str, device: jax.Device | None = None) -> dict[str, tuple]:
    """{the table's option: its (name, value) in this XLA}, of those that this XLA knows.

    XLA lists its options nowhere, but refuses to compile with one that it does not know. A TPU's are known to the TPU's
    compiler alone: where no device is one, all are believed to be known.
    """
    found = {k: (k, v) for k, v in TABLE[platform].items()}
    if platform == "tpu" and device is None and jax.default_backend() != "tpu":
        return found
    while refused := _refused(dict(found.values()), device or jax.local_devices()[0]):
        key = next(k for k, (name, _) in found.items() if name == refused)
        newer = key.replace("enable_pipelined", "pipeline")  # in newer XLAs; that of JAX 0.11.1 is one
        if key == refused and newer != key:
            found[key] = (newer, "COLLECTIVE_PIPELINING_MODE_ON")
        else:
            del found[key]
    return found


def _refused(options, device) -> str | None:
    """The first of the options that XLA does not know."""
    try:
        with jax.set_mesh(jax.sharding.Mesh([device], "one")):  # which may be none of the caller's
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        name = re.search(r"No such compile option: '(\w+)'", str(error))
        if not name:
            raise
        return name[1]
    return None


def options(platform: str, device: jax.Device | None = None) -> dict:
    """The compile options of a platform, or a device elsewhere, that the user has not set."""
    own, table = yours(), known(platform, device)
    return {name: value for k, (name, value) in table.items() if not own.keys() & {k, name}}


def text(platform: str) -> str:
    """What is set, and what of it is left to the user or left out; "" for nothing."""
    own, table = yours(), known(platform)
    lines = [f"{name}={_show(value)}" for name, value in options(platform).items()]
    for k, v in TABLE[platform].items():
        name, value = table.get(k, (k, v))
        lines += [
            f"{x}={own[x]} is yours, and stays (here: {_show(value)})" for x in dict.fromkeys((k, name)) if x in own
        ]
        if k not in table:
            lines.append(f"{k}={_show(v)} is left out: this XLA does not know it")
    return "\n".join(lines)


def _show(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
