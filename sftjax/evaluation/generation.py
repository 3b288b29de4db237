"""Batched sampling with a key/value cache: one prefill, then one token a step for all rows."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from sftjax import parallel
from sftjax.data.packing.pack import pad_to_multiple
from sftjax.errors import ConfigError, DataError, ModelError
from sftjax.models import decoder
from sftjax.models.base import Model
from sftjax.ops import rope
from sftjax.parallel import processes

BUCKET = 32  # prompts are padded to a multiple of this, so that few shapes are compiled
WORKERS = 2  # batches under way at once on a CPU
# So that no two of them compile the same program.
_COMPILING, _COMPILED = threading.Lock(), set[tuple]()
PART = 16  # tokens of the prompts that are read at once
NEVER = -1e9  # the score of what is no answer


def sample(logits: jax.Array, rng: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """int32 [B] token ids from float32 logits [B, V]; temperature 0 is greedy.

    top_k keeps the k likeliest tokens (0 = all); top_p the fewest whose probability reaches p.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        order = jnp.sort(logits, axis=-1)[:, ::-1]
        probs = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
        kept = before < max(top_p, 1e-6)  # the likeliest at least
        least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


def _prefill(model, params, tokens, lengths, cache, beside):
    """The cache with the prompts, and the hidden state of the last token of each.

    In parts, so that one compiled program costs what the longest prompt needs and not its width.
    """
    reads = beside or getattr(model.config, "prefix", False)
    inserted = model.inserted(params, {"tokens": tokens, **beside}) if reads else None
    # A rotation that depends on a prompt's length has to know it from the first token on.
    kinds = model.config.kinds
    whole = any(kind.rope is not None and kind.rope.kind in rope.BY_LENGTH for kind in kinds)
    whole |= inserted is not None and inserted.sees is not None  # a token of an image sees all of it
    part = tokens.shape[1] if whole else math.gcd(tokens.shape[1], PART)
    start = jnp.zeros((len(tokens), model.config.width), model.config.dtype)

    def body(i, carry):
        cache, last = carry
        positions = jnp.broadcast_to(i * part + jnp.arange(part), (len(tokens), part))
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * part, slice_size=part, axis=1)
        images = [jax.tree.map(cut, inserted)] if reads else []
        own = dict(tokens=cut(tokens), positions=positions, segments=segments)
        hidden, cache = model.decode(params, cache, own, *images)
        at = (lengths - 1 - i * part)[:, None]
        found = jnp.take_along_axis(hidden, jnp.clip(at, 0, part - 1)[..., None], axis=1)[:, 0]
        return cache, jnp.where((at >= 0) & (at < part), found, last)

    return jax.lax.fori_loop(0, -(-jnp.max(lengths) // part), body, (cache, start))


def _take(x, index):
    """What x [B, n, ...] has at index [B, m]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _rows(cache, change):
    """The cache with `change` done to the rows of each array: change(array, axis of the rows)."""

    def of(axis, part):
        return jax.tree.map(lambda x: change(x, axis) if x.ndim else x, part)

    return {k: of(1 if k in ("kv", "first") else 0, part) for k, part in cache.items()}


def search(
    model: decoder.Model,
    params: Any,
    cache: dict[str, Any],
    last: jax.Array,
    first: jax.Array,
    stops: jax.Array,
    new: int,
    beams: int,
    penalty: float,
) -> tuple[jax.Array, jax.Array]:
    """Beam search by the rules of transformers' `num_beams`: (ids int32 [B, new], how many are the answer [B]).

    The likeliest answers so far, `beams` of each prompt, go on by one token a step. One that ends is kept with its
    log-likelihood divided by the power `penalty` of its length; a prompt is done when none of those that go on, at
    their length now, can be better than all that are kept.

    cache, last [B, D]: as generation begins with them; first: int32 [B], the position of the first new token; stops:
    int32 [n], the tokens that end an answer.
    """
    B, K = len(last), beams
    cache, last = _rows(cache, lambda x, a: jnp.repeat(x, K, a)), jnp.repeat(last, K, 0)
    some = max(2, 1 + len(stops)) * K  # so many that K of them have not ended

    def body(carry):
        i, last, cache, ids, scores, kept, open_, _ = carry
        logs = jax.nn.log_softmax(model.logits(params, last)).reshape(B, K, -1)
        vocab = logs.shape[-1]
        found, at = jax.lax.top_k((logs + scores[..., None]).reshape(B, -1), min(some, K * vocab))
        beam, token = at // vocab, (at % vocab).astype(jnp.int32)
        grown = _take(ids, beam).at[:, :, i].set(token)
        ends = jnp.any(token[..., None] == stops, -1) | (i == new - 1)

        scores, go = jax.lax.top_k(found + NEVER * ends, K)
        ids, going = _take(grown, go), _take(beam, go)
        found = found / (i + 1.0) ** penalty
        counts = ends & (jnp.arange(ends.shape[1]) < K) & open_[:, None]
        fresh = (grown, found + NEVER * ~counts, counts)
        every = [jnp.concatenate(pair, 1) for pair in zip(kept, fresh, strict=True)]
        best = jax.lax.top_k(every[1], K)[1]
        kept = tuple(_take(x, best) for x in every)

        worst = jnp.where(kept[2], kept[1].min(1, keepdims=True), NEVER)
        open_ &= jnp.any(scores[:, :1] / (i + 1.0) ** penalty > worst, -1)
        rows = (jnp.arange(B)[:, None] * K + going).reshape(-1)
        cache = _rows(cache, lambda x, a: jnp.take(x, rows, a))
        following = dict(tokens=_take(token, go).reshape(-1, 1), positions=jnp.repeat(first + i, K)[:, None])
        hidden, cache = model.decode(params, cache, following)
        return i + 1, hidden[:, 0], cache, ids, scores, kept, open_, jnp.all(ends)

    scores = jnp.where(jnp.arange(K) == 0, 0.0, jnp.full((B, K), NEVER))
    ids = jnp.zeros((B, K, new), jnp.int32)
    # Of the best answers that have ended: ids [B, K, new], scores [B, K], and whether there is one [B, K].
    kept = (ids, jnp.full((B, K), NEVER), jnp.zeros((B, K), bool))
    start = (jnp.int32(0), last, cache, ids, scores, kept, jnp.ones(B, bool), jnp.bool_(False))
    *_, kept, _, _ = jax.lax.while_loop(lambda c: jnp.any(c[-2]) & ~c[-1], body, start)
    ids = kept[0][:, 0]
    ended = jnp.any(ids[..., None] == stops, -1)
    return ids, jnp.where(jnp.any(ended, 1), jnp.argmax(ended, 1), new)


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8))
def _run(model, params, tokens, lengths, rng, beside, stop_ids, new, how):
    """Of tokens int32 [B, P], right-padded, lengths [B]: (ids [B, new], count of ids kept [B])."""
    B, P = tokens.shape
    stops = jnp.array(stop_ids or (-1,), jnp.int32)
    if model.config.cross:  # the tokens are a source, and the answer begins at position 1
        cache, last = model.begin(params, tokens, lengths, new)
        first = jnp.ones_like(lengths)
    else:
        cache, last = _prefill(model, params, tokens, lengths, model.init_cache(B, P + new), beside)
        first = lengths
    beams, penalty, *drawn = how
    if beams > 1:
        return search(model, params, cache, last, first, stops, new, beams, penalty)

    def going(carry):
        i, _, done, *_ = carry
        return (i < new) & ~jnp.all(done)

    def body(carry):
        i, last, done, count, out, cache = carry
        token = sample(model.logits(params, last), jax.random.fold_in(rng, i), *drawn)
        stop = jnp.any(token[:, None] == stops, axis=1)
        keep = ~done & ~stop
        out = out.at[:, i].set(jnp.where(keep, token, 0))
        done, count = done | stop, count + keep
        # A finished row goes on with its last token, outside its document: nobody reads it.
        hidden, cache = model.decode(params, cache, dict(tokens=token[:, None], positions=(first + i)[:, None]))
        return i + 1, hidden[:, 0], done, count, out, cache

    count, out = jnp.zeros(B, jnp.int32), jnp.zeros((B, new), jnp.int32)
    start = (jnp.int32(0), last, lengths == 0, count, out, cache)
    *_, count, out, _ = jax.lax.while_loop(going, body, start)
    return out, count


def in_batches(lengths: Sequence[int], batch_size: int, mesh: Mesh | None) -> tuple[int, list[list[int]]]:
    """(rows of a batch on the mesh, which texts each batch has), the shortest texts first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    shards = parallel.axis_size(mesh, parallel.RULES["batch"]) if mesh else 1
    size = pad_to_multiple(min(batch_size, max(len(order), 1)), shards)
    return size, [order[at : at + size] for at in range(0, len(order), size)]


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    stop_ids: Iterable[int] = (),
    max_new_tokens: int = 64,
    beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    said: Callable[[int, int], None] = lambda done, of: None,
    beside: Callable[[Sequence[int]], dict[str, np.ndarray]] | None = None,
) -> list[list[int]]:
    """A list of int lists: the tokens generated for each prompt, without the stop token.

    prompts: a list of non-empty int sequences of any lengths. A row ends at any of stop_ids or after max_new_tokens.
    beams: of a beam search, see `search`. said: called after each batch with the number of prompts that are answered,
    and of all. beside: gives the arrays of the images of the prompts with these numbers, as a batch has them. Every
    process must call this with the same prompts.
    """
    if not hasattr(model, "decode") or getattr(model.config, "classes", 0) > 0:
        raise ModelError(
            "generate: this model has no vocabulary head to draw tokens from; take the directory of"
            " a causal language model"
        )
    if beams > 1 and temperature:
        raise ConfigError(
            f"generate.beams={beams} and generate.temperature={temperature}: a beam search draws"
            " nothing; set one of them"
        )
    sizes = [len(prompt) for prompt in prompts]
    if 0 in sizes:
        problem = f"prompt {sizes.index(0)} is empty; a prompt needs at least one token"
        raise DataError(problem, kind="empty_text")
    if prompts:
        what = f"a prompt of {max(sizes)} tokens and {max_new_tokens} new ones"
        join = max if model.config.cross else sum
        model.check_length(join((max(sizes), max_new_tokens)), what)
    size, batches = in_batches(sizes, batch_size, mesh)
    answers: list[list[int]] = [[]] * len(prompts)
    stop = tuple(sorted(set(stop_ids)))

    def answer(at: int) -> None:
        rows = batches[at]
        width = pad_to_multiple(sizes[rows[-1]], BUCKET)
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for j, i in enumerate(rows):
            tokens[j, : sizes[i]] = prompts[i]
            lengths[j] = sizes[i]
        key = jax.random.fold_in(jax.random.key(seed), at * size)
        images = beside(rows) if beside else {}
        images = {k: np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1)) for k, x in images.items()}
        arrays = [jax.tree.map(functools.partial(replicated, mesh), x) for x in (tokens, lengths, key, images)]
        drawn = (max_new_tokens, (beams, length_penalty, temperature, top_k, top_p))
        program = (model, size, width, stop, drawn, *(x.shape for x in images.values()))
        with contextlib.nullcontext() if program in _COMPILED else _COMPILING:
            found = _run(model, params, *arrays, stop, *drawn)
            _COMPILED.add(program)
        out, count = map(processes.to_host, found)
        for j, i in enumerate(rows):
            answers[i] = out[j, : count[j]].tolist()

    # A batch on a CPU keeps one core busy and now and then the others: two at a time keep two.
    # Over several devices programs have to run one after the other.
    alone = jax.device_count() == 1 and jax.default_backend() == "cpu"
    with ThreadPoolExecutor(WORKERS) as pool:
        answered = (pool.map if alone else map)(answer, range(len(batches)))
        for at, _ in enumerate(answered, 1):
            said(min(at * size, len(prompts)), len(prompts))
    return answers


def replicated(mesh: Mesh | None, x: ArrayLike) -> ArrayLike:
    """An array on each device of a mesh, where there is one."""
    return jax.device_put(x, parallel.named(mesh)) if mesh else x
