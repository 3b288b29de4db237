"""Hugging Face directories in and out: config, weights by slices, tokenizer, generation config.

Each parameter is described by a row (file name, parameter, layout) of its family's table; the layout "(n h) d -> d n h"
is read in both directions, so import and export cannot disagree.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sftjax import params as params_lib
from sftjax.errors import ModelError, NotFoundError, WeightsError, WriteError, writing
from sftjax.families import common, pixels
from sftjax.files import read_json, refuse_url
from sftjax.hf import heads
from sftjax.hf.names import FAMILIES as FAMILIES
from sftjax.hf.names import ends, family_of, in_files, reads_images, tensors, visible
from sftjax.hf.safetensors_io import Reader, write
from sftjax.hf.tokenizer_files import files_of, save_tokenizer, with_code
from sftjax.models import base, decoder, encoder, encoder_decoder, layer, resnet, vision, vision_language
from sftjax.ops import rope, weight
from sftjax.ops.quantized import Quantized
from sftjax.parallel import param_shardings, processes

MODELS: dict[type, Any] = {
    kind.Config: kind.Model for kind in (decoder, encoder, encoder_decoder, resnet, vision, vision_language)
}
DENSE = jax.jit(weight.dense, static_argnums=1)
# In some files, but no parameters: what they hold follows from the config.
IGNORED = re.compile(
    r".*\.(rotary_emb\.inv_freq|num_batches_tracked)|.*\.attn\.(bias|masked_bias)"
    r"|(\w+\.)?embeddings\.position_ids"
    r"|(cls\.predictions|lm_head)\.decoder\.bias"  # another name of their bias
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The facts of the directory a model came from that export needs."""

    directory: str
    config: dict  # config.json
    generation: dict  # generation_config.json, or {}
    dtypes: dict  # tensor name -> numpy dtype in the files
    labels: tuple[str, ...] = ()  # of the classes of the model's head, in order
    problem: str = ""  # config.json's problem_type, where the task says it


def resolve(path_or_id: str | Path, weights: bool = True) -> Path:
    """A local path as it is; otherwise a hub id, downloaded, with its weights or without."""
    refuse_url("model path", path_or_id, NotFoundError)
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise NotFoundError(f"model path {path_or_id!r} does not exist, and is no hub id")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.safetensors"] * weights
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except Exception as e:
        raise NotFoundError(
            f"model {path_or_id!r} is no local directory and could not be fetched from the hub: {e}"
        ) from e


# ---- config --------------------------------------------------------------------------------


def load_model(
    path_or_id: str | Path,
    labels: Sequence[str] | None = None,
    *,
    head: str | None = None,
    problem: str = "",
    **changes: Any,
) -> base.Model:
    """The Model of a Hugging Face directory (or a config.json); reads no weights.

    labels: the names of the classes of a head, in order; None: those of the files. head: a key of heads.ENDINGS or
    "vocabulary"; None: "document" for labels, else that of the files. problem: the problem_type of an export. changes:
    fields of the Config, such as dtype, remat, split; classes=0 leaves a head of classes out. Raises ValueError, naming
    the file and the field.
    """
    path = resolve(path_or_id, weights=False)
    file = path / "config.json" if path.is_dir() else path
    hf = _json(file)
    try:
        family = family_of(hf)
        common.check(hf)
        if hf.get("quantization_config"):
            method = hf["quantization_config"].get("quant_method")
            raise ModelError(f"quantization_config: quantised weights ({method}) are not supported")
        classes = changes.pop("classes", None)
        config = pixels.config(family, hf, file.parent) if hasattr(family, "IMAGES") else family.config(hf)
        head, labels = heads.choose(hf, config.causal, head, labels, classes, reads_images(hf))
        model = MODELS[type(config)](config).replace(**changes, head=head, classes=len(labels))
        if isinstance(model.config, decoder.Config):
            _check(model.config, hf)
    except KeyError as e:
        raise ModelError(f"{file}: field {e} is missing") from None
    except ValueError as e:
        raise ModelError(f"{file}: {e}") from None
    said = file.parent / "generation_config.json"
    generation = _json(said) if said.exists() else {}
    try:
        common.check(generation)
    except ModelError as e:
        raise ModelError(f"{said}: {e}") from None
    source = Origin(str(file.parent), hf, generation, dtypes={}, labels=labels, problem=problem)
    model = dataclasses.replace(model, source=source)
    shapes = [p.shape for p in params_lib.flatten(model.abstract).values()]
    if (n := sum(map(math.prod, shapes))) > common.PARAMETERS:
        largest = max(shapes, key=math.prod)
        raise ModelError(
            f"{file}: its sizes make {n:.3g} parameters, {list(largest)} in one of them; no machine"
            f" holds more than {common.PARAMETERS:.0e}"
        )
    return model


def _check(c, hf):
    seen = [c.projector or c.activation, c.vision.activation] if hasattr(c, "vision") else []
    if wrong := [name for name in (c.activation, *seen) if name not in layer.ACTIVATIONS]:
        fields = ("hidden_activation", "activation_function", "projector_hidden_act", "hidden_act")
        field = next((f for f in fields if hf.get(f) == wrong[0]), fields[-1])
        known = ", ".join(layer.ACTIVATIONS)
        raise ModelError(f"{field} {wrong[0]!r} is not supported; known: {known}")
    if c.heads % c.kv_heads:
        raise ModelError(f"num_attention_heads={c.heads} do not divide over num_key_value_heads={c.kv_heads}")
    if c.head_dim < 1:
        raise ModelError(f"{c.heads} heads share {c.width} dimensions: head_dim would be 0")
    if c.head_dim > common.MOST["head_dim"]:
        raise ModelError(
            f"{c.heads} heads share {c.width} dimensions: head_dim would be {c.head_dim}, expected"
            f" at most {common.MOST['head_dim']:,}"
        )
    if c.layers * c.experts > 2**19:  # each is a name in the files
        raise ModelError(f"{c.layers} layers of {c.experts} experts are more than any model has")
    if c.experts_per_token > c.experts or bool(c.experts_per_token) < bool(c.experts):
        raise ModelError(f"num_experts_per_tok={c.experts_per_token} of {c.experts} experts")
    if c.mlp < 1:
        raise ModelError("moe_intermediate_size is 0, expected a positive whole number")
    if c.vocab_multiple < 1:
        raise ModelError(f"model.vocab_multiple is {c.vocab_multiple}, expected 1 or more")
    decoder.stacks(c)
    for kind in c.kinds:
        if kind.rope is not None:
            rope.frequencies(kind.rope, c.head_dim)


def _json(file) -> dict:
    if not Path(file).exists():
        raise NotFoundError(f"{file} does not exist; a model directory needs a config.json")
    out = read_json(file, ModelError)
    if not isinstance(out, dict):
        raise ModelError(f"{file} holds no JSON object")
    return out


# ---- weights in ----------------------------------------------------------------------------


def load_pretrained(
    path_or_id: str | Path,
    dtype: DTypeLike | dict[str, Any] = jnp.float32,
    *,
    mesh: Mesh | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[base.Model, dict[str, Any]]:
    """(model, params) of a Hugging Face directory or hub id; safetensors only.

    dtype: of the parameters in memory, one for all or a tree of dtypes. mesh: lay them out on it; each process reads
    only its own slices. labels, changes: see load_model; seed: see load_params. Raises WeightsError when tensors are
    missing, extra, of another shape, or not finite.
    """
    path = resolve(path_or_id)
    model = load_model(path, labels, **changes)
    return load_params(model, path, dtype, mesh, seed)


def load_params(
    model: base.Model,
    path: str | Path,
    dtype: DTypeLike | dict[str, Any] = jnp.float32,
    mesh: Mesh | None = None,
    seed: int = 0,
    packed: Mapping[str, Quantized] = MappingProxyType({}),
) -> tuple[base.Model, dict[str, Any]]:
    """(model with its source's dtypes, params): the weights of `path` for an existing Model.

    Under "stats" stands the model_state of a model whose files hold it. A head that the files lack is initialised from
    the seed, one that the model lacks is left out; a line of the log says so. packed: {name of a weight: the node of
    Params that it becomes, layer by layer as it is read}.
    """
    reader = Reader(path)
    model = _stored(model, reader)
    left_out = _compare(model, reader, path)
    _check_tied(model, reader, path)
    rows, fresh = list(tensors(model)), drawn(model)
    heads.report(path, left_out, fresh, seed)
    tree = _stored_tree(model)
    abstract = params_lib.flatten(tree)
    dtypes: Any = {n: jnp.float32 if n.startswith("stats/") else dtype for n in abstract}
    dtypes |= params_lib.flatten(dtype if isinstance(dtype, dict) else {})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = params_lib.flatten(param_shardings(mesh, tree)) if mesh else dict.fromkeys(abstract, one)

    def leaf(path, files, layout):
        p, lead = abstract[path], len(next(iter(files)))
        shape = visible(model, path, p, lead)
        read = functools.partial(_load_leaf, reader, dtype=dtypes[path], sharding=shardings[path])
        if path not in packed:
            return read(files, layout, p.shape, shape)
        own = [{(0, *at[1:]): name for at, name in files.items() if at[0] == i} for i in range(p.shape[0])]
        layers = (read(names, layout, (1, *p.shape[1:]), shape) for names in own)
        return packed[path].pack_by_layer(layers, mesh and param_shardings(mesh, packed[path]))

    leaves = {name: leaf(name, *rest) for name, *rest in rows if name not in fresh}
    for name in fresh:
        new, key, kind = {name: abstract[name]}, jax.random.key(seed), dtypes[name]
        leaves |= params_lib.init(new, key, kind, {name: shardings[name]})
    return model, params_lib.map_named(lambda name, _: leaves[name], tree)


def drawn(model: base.Model) -> list[str]:
    """The parameters of its head that the files lack: they are initialised from a seed."""
    return [p for p, files, _ in tensors(model) if () in files and heads.fresh(model, p, files[()])]


def _stored_tree(model) -> dict:
    """The Params that the files hold: under "stats" the state of a model that keeps it there."""
    return model.abstract | ({"stats": model.state} if hasattr(model, "stores_state") else {})


def with_dtypes(model: base.Model, path: str | Path) -> base.Model:
    """The model, knowing the dtypes of the files, whose headers must be its own (WeightsError)."""
    model = _stored(model, reader := Reader(path))
    _compare(model, reader, path)
    return model


def _stored(model, reader):
    as_stored = getattr(family_of(model.source.config), "as_stored", lambda config, files: config)
    source = dataclasses.replace(model.source, dtypes={n: reader.dtype(n) for n in reader.entries})
    return dataclasses.replace(model, config=as_stored(model.config, reader.entries), source=source)


def stored_dtypes(model: base.Model) -> dict[str, np.dtype]:
    """{parameter name: dtype of its tensors in the files, the widest}; {} for one not loaded."""
    known = model.source.dtypes
    return {
        path: max((known[n] for n in files.values() if n in known), key=lambda d: d.itemsize)
        for path, files, _ in tensors(model)
        if any(n in known for n in files.values())
    }


def _load_leaf(reader, files, layout, full, shape, dtype, sharding):
    """One parameter on its devices. In host memory: this process's part of it, and one block.

    full: its whole shape; shape: that of one tensor, which may have fewer rows (the rest is zero).
    """
    lead, made = len(full) - len(shape), {}

    def fill(out, name, index):
        for part, place in layout.blocks(shape, index, reader.dtype(name)):
            x = layout.read(reader, name, shape, part)
            if not np.isfinite(x).all():
                file = reader.entries[name][0]
                raise WeightsError(f"{file}: tensor {name} holds NaN or infinity; take an intact checkpoint")
            out[place] = x

    def callback(index):
        key = tuple(i.indices(n)[:2] for i, n in zip(index, full, strict=True))
        if key not in made:  # devices with the same part share it
            made[key] = out = _aligned_zeros([b - a for a, b in key], dtype)
            inner = tuple(slice(min(a, n), min(b, n)) for (a, b), n in zip(key[lead:], shape, strict=True))
            for at in itertools.product(*(range(a, b) for a, b in key[:lead])):
                place = tuple(i - a for i, (a, _) in zip(at, key[:lead], strict=True))
                fill(out[place], files[at], inner)
        return made[key]

    # Waits for the transfer, so that never two parameters are in host memory.
    return jax.block_until_ready(jax.make_array_from_callback(full, sharding, callback))


def _aligned_zeros(shape, dtype) -> np.ndarray:
    """np.zeros that starts at a multiple of 64 bytes: a CPU device takes it over without a copy."""
    n = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.zeros(n + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + n].view(dtype).reshape(shape)


def _compare(model, reader, path) -> list[str]:
    """Names of another head's tensors; WeightsError, of ten lines at most, on all that differs."""
    abstract, expected = params_lib.flatten(_stored_tree(model)), dict[str, tuple]()
    for name, files, layout in tensors(model):
        shape = visible(model, name, abstract[name], len(next(iter(files))))
        if not heads.fresh(model, name, next(iter(files.values()))):
            expected |= dict.fromkeys(files.values(), layout.file_shape(shape))
    head = ends(model)[1]
    others = heads.others(model, family_of(model.source.config), head)
    wrong = [f"missing {n} {list(s)}" for n, s in expected.items() if n not in reader.entries]
    left_out, copies = [], _copies(model, reader)
    zeros = re.compile(getattr(family_of(model.source.config), "ZEROS", "$"))
    for name in reader.entries:
        found = list(reader.shape(name))
        if name in expected:
            if tuple(found) != expected[name]:
                asked = list(expected[name])
                wrong.append(f"{name} has shape {found}, the config asks for {asked}")
        elif others.fullmatch(name):
            left_out.append(name)
        elif zeros.fullmatch(name):
            if reader.read(name, ()).any():
                wrong.append(f"{name} is not 0: sftjax has no such parameter")
        elif name not in copies and not IGNORED.fullmatch(name):
            wrong.append(f"unexpected {name} {found}")
    if wrong:
        shown = wrong if len(wrong) < 10 else [*wrong[:8], f"... and {len(wrong) - 8} more"]
        lines = "\n  ".join(shown)
        raise WeightsError(f"{path}: the weights are not those of its config.json:\n  {lines}")
    return left_out


def _tied(model) -> bool:
    return model.config.tied and model.config.head == "vocabulary"


def _copies(model, reader) -> list[str]:
    """The tensors of the files that repeat the embedding: a tied head, and others of its family."""
    copies = re.compile(getattr(family_of(model.source.config), "COPIES", "$"))
    head = ends(model)[1] if _tied(model) else None
    return [n for n in reader.entries if n == head or copies.fullmatch(n)]


def _check_tied(model, reader, path, step=4096):
    """What repeats the embedding in the files must be the same."""
    embed = ends(model)[0]
    for name in _copies(model, reader) if embed in reader.entries else ():
        for i in range(0, reader.shape(embed)[0], step):
            a, b = (reader.read(n, (slice(i, i + step),)) for n in (embed, name))
            if not np.array_equal(a, b):
                raise WeightsError(
                    f"{path}: {name} differs from {embed} in rows {i} to {i + len(a) - 1}, which"
                    " it is to repeat; where config.json says tie_word_embeddings, set it to false"
                )


# ---- weights out ---------------------------------------------------------------------------


def save_pretrained(
    directory: str | Path,
    model: base.Model,
    params: dict[str, Any],
    tokenizer: Any = None,
    *,
    stop_ids: Iterable[int] = (),
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a Hugging Face directory that transformers (4 and 5) and vLLM load.

    Every tensor keeps the name and dtype it was read with, else the parameter's. stop_ids: token ids that end a turn.
    Written one at a time, by process 0; all processes must call this. Nodes are made whole one layer at a time.
    """
    refuse_url("directory", directory, WriteError)
    if model.source is None:
        raise ModelError("save_pretrained: this Model has no source, the config.json to write")
    directory = Path(directory)
    with writing("the directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "stores_state") and "stats" not in params:
        raise ModelError("save_pretrained: params need the model's state too, under 'stats'")
    leaves = params_lib.flatten(params, weight.is_node)
    parts: dict[str, list] = {}  # name in the files -> its parameters
    for path, files, layout in _written(model):
        shape = visible(model, path, leaves[path], len(next(iter(files))))
        for at, name in files.items():
            parts.setdefault(name, []).append((leaves[path], at, layout, shape))
    rows, embed = [], ends(model)[0]
    for name, found in parts.items():
        leaf, _, layout, shape = found[0]
        read = model.source.dtypes.get(in_files(name, model.source.dtypes))
        if name == embed:  # it may have been read as the head
            read = stored_dtypes(model).get("embed/w")
        dtype, shape = read or np.dtype(leaf.dtype), layout.file_shape(shape)
        rows.append((name, shape, dtype, functools.partial(_tensor, found, shape)))
    if jax.process_index() != 0:  # the others only take part in the gathers, in the same order
        for row in rows:
            row[3]()
        return
    temporary = directory / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary, rows, max_shard_bytes)
    hf = _hf_config(model, rows, tokenizer)
    hf = with_code(hf, Path(model.source.directory), temporary)
    _write_json(temporary / "config.json", hf)
    if model.config.causal and model.config.head == "vocabulary":
        _write_json(temporary / "generation_config.json", _generation(model, tokenizer, stop_ids))
    pixels.write(temporary, model.config, Path(model.source.directory))
    if tokenizer is not None:
        save_tokenizer(tokenizer, temporary)
    new = sorted(file.name for file in temporary.iterdir())
    for name in new:
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        os.replace(temporary / name, directory / name)
    # Only now, so that a kill in between leaves weights that can be read.
    old = list(directory.glob("model*.safetensors*"))
    for file in [*old, *(files_of(directory) if tokenizer is not None else ())]:
        if file.relative_to(directory).parts[0] not in new:
            file.unlink()
    with contextlib.suppress(OSError):
        temporary.rmdir()


def _written(model) -> list[tuple]:
    """The rows of `tensors` to write: every tensor by the name that it was read with."""
    # Under a new head all go by the whole model's names: the files may be a bare model's.
    ones = [(path, files[()]) for path, files, _ in tensors(model) if () in files]
    new_head = any(path.startswith("score/") and heads.fresh(model, path, name) for path, name in ones)
    rows = list(tensors(model, as_read=not new_head))
    embed, head = ends(model)
    if not model.config.tied or head is None or head not in model.source.dtypes:
        return rows
    tables = [("embed/w", {(): embed}, layout) for p, _, layout in rows if p == "embed/w"]
    if embed not in model.source.dtypes:
        # vLLM, and older transformers, tie the head to the embedding and not the other way round.
        return [row for row in rows if row[0] != "embed/w"] + tables
    if _tied(model):
        rows += [(path, {(): head}, layout) for path, _, layout in tables]
    return rows


def _tensor(parts, shape) -> np.ndarray:
    """The file's tensor, made of its parameters."""
    out = np.empty(shape, np.dtype(parts[0][0].dtype))
    for leaf, at, layout, shown in parts:
        x = jax.tree.map(lambda x, at=at: x[at], leaf) if at else leaf
        x = processes.to_host(DENSE(x, out.dtype) if weight.is_node(x) else x)
        layout.write(out, x[: shown[0]])
    return out


def _hf_config(model, rows, tokenizer) -> dict:
    hf = heads.exported(model)
    if not reads_images(hf):
        size, own = {"vocab_size": model.config.vocab}, hf.get("text_config")
        hf |= size if own is None else {"text_config": own | size}
    pad = getattr(tokenizer, "pad_token_id", None)
    if model.config.classes and hf.get("pad_token_id") is None and pad is not None:
        hf["pad_token_id"] = pad  # transformers finds a row's last token by it
    if not model.source.dtypes:  # initialised here: say what was written
        hf["dtype"] = str(np.dtype(rows[0][2]))
        hf.pop("torch_dtype", None)
    return hf


def _generation(model, tokenizer, stop_ids) -> dict:
    """The model's own generation config with every stop id in eos_token_id."""
    out = dict(model.source.generation)
    stops = []
    for ids in (out.get("eos_token_id"), model.source.config.get("eos_token_id"), list(stop_ids)):
        stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if tokenizer is not None:
        stops += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        for key in ("bos_token_id", "pad_token_id"):
            if getattr(tokenizer, key) is not None:
                out.setdefault(key, getattr(tokenizer, key))
    stops = list(dict.fromkeys(int(i) for i in stops))
    if stops:
        out["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return out


def _write_json(file, value):
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
