"""Renew compiled.json, what six compiled training steps need, and print what has changed.

    python tests/golden/make_compiled.py [CASE ...]

The cases for a TPU need libtpu (no TPU); without it their old figures stay. Each line that this
prints is a change to explain in the commit.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from sftjax import config as config_lib
from sftjax.plan import compile as plan
from sftjax.plan import hardware as targets
from sftjax.plan import hlo
from sftjax.training import metrics, xla_flags

xla_flags.settle()

FILE = Path(__file__).with_name("compiled.json")

LLAMA = dict(
    model_type="llama", vocab_size=1024, hidden_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=256,
)  # fmt: skip
MOE = LLAMA | dict(
    model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    norm_topk_prob=True,
)  # fmt: skip
GEMMA = LLAMA | dict(
    model_type="gemma3_text", sliding_window=64, query_pre_attn_scalar=64, rms_norm_eps=1e-6,
    max_position_embeddings=2048, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh",
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip

# name -> (target, config.json, changes of the default config)
CASES = {
    "cpu fsdp": ("here", LLAMA, {"model.remat": "full"}),
    "cpu data fsdp tensor": (
        "here",
        LLAMA,
        {"mesh.data": 2, "mesh.tensor": 2, "train.micro_batches": 2, "model.remat": "dots"},
    ),
    "cpu expert": ("here", MOE, {"mesh.expert": 2, "model.remat": "full"}),
    "cpu context": ("here", GEMMA, {"mesh.context": 2}),
    "tpu v5e fsdp": ("v5e:2x4", LLAMA, {"model.remat": "full", "model.attention": "splash"}),
    "tpu v6e slices": ("2xv6e:2x2", LLAMA, {"mesh.data": 2, "model.remat": "full"}),
}


def measure(name) -> dict:
    """One case, compiled."""
    target, model, changes = CASES[name]
    with tempfile.TemporaryDirectory() as where:
        Path(where, "config.json").write_text(json.dumps(model))
        config = config_lib.get_default()
        config.model.path, config.data.max_length, config.train.batch_size = where, 256, 16
        for key, value in changes.items():
            config_lib.override(config, key, str(value))
        program = plan.build(config, targets.resolve(target))
    compilations = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, _, **__: compilations.append(event))
    with plan.use(program.mesh):
        compiled = program.step.lower(program.state, program.batch).compile()
    text = compiled.as_text()
    cost = hlo.analyze(text, plan.rounds(text, program))
    return {
        "peak_bytes": metrics.peak_bytes(compiled),
        "flops": cost.flops,
        "compilations": compilations.count("/jax/core/compile/backend_compile_duration"),
        "asynchronous_bytes": sum(c.async_bytes for c in cost.collectives.values()),
        "collectives": {
            f"{kind} x{group}": [c.count, c.bytes] for (kind, group), c in sorted(cost.collectives.items())
        },
    }


def differences(old: dict, new: dict, tolerance=0.0) -> list:
    """Lines for what is in one only, or differs by more than this share."""
    lines, a, b = [], _flat(old), _flat(new)
    for key in sorted(a | b):
        if key not in a or key not in b:
            lines.append(f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}")
        elif abs(a[key] - b[key]) > tolerance * abs(a[key]):
            change = f" ({b[key] / a[key] - 1:+.1%})" if a[key] else ""
            lines.append(f"{key}: {a[key]:,.0f} -> {b[key]:,.0f}{change}")
    return lines


def _flat(tree, prefix="") -> dict:
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}, ")
        elif isinstance(value, list):
            out |= {f"{prefix}{key}, count": value[0], f"{prefix}{key}, bytes": value[1]}
        else:
            out[prefix + key] = value
    return out


def versions(name) -> str:
    """What a case's figures depend on beside our code."""
    from importlib.metadata import version

    packages = ["jax", "libtpu"] if name.startswith("tpu") else ["jax"]
    return ", ".join(f"{p} {version(p)}" for p in packages)


def main(names):
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names or CASES:
        try:
            new = {"versions": versions(name), **measure(name)}
        except (ImportError, targets.TargetError) as e:
            print(f"{name}: not measured: {e}")
            continue
        old = known.get(name, {})
        known[name] = new
        drop = lambda d: {k: v for k, v in d.items() if k != "versions"}  # noqa: E731
        for line in differences(drop(old), drop(new)) if old else ["new"]:
            print(f"{name}: {line}", flush=True)
        _write(known)


def _write(known):
    text = json.dumps({k: known[k] for k in CASES if k in known}, indent=1) + "\n"
    FILE.write_text(re.sub(r"\[\s+(\S+),\s+(\S+)\s+\]", r"[\1, \2]", text))


if __name__ == "__main__":
    main(sys.argv[1:])
