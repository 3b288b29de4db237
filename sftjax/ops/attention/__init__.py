"""Attention: one function, a table of backends, each saying what it supports.

Segments are the single truth about which tokens may see each other: a query sees a key of its own segment at a position
not after its own. Positions restart in each document, so this one rule serves padded rows, packed rows and a KV cache
(where an unwritten slot has segment 0).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sftjax.errors import ConfigError
from sftjax.files import load_python
from sftjax.ops.attention import blockwise, splash
from sftjax.ops.attention.asked import NEG_INF, Extra, Options, Where, by_distance, mask
from sftjax.parallel import RULES, shard_map, spec


def xla(q: jax.Array, k: jax.Array, v: jax.Array, extra: Extra, where: Where, o: Options) -> jax.Array:
    """Reference: the whole score matrix, softmax in float32, grouped query heads."""
    more = None
    if extra.relative is not None:
        keys, queries = extra.relative
        more = of_distances(q, k, keys, queries, where, o)[:, :, None]
    # Turned first: XLA:CPU would turn them within each product, which takes 1.6 times as long.
    out = cached(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), extra, where, o, more)
    return checkpoint_name(out, "attention")


def cached(
    q: jax.Array, k: jax.Array, v: jax.Array, extra: Extra, where: Where, o: Options, more: jax.Array | None = None
) -> jax.Array:
    """As xla, with k [B, K, H, T] and v [B, K, T, H]: products of matrices as they lie. more: added to the scores."""
    B, S, N, H = q.shape
    K, T = k.shape[1], k.shape[3]
    G = N // K
    q = q.reshape(B, S, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * S, H)
    scores = (jnp.matmul(q, k, preferred_element_type=jnp.float32) * o.scale).reshape(B, K, G, S, T)
    probs = _probs(scores if more is None else scores + more, extra, where, o).astype(v.dtype)
    out = jnp.matmul(probs.reshape(B, K, G * S, T), v)
    return out.reshape(B, K, G, S, H).transpose(0, 3, 1, 2, 4).reshape(B, S, N, H)


def of_distances(
    q: jax.Array, k: jax.Array, keys: jax.Array, queries: jax.Array, where: Where, o: Options
) -> jax.Array:
    """What DeBERTa adds to the scores: float32 [B, N, S, T] (He et al. 2021, arXiv 2006.03654).

    Of q [B, S, N, H] and k [B, T, N, H]: each query times the key of a distance, and each key times its query; keys and
    queries [R, N, H] are those of R distances, the middle one 0. Half of them are one distance each, the others ever
    more, up to o.furthest.
    """
    span = len(keys) // 2
    mid = span // 2
    far = np.arange(o.furthest + 1, dtype=np.float32)
    with np.errstate(divide="ignore"):
        wide = np.log(far / mid) / np.log(np.float32((o.furthest - 1) / mid)) * (mid - 1)
    table = np.where(far <= mid, far, np.ceil(wide) + mid).astype(np.int32)
    behind = where.q_pos[:, :, None] - where.kv_pos[:, None]
    place = jnp.sign(behind) * jnp.asarray(table)[jnp.minimum(jnp.abs(behind), o.furthest)]
    place = jnp.clip(place + span, 0, 2 * span - 1)[:, None]  # [B, 1, S, T]
    f32 = dict(preferred_element_type=jnp.float32)
    of_queries = jnp.einsum("bsnh,rnh->bnsr", q, keys, **f32)
    of_keys = jnp.einsum("btnh,rnh->bntr", k, queries, **f32)
    out = jnp.take_along_axis(of_queries, place, -1)
    other = jnp.take_along_axis(of_keys, jnp.swapaxes(place, 2, 3), -1)
    return (out + jnp.swapaxes(other, 2, 3)) * o.scale


def _probs(scores, extra, where, o):
    """The softmax of scaled scores [B, K, G, S, T]."""
    T = scores.shape[-1]
    if o.softcap:
        scores = o.softcap * jnp.tanh(scores / o.softcap)
    if extra.distances is not None:
        scores += by_distance(extra.distances.astype(jnp.float32).reshape(*scores.shape[1:3], -1), where, o)
    seen = mask(where, o.causal, o.window)  # [B, S, T]
    scores = jnp.where(seen[:, None, None], scores, NEG_INF)
    if extra.sinks is not None:
        sink = extra.sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], -1)
    return jax.nn.softmax(scores, axis=-1)[..., :T]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute attention: its function, called as `xla` is, and what it supports."""

    fn: Callable
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    features: frozenset = frozenset("segments window softcap sinks bidirectional distances relative cross sees".split())
    multiple: int = 1  # of which a shard's part of a row has to be


BLOCKS = Backend.features - {"relative"}
KERNEL = BLOCKS - {"distances", "cross", "sees"}
BACKENDS = {
    "xla": Backend(xla),
    "blockwise": Backend(blockwise.blockwise, features=BLOCKS),
    "splash": Backend(splash.splash, ("tpu",), KERNEL, multiple=128),
}


@functools.cache
def named(name: str) -> Backend:
    """A row of BACKENDS, or the Backend of a file of the user's, "path/to/file.py:NAME".

    Raises: ConfigError for one that is not there.
    """
    path, _, own = name.rpartition(":")
    found = getattr(load_python(path, f"model.attention={name!r}"), own, None) if path else None
    found = found or BACKENDS.get(name)
    if not isinstance(found, Backend):
        raise ConfigError(
            f"model.attention={name!r} is unknown; the backends are {', '.join(BACKENDS)}, and your"
            " own is a Backend named as 'path/to/file.py:NAME'"
        )
    return found


def check(backend: str, features: Iterable[str] = (), platform: str = "", length: int = 0) -> None:
    """Raise ConfigError unless `backend` exists and can do what is asked of it.

    features: what it must support; platform: where it runs, "" = here; length: the tokens of a row that a shard of
    mesh.context holds, 0 = any.
    """
    own = named(backend)
    if missing := set(features) - own.features:
        able = " or ".join(name for name, b in BACKENDS.items() if set(features) <= b.features)
        raise ConfigError(
            f"attention backend {backend!r} does not support {sorted(missing)}; set model.attention to {able}"
        )
    platform = platform or jax.default_backend()
    if platform not in own.platforms:
        here = [name for name, b in BACKENDS.items() if platform in b.platforms]
        raise ConfigError(f"model.attention={backend!r} does not run on {platform}; set one of {', '.join(here)}")
    if length % own.multiple:
        raise ConfigError(
            f"model.attention={backend!r} takes rows of a multiple of {own.multiple} tokens on each shard of"
            f" mesh.context, found {length}; change data.max_length and data.buckets, or set model.attention='xla'"
        )


@jax.named_scope("attention")  # so that a trace says what belongs to it
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: jax.Array,
    positions: jax.Array,
    kv_segments: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    sees: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    distances: jax.Array | None = None,
    relative: tuple[jax.Array, jax.Array] | None = None,
    furthest: int = 0,
    backend: str = "blockwise",
    from_cache: bool = False,
) -> jax.Array:
    """Softmax attention. q [B, S, N, H], k and v [B, T, K, H] with K dividing N -> [B, S, N, H].

    from_cache: k is [B, K, H, T] and v [B, K, T, H], as a cache holds them.
    segments, positions: int32 [B, S] of the queries; kv_* [B, T] of the keys (the queries' own when None). sees: int32
    [B, S], the last position that each query sees where causal; None = its own. window: a query sees itself and
    window-1 keys before it, and as many after it where not causal; 0 = all. softcap: 0 = none. scale: of the scores;
    None = H^-0.5. sinks [N]: a score of each head that takes its share of the softmax and gives nothing. distances [N,
    buckets]: what is added to a score by the distance of its key, in buckets as T5's up to `furthest`; not together
    with a softcap. relative: keys and queries [R, N, H] of distances up to `furthest`, as
    DeBERTa has them. ConfigError where the backend cannot.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, extra = Options(causal, window, softcap, scale, furthest), Extra(sinks, distances, relative)
    asked = {k for k, x in (extra._asdict() | {"cross": kv_segments, "sees": sees}).items() if x is not None}
    kv_segments = segments if kv_segments is None else kv_segments
    kv_positions = positions if kv_positions is None else kv_positions
    where = Where(segments, kv_segments, positions, kv_positions, sees)
    if softcap and distances is not None:
        raise ValueError("attention: distances and a softcap do not go together")
    if from_cache:
        return cached(q, k, v, extra, where, o)
    if asked - named(backend).features:
        check(backend, asked)
    run = functools.partial(named(backend).fn, o=o)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, extra, where)
    rows = spec(("batch", "seq"))
    heads, keys = spec(("batch", "seq", "heads", None)), spec(("batch", "seq", "kv_heads", None))
    axes = Extra(("heads",), ("heads",), (None, "heads"))
    each = Extra(*(None if x is None else spec(a) for x, a in zip(extra, axes, strict=True)))
    return shard_map(functools.partial(_shard, run), (heads, keys, keys, each, rows), heads)(q, k, v, extra, where)


def _shard(run, q, k, v, extra, where):
    """One device's rows, heads and queries, with the keys of the whole `context` axis."""
    k, v, kv_seg, kv_pos = (
        jax.lax.all_gather(x, RULES["seq"], axis=1, tiled=True) for x in (k, v, where.kv_seg, where.kv_pos)
    )
    return run(q, k, v, extra, where._replace(kv_seg=kv_seg, kv_pos=kv_pos))
