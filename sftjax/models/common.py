"""What the families share in reading a Hugging Face config.json."""

from sftjax.models.decoder import Kind
from sftjax.ops.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"


def refuse(hf: dict, **plain):
    """Raise ValueError for a field whose value is none of those of the plain model.

    plain: {field: value}; an absent or null field is plain.
    """
    for field, value in plain.items():
        if hf.get(field) not in (None, value):
            raise ValueError(f"{field}={hf[field]!r} is not supported, only {value!r}")


def rope(hf: dict, head_dim: int, theta: float = 10_000.0, partial: float = 1.0, of=None) -> Rope:
    """The Rope of a config: rope_parameters (transformers 5), or rope_scaling and rope_theta.

    theta, partial: the family's defaults. of: the settings of one layer type, where each has its
    own.
    """
    fields = of or hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    s = {("rope_type" if k == "type" else k): v for k, v in fields.items()}
    theta = s.pop("rope_theta", None) or hf.get("rope_theta") or theta
    share = s.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or partial
    longest, original = "max_position_embeddings", "original_max_position_embeddings"
    if longest in hf:
        s[longest] = hf[longest]
    if original in hf:
        s[original] = hf[original]
    elif s.get("rope_type") in ("yarn", "longrope") and longest in hf:
        s.setdefault(original, hf[longest])
    for k, v in s.items():
        s[k] = tuple(v) if isinstance(v, list) else v
    if s.get("rope_type", "default") == "default":
        s = {}
    dim = int(head_dim * share)
    return Rope(float(theta), 0 if dim == head_dim else dim, tuple(sorted(s.items())))


def kinds(hf: dict, types: list[str], rope: Rope, window_key="sliding_window") -> tuple[Kind, ...]:
    """A Kind for each layer type: the window is that of the sliding ones."""
    known = {FULL: 0, SLIDING: hf.get(window_key) or 0}
    for name in types:
        if name not in known:
            raise ValueError(f"layer type {name!r} is not supported; known: {', '.join(known)}")
    out = tuple(Kind(known[name], rope) for name in types)
    return out[:1] if len(set(out)) == 1 else out
