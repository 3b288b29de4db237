"""Model FLOPs of a training step, from the parameter tree: what MFU is a share of."""

from sftjax import params as params_lib
from sftjax.models import decoder

EMBEDDING = ("embed", "positions", "token_types", "embed_norm")


def train_flops(config: decoder.Config, trainable: dict):
    """A function (tokens, trained_tokens, pairs) -> model FLOPs of one training step.

    Forward 2 FLOPs per matmul weight and token; backward 2 more for the activations, down to the
    first trained parameter, and 2 more for each trained weight. Of experts, the chosen ones count.
    The head counts for trained tokens only; for a head of classes, these are the labels.
    pairs(window): (query, key) pairs of which the key is not the later one, summed over documents;
    each costs 4 * heads * head_dim FLOPs a layer forward and twice that backward. trainable: tree
    of bools like the parameters.
    """
    c, on = config, params_lib.flatten(trainable)
    reached = any(v for k, v in on.items() if k.split("/")[0] in EMBEDDING)
    per_token, per_pair = 0.0, {}
    for loop in range(c.loops):
        for name, n in decoder.stacks(c).items():
            here = reached or any(v for k, v in on.items() if k.startswith(f"layers/{name}/"))
            for key, p in params_lib.flatten(decoder.abstract(c)["layers"][name]).items():
                if key.endswith("/w"):
                    chosen = "expert" in p.axes
                    share = c.experts_per_token / c.experts if chosen else 1.0
                    each = 2 + 2 * here + 2 * on[f"layers/{name}/{key}"]
                    per_token += share * params_lib.count(p) * each
            kinds = decoder.period(c, name)
            for kind in kinds:
                for window in [kind.window, c.loop_window][: loop + 1]:
                    cost = 4 * c.heads * c.head_dim * n / len(kinds) * (3 if here else 1)
                    per_pair[window] = per_pair.get(window, 0.0) + cost
            reached = here
    head = _head(c, on)

    def flops(tokens, trained, pairs):
        attention = sum(cost * _seen(c, tokens, pairs(window)) for window, cost in per_pair.items())
        return per_token * tokens + head * trained + attention

    return flops


def _head(c, on) -> float:
    """FLOPs of the head for one token that it reads; all of it passes a gradient on."""
    if not c.classes and "head/w" not in on and not c.causal:
        return 0.0  # an encoder on its own
    if not c.classes:
        return c.vocab * c.width * (4 + 2 * on["embed/w" if c.tied else "head/w"])
    sizes = {"score/w": c.classes * c.width, "pooler/w": c.width * c.width}
    return sum(size * (4 + 2 * on[name]) for name, size in sizes.items() if name in on)


def _seen(c, tokens, pairs) -> float:
    """All pairs that see each other: in both directions, each but a token with itself is two."""
    return pairs if c.causal else 2 * pairs - tokens
