"""A training step of benchmarks/gpu.py compiled for an H100 that is not here: memory and bytes.

    pip install 'jax[cuda13]'        on a machine without a GPU
    python benchmarks/gpu_compile.py [--cases ...] [--attention ...] [--remat ...] [--hlo=DIR]

XLA compiles for a description of the card (gpu_h100.txtpb); what it would have timed on the card
(which matmul kernel) it leaves at a default. Printed are what the step's arguments and temporaries
take, and, for the operations outside of the loop over layers, the bytes that they read and write:
the optimizer and its norms, mostly.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu import CASES, TRITON, lower

GIB = 2**30
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
FREE = "get-tuple-element bitcast parameter constant tuple while fusion-done copy-done".split()


def topology():
    """One H100 as JAX sees it, from its description."""
    from jax.experimental import topologies

    text = Path(__file__).with_name("gpu_h100.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", topology_name="", target_config=text, topology="1x1x1")


def mosaic_here():
    """tokamax's kernels, where it is installed, believe that they run on a Hopper."""
    from tokamax import config
    from tokamax._src import gpu_utils

    gpu_utils._cc_between = lambda low, high, device=None: low <= 9.0 < high
    return config.cross_compile(True)


def compile_step(case, attention):
    """The compiled step, and the seconds that it took."""
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(topology().devices), "x")
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tokamax = importlib.util.find_spec("tokamax")
    with mosaic_here() if tokamax else contextlib.nullcontext():
        lowered = lower(case, attention, sharding=one)
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def size(shape):
    """Bytes of all arrays in the text of a shape."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([0-9,]*)\]", shape):
        n = SIZES.get(dtype, 0)
        for d in filter(None, dims.split(",")):
            n *= int(d)
        total += n
    return total


def moved(hlo):
    """Bytes read and written by the operations of the entry computation, loops not counted."""
    held, total = {}, 0
    for line in hlo[hlo.index("ENTRY ") :].splitlines():
        m = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if not m:
            continue
        name, shape, op, rest = m.groups()
        held[name] = size(shape)
        if op not in FREE:
            used = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            total += held[name] + sum(held.get(x, 0) for x in used)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["1B-4096"])
    parser.add_argument("--attention", default="", help="default: our Triton kernels")
    parser.add_argument("--remat", default="", help="default: the case's")
    parser.add_argument("--hlo", default="", help="a folder for the programs' texts")
    args = parser.parse_args()
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        parser.error("JAX's compiler for GPUs is not installed: pip install 'jax[cuda13]'")
    for name in args.cases:
        case = CASES[name]
        case = dataclasses.replace(case, remat=args.remat or case.remat)
        compiled, seconds = compile_step(case, args.attention or TRITON)
        m, text = compiled.memory_analysis(), compiled.as_text()
        print(
            f"{name:<16} remat {case.remat:<10}"
            f" arguments {m.argument_size_in_bytes / GIB:6.2f} GiB,"
            f" temporaries {m.temp_size_in_bytes / GIB:6.2f} GiB, outside of loops"
            f" {moved(text) / GIB:7.1f} GiB moved; compiled in {seconds:.0f} s",
            flush=True,
        )
        if args.hlo:
            Path(args.hlo).mkdir(parents=True, exist_ok=True)
            Path(args.hlo, f"{name}_{case.remat}.hlo").write_text(text)


if __name__ == "__main__":
    main()
