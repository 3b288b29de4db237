"""Which block sizes of splash attention a TPU can take, and on a TPU, how fast each is.

    python benchmarks/splash_blocks.py [--targets=v5e:2x2,v5p:2x2x1,v6e:2x2] [--length=4096]

Forward and backward of one causal row with segments, for each width of a head and block size.
Without a TPU it is compiled ahead of time (the extra `tpu`): a size that needs more vector memory
than the chip has is refused by the compiler. On a TPU each is timed too. For the table BLOCKS in
sftjax/ops/attention/splash.py.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax.ops.attention import splash
from sftjax.ops.attention.asked import Options, Where
from sftjax.plan import hardware as targets
from sftjax.training import workdir

HEADS = 4


def step(q, k, v, seg):
    def total(q, k, v):
        where, o = Where(seg, seg, None, None), Options(True, 0, 0.0, q.shape[-1] ** -0.5)
        out = splash.splash(q, k, v, None, where, o)
        return jnp.sum(out.astype(jnp.float32))

    return jax.grad(total, (0, 1, 2))(q, k, v)


def measure(device, width, size, length):
    """ "fits", seconds on a present TPU, or the compiler's refusal."""
    splash.BLOCKS = {width: (size, size)}
    where = NamedSharding(Mesh([device], ("x",)), P())
    shape = jax.ShapeDtypeStruct((1, length, HEADS, width), jnp.bfloat16, sharding=where)
    seg = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=where)
    try:
        compiled = jax.jit(step).lower(shape, shape, shape, seg).compile()
    except jax.errors.JaxRuntimeError as e:
        if "vmem" not in str(e).lower():
            raise
        return "too large"
    if device not in jax.devices():
        return "fits"
    args = [jax.device_put(jnp.ones(s.shape, s.dtype), device) for s in (shape,) * 3 + (seg,)]
    jax.block_until_ready(compiled(*args))
    began = time.perf_counter()
    for _ in range(10):
        out = compiled(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default="v5e:2x2,v5p:2x2x1,v6e:2x2")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--sizes", default="512,1024,2048")
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    here = jax.default_backend() == "tpu"
    rows = []
    for target in ["here"] if here else args.targets.split(","):
        device = jax.devices()[0] if here else targets.resolve(target).devices[0]
        for width in map(int, args.widths.split(",")):
            for size in map(int, args.sizes.split(",")):
                found = measure(device, width, size, args.length)
                rows.append(dict(target=target, width=width, block=size, result=found))
                print(f"{target:<14} heads of {width:<5} blocks of {size:<6} {found}", flush=True)
    if args.out:
        with open(args.out, "w") as f:
            json.dump(dict(environment=workdir.environment(), results=rows), f, indent=2)


if __name__ == "__main__":
    main()
