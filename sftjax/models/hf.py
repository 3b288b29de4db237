"""Hugging Face directories in and out: config, weights by slices, tokenizer, generation config.

Each parameter is described by a row (file name, parameter, layout) of its family's table; the
layout "(n h) d -> d n h" is read in both directions, so import and export cannot disagree.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import params as params_lib
from sftjax.models import decoder, llama
from sftjax.models.safetensors_io import Reader, WeightsError, write
from sftjax.ops import rope

FAMILIES = {"llama": llama}

# In some files, but no parameters: what they hold follows from the config.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attn\.(bias|masked_bias)")

BLOCK_BYTES = 2 * 2**20  # read, checked and converted at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """The facts of the directory a model came from that export needs."""

    directory: str
    config: dict  # config.json
    generation: dict  # generation_config.json, or {}
    dtypes: dict  # tensor name -> numpy dtype in the files


def resolve(path_or_id: str, weights: bool = True) -> Path:
    """A local path as it is; otherwise a hub id, downloaded (the only use of the network).

    weights=False leaves the weights where they are.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise FileNotFoundError(f"model path {path_or_id!r} does not exist, and is no hub id")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.safetensors"] * weights
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except Exception as e:
        raise FileNotFoundError(
            f"model {path_or_id!r} is no local directory and could not be fetched from the hub: {e}"
        ) from e


# ---- config --------------------------------------------------------------------------------


def load_model(path_or_id, **changes) -> decoder.Model:
    """The Model of a Hugging Face directory (or a config.json); reads no weights.

    changes: fields of decoder.Config, such as dtype, remat, split.
    """
    path = resolve(path_or_id, weights=False)
    file = path / "config.json" if path.is_dir() else path
    hf = _json(file)
    if "model_type" not in hf:
        raise ValueError(f"{file} has no model_type; the known ones are {', '.join(FAMILIES)}")
    kind = hf["model_type"]
    if kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, 1, 0.4)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported; known: {', '.join(FAMILIES)}{hint}"
        )
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(f"{file}: quantised weights ({method}) are not supported")
    try:
        config = FAMILIES[kind].config(hf)
    except KeyError as e:
        raise ValueError(f"{file}: field {e} is missing") from None
    config = dataclasses.replace(config, **changes)
    _check(config, file)
    generation = file.parent / "generation_config.json"
    source = Source(
        str(file.parent), hf, _json(generation) if generation.exists() else {}, dtypes={}
    )
    return decoder.Model(config, source)


def _check(c, file):
    if c.activation not in decoder.ACTIVATIONS:
        known = ", ".join(decoder.ACTIVATIONS)
        raise ValueError(f"{file}: hidden_act {c.activation!r} is not supported; known: {known}")
    if c.heads % c.kv_heads:
        raise ValueError(f"{file}: {c.heads} heads do not divide over {c.kv_heads} kv heads")
    decoder.stacks(c)
    try:
        rope.frequencies(c.rope_theta, c.head_dim, c.rope_scaling)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None
    except KeyError as e:
        kind = dict(c.rope_scaling)["rope_type"]
        raise ValueError(f"{file}: rope type {kind!r} needs the field {e}") from None


def _json(file) -> dict:
    if not Path(file).exists():
        raise FileNotFoundError(f"{file} does not exist; a model directory needs a config.json")
    try:
        return json.loads(Path(file).read_text())
    except ValueError as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from None


# ---- layouts -------------------------------------------------------------------------------


def _parse(layout):
    """("(n h) d", "d n h") -> ([["n", "h"], ["d"]], ["d", "n", "h"])."""
    left, right = layout.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\w+)", left)
    return [(a or b).split() for a, b in groups], right.split()


def _file_shape(layout, shape) -> tuple[int, ...]:
    groups, letters = _parse(layout)
    size = dict(zip(letters, shape, strict=True))
    return tuple(int(np.prod([size[x] for x in g])) for g in groups)


def _read(reader, name, layout, shape, index) -> np.ndarray:
    """parameter[index] of the tensor `name`, reading only the rows it needs."""
    groups, letters = _parse(layout)
    size = dict(zip(letters, shape, strict=True))
    want = {x: i.indices(size[x])[:2] for x, i in zip(letters, index, strict=True)}
    cut, inner, part = [], [], {}
    for group in groups:
        first, rest = group[0], group[1:]
        step = int(np.prod([size[x] for x in rest]))
        cut.append(slice(want[first][0] * step, want[first][1] * step))
        inner += [want[first][1] - want[first][0], *(size[x] for x in rest)]
        part |= {x: slice(*want[x]) for x in rest} | {first: slice(None)}
    x = reader.read(name, tuple(cut)).reshape(inner)
    flat = [x for g in groups for x in g]
    return x.transpose([flat.index(x) for x in letters])[tuple(part[x] for x in letters)]


def _write_array(x, layout, shape) -> np.ndarray:
    """The file's tensor of a parameter [shape]: the inverse of _read."""
    groups, letters = _parse(layout)
    flat = [a for g in groups for a in g]
    return x.transpose([letters.index(a) for a in flat]).reshape(_file_shape(layout, shape))


def _tensors(model):
    """(parameter name, per-layer file names or one, layout) for every parameter of the model."""
    family = FAMILIES[model.source.config["model_type"]]
    for name, path, layout in family.names(model.config):
        if not path.startswith("layers/"):
            yield path, [name], layout
            continue
        for stack in decoder.stacks(model.config):
            first, last = map(int, stack.split("-"))
            files = [name.format(i) for i in range(first, last + 1)]
            yield path.replace("layers/", f"layers/{stack}/", 1), files, layout


# ---- weights in ----------------------------------------------------------------------------


def load_pretrained(path_or_id, dtype=jnp.float32, *, mesh=None, **changes):
    """(model, params) of a Hugging Face directory or hub id; safetensors only.

    dtype: of the parameters in memory, one for all or a tree of dtypes. mesh: lay them out on it;
    each process reads only its own slices. changes: fields of decoder.Config. Raises WeightsError
    when tensors are missing, extra, of another shape, or not finite.
    """
    path = resolve(path_or_id)
    model = load_model(path, **changes)
    return load_params(model, path, dtype, mesh)


def load_params(model, path, dtype=jnp.float32, mesh=None):
    """(model with its source's dtypes, params): the weights of `path` for an existing Model."""
    reader = Reader(path)
    _compare(model, reader, path)
    abstract = params_lib.flatten(model.abstract)
    if isinstance(dtype, dict):
        dtypes = params_lib.flatten(dtype)
    else:
        dtypes = dict.fromkeys(abstract, dtype)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = dict.fromkeys(abstract, one)
    else:
        from sftjax.sharding import param_shardings

        shardings = params_lib.flatten(param_shardings(mesh, model.abstract))
    leaves = {
        name: _load_leaf(reader, files, layout, abstract[name], dtypes[name], shardings[name])
        for name, files, layout in _tensors(model)
    }
    params = params_lib.map_named(lambda name, _: leaves[name], model.abstract)
    return with_dtypes(model, path), params


def with_dtypes(model, path):
    """The model, its source knowing the dtypes of the files in `path`; reads headers only."""
    reader = Reader(path)
    dtypes = {n: reader.dtype(n) for n in reader.entries}
    return decoder.Model(model.config, dataclasses.replace(model.source, dtypes=dtypes))


def stored_dtypes(model) -> dict:
    """{parameter name: dtype of its tensors in the files, the widest}; {} for one not loaded."""
    known = model.source.dtypes
    return {
        path: max((known[n] for n in names if n in known), key=lambda d: d.itemsize)
        for path, names, _ in _tensors(model)
        if any(n in known for n in names)
    }


def _load_leaf(reader, files, layout, p, dtype, sharding):
    """One parameter on its devices. In host memory: this process's part of it, and one block."""
    stacked, made = p.axes[0] == "layers", {}

    def fill(out, name, index):
        for part, place in _blocks(layout, p.shape[stacked:], index, reader.dtype(name)):
            x = _read(reader, name, layout, p.shape[stacked:], part)
            if not np.isfinite(x).all():
                file = reader.entries[name][0]
                raise WeightsError(
                    f"{file}: tensor {name} holds NaN or infinity; take an intact checkpoint"
                )
            out[place] = x

    def callback(index):
        key = tuple(i.indices(n)[:2] for i, n in zip(index, p.shape, strict=True))
        if key not in made:  # devices with the same part share it
            made[key] = out = np.empty([b - a for a, b in key], dtype)
            if stacked:
                for j, i in enumerate(range(*key[0])):
                    fill(out[j], files[i], index[1:])
            else:
                fill(out, files[0], index)
        return made[key]

    # Waits for the transfer, so that never two parameters are in host memory.
    return jax.block_until_ready(jax.make_array_from_callback(p.shape, sharding, callback))


def _blocks(layout, shape, index, dtype):
    """Cut `index` into (index of a block, its place in the result) along the file's rows."""
    groups, letters = _parse(layout)
    axis = letters.index(groups[0][0])
    start, stop, _ = index[axis].indices(shape[axis])
    rows = max(1, BLOCK_BYTES * shape[axis] // (int(np.prod(shape)) * dtype.itemsize))
    for a in range(start, stop, rows):
        b = min(a + rows, stop)
        place = (slice(None),) * axis + (slice(a - start, b - start),)
        yield (*index[:axis], slice(a, b), *index[axis + 1 :]), place


def _compare(model, reader, path):
    """Raise WeightsError listing at most ten differences between the files and the model."""
    abstract = params_lib.flatten(model.abstract)
    expected = {}
    for name, files, layout in _tensors(model):
        p = abstract[name]
        shape = _file_shape(layout, p.shape[p.axes[0] == "layers" :])
        expected |= dict.fromkeys(files, shape)
    wrong = [f"missing {n} {list(s)}" for n, s in expected.items() if n not in reader.entries]
    for name in reader.entries:
        if name not in expected:
            tied = model.config.tied and name == "lm_head.weight"
            if not tied and not IGNORED.fullmatch(name):
                wrong.append(f"unexpected {name} {list(reader.shape(name))}")
        elif reader.shape(name) != expected[name]:
            found = list(reader.shape(name))
            wrong.append(f"{name} has shape {found}, the config asks for {list(expected[name])}")
    if wrong:
        lines = "\n  ".join(wrong[:10] + [f"... and {len(wrong) - 10} more"] * (len(wrong) > 10))
        raise WeightsError(f"{path}: the weights are not those of its config.json:\n  {lines}")
    if model.config.tied and "lm_head.weight" in reader.entries:
        _check_tied(reader, path)


def _check_tied(reader, path, step=4096):
    """A tied model's file may repeat the embedding as its head; it must be the same."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    for i in range(0, reader.shape(embed)[0], step):
        a, b = (reader.read(n, (slice(i, i + step),)) for n in (embed, head))
        if not np.array_equal(a, b):
            raise WeightsError(
                f"{path}: config.json says tie_word_embeddings, but {head} differs from {embed}"
                f" in rows {i} to {i + len(a) - 1}; set tie_word_embeddings to false"
            )


# ---- weights out ---------------------------------------------------------------------------


def save_pretrained(
    directory, model, params, tokenizer=None, *, stop_ids=(), max_shard_bytes=5 * 2**30
):
    """Write a Hugging Face directory that transformers and vLLM load.

    Every tensor keeps the name and dtype it was read with (the parameter's dtype for a model that
    was not loaded). stop_ids: token ids that end a turn; generation_config.json lists them with the
    model's own. Tensors are written one at a time. In a multi-process run all processes must call
    this; process 0 writes.
    """
    directory = Path(directory)
    main = jax.process_index() == 0
    directory.mkdir(parents=True, exist_ok=True)
    leaves = params_lib.flatten(params)
    rows, tensors = [], list(_tensors(model))
    if model.config.tied and "lm_head.weight" in model.source.dtypes:
        tensors.append(("embed/w", ["lm_head.weight"], "v d -> v d"))  # as it was read
    for path, files, layout in tensors:
        leaf, stacked = leaves[path], path.startswith("layers/")
        shape = leaf.shape[stacked:]
        for i, name in enumerate(files):
            dtype = model.source.dtypes.get(name, np.dtype(leaf.dtype))

            def get(leaf=leaf, i=i, stacked=stacked, layout=layout, shape=shape):
                return _write_array(_to_host(leaf[i] if stacked else leaf), layout, shape)

            rows.append((name, _file_shape(layout, shape), dtype, get))
    if not main:  # the others only take part in the gathers, in the same order
        for row in rows:
            row[3]()
        return
    temporary = directory / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary, rows, max_shard_bytes)
    _write_json(temporary / "config.json", _hf_config(model, rows))
    _write_json(temporary / "generation_config.json", _generation(model, tokenizer, stop_ids))
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    for file in sorted(temporary.iterdir()):
        os.replace(file, directory / file.name)
    with contextlib.suppress(OSError):
        temporary.rmdir()


def _to_host(x) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _hf_config(model, rows) -> dict:
    hf = dict(model.source.config)
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
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
