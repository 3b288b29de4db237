"""What a run needs before its first step: model, schedule, sharded state, compiled step."""

import contextlib
import functools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from optax import GradientTransformation

from sftjax import config as config_lib
from sftjax import hf, optim, parallel, tasks
from sftjax import params as params_lib
from sftjax.adapters import files as adapter_files
from sftjax.adapters import lora as adapters
from sftjax.errors import ConfigError, ModelError, OutOfMemory
from sftjax.models import vocab
from sftjax.models.base import Model
from sftjax.ops import attention, quantized
from sftjax.parallel.mesh import AnyMesh
from sftjax.step import Loss, TrainState, train_step
from sftjax.training import metrics, xla_flags
from sftjax.training.data import Feed
from sftjax.training.log import say


def make_model(config: ConfigDict, task: tasks.Task, platform: str = "") -> tuple[Model, Any]:
    """(Model, tree of bools: is each parameter trained); reads no weights.

    Of a task without a tokenizer a config.json is enough, and the embedding has the rows that it says. platform: where
    the model is to run; "" = here.
    """
    m = config.model
    names = ("dtype", "remat", "attention", "scan", "vocab_multiple", "embed_noise")
    model = task.load_model(m, split=tuple(m.split), **{key: getattr(m, key) for key in names})
    if from_files(model):
        model = _checked(config, model, task.tokenizer, platform)
    model = adapters.adapt(config.adapter, model, m.quantize)
    if config.adapter.kind and config.optim.name == "adafactor":  # its steps are shares of a parameter, and b is 0
        raise ConfigError("optim.name='adafactor' would leave adapters, which begin at 0, as they are; take 'adamw'")
    rules = adapters.rules(config.optim.trainable, model)
    trainable = params_lib.match_rules(rules, model.abstract, "optim.trainable")
    # No output depends on them: decay alone would change them.
    unused = getattr(getattr(model, "config", None), "unused", "(?!)")
    trainable = params_lib.map_named(lambda name, on: on and not re.fullmatch(unused, name), trainable)
    for name, on in params_lib.flatten(trainable).items():
        if on and quantized.dtype_of(name, m.quantize):
            raise ConfigError(
                f"model.quantize={m.quantize!r}: {name.rpartition('/')[0]} has no gradient, and optim.trainable"
                " trains it; take adapters (adapter.kind), freeze it, or leave model.quantize at ''"
            )
    if hasattr(model, "with_trained"):
        model = model.with_trained(trainable)
    return model, trainable


def from_files(model: Any) -> bool:
    """Is it one of our bodies, made from a Hugging Face directory; else it is a user's own."""
    return getattr(model, "source", None) is not None


def _checked(config, model, tokenizer, platform):
    """The model with a row for every token; raises what it refuses of the config."""
    if hasattr(model.config, "image_size"):
        if config.model.embed_noise:
            raise ConfigError("model.embed_noise is of the embeddings of tokens, and images have none; set it to 0")
        return hf.with_dtypes(model, hf.resolve(config.model.path)) if config.model.init == "pretrained" else model
    m, longest = config.model, max(config.data.max_length, config.data.max_target_length)
    features = {"segments"} | model.attention_features
    attention.check(m.attention, features, platform, longest // abs(config.mesh.context))
    key = "max_length" if longest == config.data.max_length else "max_target_length"
    model.check_length(longest, f"data.{key}={longest}")
    if tokenizer is None:
        return model.replace(vocab=model.config.vocab + len(config.data.add_tokens))
    if m.init == "pretrained":
        model = hf.with_dtypes(model, hf.resolve(m.path))
    ids, rows, added = tokenizer.get_vocab(), model.config.vocab, config.data.add_tokens
    size = max(ids.values()) + 1
    lacking = sorted((i, token) for token, i in ids.items() if i >= rows and token not in added)
    if lacking:
        some = ", ".join(repr(token) for _, token in lacking[:5]) + ", ..." * (len(lacking) > 5)
        raise ConfigError(
            f"the tokenizer has {size} tokens, the model's embedding only {rows} rows; without a row: {some}. Take the"
            " model's own tokenizer (data.tokenizer), or list what the model is to learn in data.add_tokens"
        )
    return model.replace(vocab=max(rows, size))


def dtypes(section: ConfigDict, model: Model, trainable: Any) -> Any:
    """Tree of parameter dtypes, by the config's section `model`: param_dtype or frozen_dtype."""
    stored = hf.stored_dtypes(model) if from_files(model) else {}

    def one(name, on):
        own = section.param_dtype
        if fewer := quantized.dtype_of(name, section.quantize):
            return jnp.dtype(fewer)
        return jnp.dtype(own if on else section.frozen_dtype or stored.get(name.removesuffix("/base"), own))

    return params_lib.map_named(one, trainable)


def make_schedule(c: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step. c: the config's section `optim`.

    It is 0 at the first step of a warm-up: of a run that has no other step the warm-up is cut, and that is said.
    Raises: ConfigError where the learning rate is 0 at every step all the same.
    """
    warmup = config_lib.duration(c.warmup, "optim.warmup", total=steps)
    decay = config_lib.duration(c.decay_phase, "optim.decay_phase", total=steps)
    if warmup and steps == 1:
        say("warm-up", f"optim.warmup={c.warmup!r} would be the one step there is: it is cut")
        warmup = 0
    schedule = optim.schedule(c.schedule, c.lr, steps, warmup, decay, c.floor)
    if not any(float(schedule(step)) for step in range(min(steps, 2))):
        raise ConfigError(
            f"optim.lr={c.lr}, warmup={c.warmup!r}, schedule={c.schedule!r}: the learning rate is"
            f" 0 at each of {steps} steps; nothing would be trained"
        )
    return schedule


def abstract_state(
    section: ConfigDict, model: Model, trainable: Any, tx: GradientTransformation, mesh: AnyMesh
) -> TrainState:
    """The TrainState as ShapeDtypeStructs with shardings: target of compile and of restore.

    section: the config's `model`. A leaf of the optimizer state whose name ends in a parameter's name and has its shape
    is laid out like that parameter, one that differs in its last dimension as its others; the rest is replicated.
    """
    struct = lambda _, p, d: jax.ShapeDtypeStruct(p.shape, d)  # noqa: E731
    shapes = params_lib.map_named(struct, model.abstract, dtypes(section, model, trainable))
    model_state = None if model.state is None else params_lib.shapes(model.state)
    create = functools.partial(TrainState.create, tx=tx, trainable=trainable)
    state = jax.eval_shape(create, params=shapes, model_state=model_state)
    layouts = params_lib.flatten(parallel.param_shardings(mesh, model.abstract))
    sizes = {name: x.shape for name, x in params_lib.flatten(shapes).items()}

    def place(name, x):
        parts = name.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        known = (
            layouts[tail] if sizes[tail] == x.shape else NamedSharding(mesh, P(*layouts[tail].spec[: x.ndim - 1]))
            for tail in tails
            if x.ndim and len(sizes.get(tail, ())) == x.ndim and sizes[tail][:-1] == x.shape[:-1]
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=next(known, NamedSharding(mesh, P())))

    return params_lib.map_named(place, state)


def make_step(
    loss_fn: Callable[..., Loss],
    tx: GradientTransformation,
    target: TrainState,
    micro_batches: int = 1,
    device: jax.Device | None = None,
) -> jax.stages.Wrapped:
    """The jitted train_step of an abstract state, for a device (None: one that is here)."""
    step = functools.partial(train_step, loss_fn=adapters.seeded(loss_fn), tx=tx, micro_batches=micro_batches)
    platform = device.platform if device else jax.default_backend()
    options, out = xla_flags.options(platform, device), (shardings_of(target), None)
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


def state_text(state: TrainState, flops: float) -> str:
    """Counts, bytes and FLOPs of the whole, under the table of parameters."""
    trained, frozen = params_lib.count(state.params), params_lib.count(state.frozen)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    kinds = sorted({str(x.dtype) for x in moments}) or ["none"]
    mib = lambda tree: f"{params_lib.nbytes(tree) / 2**20:,.1f} MiB"  # noqa: E731
    return (
        f"{trained + frozen:,} parameters, {trained:,} trained; trained {mib(state.params)},"
        f" frozen {mib(state.frozen)}, optimizer {mib(moments)} ({', '.join(kinds)})\n"
        f"{flops / 1e12:.4g} TFLOP a step; MFU = that / (step time x devices x peak FLOP/s)"
    )


def flops_per_step(model: Model, trainable: Any, feed: Feed) -> float:
    """Model FLOPs of an average step, see Model.train_flops; 0 where the model doesn't say."""
    if not hasattr(model, "train_flops"):
        return 0.0
    of, row = model.train_flops(trainable), feed.per_row
    return of(row["tokens"], row["trained"], row["pairs"]) * feed.batch_size


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf of a tree, in the same structure."""
    return jax.tree.map(lambda x: x.sharding, tree)


def _added_text(model, trainable, new) -> str:
    """Which tokens are new, and where their rows will not be learned."""
    text = f"{len(new)} added, {min(new)} to {max(new)} of {model.config.vocab}"
    on = params_lib.named_leaves(trainable)
    parts = {t: [v for name, v in on if f"{name}/".startswith(t)] for t in ("embed/w/", "head/w/")}
    if frozen := [table[:-1] for table, trained in parts.items() if trained and not any(trained)]:
        text += f"; in {' and '.join(frozen)} they stay as drawn: frozen by optim.trainable"
    return text


def first_state(
    section: ConfigDict,
    model: Model,
    trainable: Any,
    tx: GradientTransformation,
    target: TrainState,
    mesh: Mesh,
    *,
    seed: int = 0,
    new: Sequence[int] = (),
) -> TrainState:
    """TrainState at step 0: weights read or drawn. section: the config's `model`. new: the ids of data.add_tokens."""
    check_memory(target)
    if new:
        say("tokens", _added_text(model, trainable, new))
    params, model_state = make_params(section, model, trainable, mesh, seed=seed, new=new)
    create = jax.jit(
        functools.partial(TrainState.create, tx=tx, trainable=trainable, rng=seed),
        donate_argnames=("params", "model_state"),
        out_shardings=shardings_of(target),
    )
    return create(params=params, model_state=model_state)


def make_params(
    section: ConfigDict, model: Model, trainable: Any, mesh: Mesh, *, seed: int = 0, new: Sequence[int] = ()
) -> tuple[dict[str, Any], Any]:
    """(parameters, model_state) at step 0, as of first_state; model_state None for none."""
    whole, kinds, model = model, dtypes(section, model, trainable), adapters.without(model)
    drawn = lambda: None if model.state is None else _drawn(model.state, mesh, seed)  # noqa: E731
    if from_files(model) and section.init == "pretrained":
        # With rows drawn for new tokens, and a head where the files have none.
        said = model.source.config  # of a LLaVA it may leave the number out; of images there is none
        rows = hf.load_model(section.path).config.vocab if "text_config" in said else said.get("vocab_size")
        stored: Any = model.replace(vocab=rows) if rows else model
        path, packed = hf.resolve(section.path), adapters.packed(whole)
        _, params = hf.load_params(stored, path, adapters.plain(kinds), mesh, seed, packed)
        if new:
            _, params = vocab.grow(stored, params, max(new) + 1, seed, first=min(new))
        stats = params.pop("stats", None)
        return adapters.begun(whole, params, kinds, mesh, seed), drawn() if stats is None else stats
    params = jax.tree.map(lambda x, d: x.astype(d), _drawn(model.abstract, mesh, seed), adapters.plain(kinds))
    return adapters.begun(whole, params, kinds, mesh, seed), drawn()


def check_memory(target: Any) -> None:
    """Raise OutOfMemory where an abstract state alone is more than the devices have."""
    most, needed = memory_limit(jax.local_devices()), shard_bytes(target)
    if needed > most:
        largest = max(jax.tree.leaves(target), key=lambda x: math.prod(x.shape))
        raise OutOfMemory(
            f"parameters and optimizer take {needed / 2**30:,.1f} GiB of each device, which has"
            f" {most / 2**30:,.1f} GiB; the largest array is {list(largest.shape)}. Take a smaller"
            " model, more devices on the axis fsdp, or freeze a part of it (optim.trainable)"
        )


def memory_limit(devices: Sequence[jax.Device]) -> float:
    """Bytes that a program may use of each device; CPU devices share this machine's memory."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (devices[0].memory_stats() or {}).get("bytes_limit") or host / len(devices)


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of arrays or shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _drawn(abstract, mesh, seed):
    return params_lib.init(abstract, jax.random.key(seed), shardings=parallel.param_shardings(mesh, abstract))


def export(directory: Path | str, task: tasks.Task, model: Model, state: TrainState) -> None:
    """Write the trained model as a Hugging Face directory, or as its own `save` does; adapters beside it as well."""
    params, beside = state.all_params, Path(directory).with_name("adapter")
    if jax.process_index() == 0:
        shutil.rmtree(beside, ignore_errors=True)  # an earlier run's
    if adapters.nodes_of(model.abstract) and from_files(model):
        trainable = jax.tree.map(lambda x: x is not None, state.params, is_leaf=lambda x: x is None)
        try:
            adapter_files.save(beside, model, task.exported(params, state.model_state), trainable)
        except ModelError as e:
            say("adapter", f"is in the export only: {e}")
    if hasattr(model, "save"):
        whole, params = adapters.merged(model, params)
        whole.save(directory, params, state.model_state)
    elif from_files(model):
        params = task.exported(params, state.model_state)
        hf.save_pretrained(directory, adapters.without(model), params, task.tokenizer, stop_ids=task.stop_ids)
    else:
        say("export", f"none: {type(model).__name__} has no save(directory, params, model_state)")


def compiled_text(compiled: jax.stages.Compiled, seconds: float) -> str:
    """How long the compile took, and the program's bytes a device (0: not known there)."""
    peak = metrics.peak_bytes(compiled)
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined] # as in workdir.py
    return f"in {seconds:.1f} s, peak {peak / 2**20:,.0f} MiB a device; cache {cache}"


@contextlib.contextmanager
def advice(config: ConfigDict) -> Iterator[None]:
    """An out-of-memory error inside is raised again with what else may fit these devices."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        from sftjax.plan import hardware, search  # a run that fits has no need of them

        reason = str(e).split("\n")[0]
        found = search.suggestions(config, hardware.resolve("here"))
        raise OutOfMemory(f"{reason}\n{found}") from e
