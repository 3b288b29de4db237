"""Schedules and optimizers by name, and the ordered regex rules that differ per parameter.

An optimizer here is the part that turns a gradient into a direction; clipping, weight decay, per-parameter
learning-rate multipliers and the schedule are put around it alike for all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sftjax import params as params_lib
from sftjax.errors import ConfigError
from sftjax.ops.adam8 import scale_by_adam_8bit

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")


def schedule(name: str, lr: float, total: int, warmup: int = 0, decay: int = 0, floor: float = 0.0) -> optax.Schedule:
    """A function step -> float32 learning rate.

    It rises linearly from 0 at step 0 to lr at step `warmup`, then follows the named shape until `total`; floor is the
    lowest share of lr; decay is the length of wsd's last phase, in steps. The formulas are those of transformers.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"optim.schedule={name!r}; known: {', '.join(SCHEDULES)}")
    steps = max(total - warmup, 1)

    def at(step):
        step = jnp.asarray(step, jnp.float32)
        t = jnp.clip(step - warmup, 0, steps)
        factor: jax.Array | float = 1.0
        match name:
            case "linear":
                factor = 1 - (1 - floor) * t / steps
            case "cosine":
                factor = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * t / steps))
            case "inverse_sqrt":
                factor = jnp.maximum(jnp.sqrt(max(warmup, 1) / (t + max(warmup, 1))), floor)
            case "wsd":  # stable, then a linear decay over the last `decay` steps
                factor = 1 - (1 - floor) * jnp.clip((t - (steps - decay)) / max(decay, 1), 0, 1)
        return lr * jnp.where(step < warmup, step / max(warmup, 1), factor)

    return at


def _muon(c, abstract):
    """Muon for the matrices inside the layers, Adam for embeddings, head, norms and biases.

    consistent_rms 0.2 gives Muon's update the size of Adam's, so that one lr serves both
    (Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982).
    """
    dims = {name: _matrix(p) for name, p in params_lib.flatten(abstract).items()}
    muon = optax.contrib.muon(
        1.0,
        beta=c.momentum,
        adam_b1=c.b1,
        adam_b2=c.b2,
        eps=c.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda p: params_lib.map_named(lambda n, _: dims[n], p),
    )
    return optax.chain(muon, optax.scale(-1.0))  # undo its sign: here it is a direction


def _matrix(p):
    """Which dimensions of a stacked weight are its input and its output; None = not a matrix."""
    if p.axes[:1] != ("layers",) or p.inputs is None:
        return None
    dims = range(1, len(p.axes))
    inputs = tuple(i for i in dims if p.axes[i] in (*p.inputs, "expert"))
    return optax.contrib.MuonDimensionNumbers(inputs, tuple(i for i in dims if i not in inputs))


EMBEDDINGS = ("embed", "positions", "token_types", "embed_norm")
OPTIMIZERS: dict[str, Callable[[ConfigDict, Any], optax.GradientTransformation]] = {
    "adamw": lambda c, abstract: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "adam": lambda c, abstract: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "sgd": lambda c, abstract: optax.trace(c.momentum) if c.momentum else optax.identity(),
    "lion": lambda c, abstract: optax.scale_by_lion(c.b1, c.b2),
    "adafactor": lambda c, abstract: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    ),
    "muon": _muon,
    "adamw8": lambda c, abstract: scale_by_adam_8bit(c.b1, c.b2, c.eps),
}


def make(c: ConfigDict, lr: optax.Schedule, abstract: Any, trainable: Any) -> optax.GradientTransformation:
    """The optax transformation of config.optim, for the trained part of the parameters.

    lr: step -> learning rate. abstract: the whole tree of Params, whose names the rules of c.lr_multipliers and c.decay
    match. trainable: tree of bools. Decay is decoupled: lr * multiplier * weight_decay * factor * parameter is taken
    off, for every optimizer but adam.
    """
    if c.name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={c.name!r}; known: {', '.join(OPTIMIZERS)}")
    if c.name == "adam" and c.weight_decay:
        raise ConfigError("optim.name='adam' has no weight decay; use 'adamw', or weight_decay=0")

    def factors(rules, what):
        tree = params_lib.match_rules(rules, abstract, what)
        return params_lib.partition(tree, trainable)[0]

    def each(fn, tree):
        return optax.stateless(lambda u, p: jax.tree.map(fn, u, p, tree))

    multipliers = factors(c.lr_multipliers, "optim.lr_multipliers")
    parts = [optax.clip_by_global_norm(c.clip)] if c.clip else []
    parts.append(OPTIMIZERS[c.name](c, abstract))
    if c.weight_decay:
        decay = factors(c.decay, "optim.decay")
        parts.append(each(lambda u, p, f: u + c.weight_decay * f * p, decay))
    if not any(jax.tree.leaves(multipliers)):
        raise ConfigError("optim.lr_multipliers: 0 for all that is trained; nothing would change")
    if any(m != 1 for m in jax.tree.leaves(multipliers)):
        parts.append(each(lambda u, p, m: u * m, multipliers))
    if c.layer_decay != 1:
        depth = params_lib.partition(_by_depth(c.layer_decay, abstract), trainable)[0]
        parts.append(each(lambda u, p, m: u * m, depth))
    parts.append(optax.scale_by_learning_rate(lr))
    return optax.chain(*parts)


def _by_depth(decay, abstract):
    """Tree of factors: 1 of the last layer and what follows it, decay less with each below.

    The embeddings lie below the first layer (Howard and Ruder 2018, Clark et al. 2020).
    """
    stacks = abstract.get("layers", {}) if isinstance(abstract, dict) else {}
    layers = 1 + max((int(name.split("-")[1]) for name in stacks), default=-1)
    if not layers:
        raise ConfigError(f"optim.layer_decay={decay}: the model has no stack of layers")

    def factor(name, p):
        top, *rest = name.split("/")
        if top == "layers":
            ahead = layers - 1 - int(rest[0].split("-")[0]) - jnp.arange(p.shape[0])
            return decay ** ahead.astype(jnp.float32).reshape(-1, *[1] * (len(p.shape) - 1))
        return decay**layers if top in EMBEDDINGS else 1.0

    return params_lib.map_named(factor, abstract)
