"""Model FLOPs of a training step, from the parameter tree: what MFU is a share of."""

import math
from collections.abc import Callable
from typing import Any

from sftjax import params as params_lib
from sftjax.models import decoder

EMBEDDING = ("embed", "patches", "positions", "token_types", "embed_norm")


def train_flops(
    config: decoder.Config, trainable: dict, abstract: dict | None = None, reached: bool = False
) -> Callable[[float, float, Callable], float]:
    """A function (tokens, trained_tokens, pairs) -> model FLOPs of one training step.

    Forward 2 FLOPs per matmul weight and token; backward 2 more for the activations, down to the first trained
    parameter, and 2 more for each trained weight. Of experts, the chosen ones count. The head counts for trained tokens
    only; for a head of classes, these are the labels. pairs(window): (query, key) pairs of which the key is not the
    later one, summed over documents; each costs 4 * heads * head_dim FLOPs a layer forward and twice that backward.
    trainable: tree of bools like the parameters. abstract: the tree of Params, whose `inputs` say which are matmul
    weights; the default is the config's own. reached: is something trained before the embedding.
    """
    c, on = config, params_lib.flatten(trainable)
    abstract = decoder.abstract(c) if abstract is None else abstract
    names = [n for n in EMBEDDING if n in abstract]
    reached |= any(v for k, v in on.items() if k.startswith(tuple(f"{n}/" for n in names)))
    per_token, per_pair = 0.0, dict[int, float]()
    for name in names:  # rows are looked up; what they are multiplied by then
        for key, p in matrices(abstract[name], f"{name}/"):
            if "vocab" not in p.axes:
                per_token += params_lib.count(p) * (2 + 2 * reached + 2 * on[key])
    for loop in range(c.loops):
        for name, n in decoder.stacks(c).items():
            prefix = f"layers/{name}/"
            here = reached or any(v for k, v in on.items() if k.startswith(prefix))
            for key, p in matrices(abstract["layers"][name], prefix):
                share = c.experts_per_token / c.experts if "expert" in p.axes else 1.0
                per_token += share * params_lib.count(p) * (2 + 2 * here + 2 * on[key])
            kinds = decoder.period(c, name)
            for kind in kinds:
                for window in [kind.window, c.loop_window][: loop + 1]:
                    cost = 4 * c.heads * c.head_dim * n / len(kinds) * (3 if here else 1)
                    per_pair[window] = per_pair.get(window, 0.0) + cost
            reached = here
    head = head_flops(c, trainable, abstract, c.vocab)

    def flops(tokens, trained, pairs):
        # In both directions, each pair but a token with itself is two.
        seen = pairs if c.causal else lambda window: 2 * pairs(window) - tokens
        return per_token * tokens + head * trained + sum(cost * seen(window) for window, cost in per_pair.items())

    return flops


def head_flops(config: decoder.Config, trainable: dict, abstract: dict, rows: int) -> int:
    """Of one trained token: the head, forward and backward; of a vocabulary, `rows` rows of it.

    All of it passes a gradient on. 0 for an encoder on its own.
    """
    on, total = params_lib.flatten(trainable), 0
    vocabulary = "embed" if config.tied and config.head == "vocabulary" else "head"
    for name in ("score" if config.classes else vocabulary, "pooler"):
        for key, p in matrices(abstract.get(name, {}), f"{name}/"):
            size = math.prod(rows if axis == "vocab" else n for n, axis in zip(p.shape, p.axes, strict=True))
            total += size * (4 + 2 * on[key])
    return total


def matrices(abstract: dict, prefix: str) -> list[tuple[str, Any]]:
    """(name, Param) of the matmul weights in a part of the tree whose names begin with `prefix`."""
    named = params_lib.flatten(abstract).items()
    return [(prefix + key, p) for key, p in named if p.inputs is not None]
