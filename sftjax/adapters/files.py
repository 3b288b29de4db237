"""Adapters as PEFT's directories, in and out: adapter_config.json and adapter_model.safetensors.

Several weights in one tensor of the files, as in Phi-3's qkv_proj, are one module to PEFT. Written, their factors
stand along a diagonal of blocks; read, each has the one `a`.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import params as params_lib
from sftjax.adapters.lora import LoRA
from sftjax.adapters.targets import nodes_of, without
from sftjax.errors import ModelError, WeightsError, writing
from sftjax.files import read_json, write_atomic
from sftjax.hf.layout import Layout
from sftjax.hf.names import tensors, visible
from sftjax.hf.safetensors_io import Reader, write
from sftjax.parallel import processes

BEFORE = "base_model.model."
KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
TABLE = ("lora_embedding_A", "lora_embedding_B")  # of the embedding
TASKS = {"document": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}  # PEFT's, by the head
# What adapter_config.json may say that is not read here; a start that changes the base is no part of its files.
OTHERS = ("lora_bias", "target_parameters", "trainable_token_indices", "use_qalora", "alora_invocation_tokens")
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def _layouts(layout: Layout, dims: str) -> list[Layout]:
    """Of a, b and magnitude, by the weight's layout and the kinds of its letters; ModelError where PEFT has none."""
    own = dict(zip(layout.letters, dims[-len(layout.letters) :], strict=True))
    if len(layout.groups) != 2 or "b" in own.values():
        raise ModelError("has no form in PEFT's files: it is no matrix there")
    inner, outer = sorted(layout.groups, key=lambda group: own.get(group[-1]) == "o")
    one, two = (f"({' '.join(group)})" for group in (inner, outer))
    ins, outs = (" ".join(x for x in layout.letters if own[x] == kind) for kind in "io")
    b = Layout(f"{two} z -> z {outs}", layout.part)
    return [Layout(f"z {one} -> {ins} z"), b, Layout(f"{two} -> {outs}", layout.part)]


def save(directory: Path, model: Any, params: Any, trainable: Any) -> None:
    """Write the adapters, and what else is trained, as a directory that PEFT loads onto the base.

    trainable: tree of bools. PiSSA's are changes of the base as it was, of twice the rank. All processes must call
    this, process 0 writes. Raises: ModelError for a weight that is no module to PEFT, WriteError.
    """
    nodes, leaves, on = nodes_of(params), params_lib.flatten(params), params_lib.flatten(trainable)
    parts, found, whole = dict[str, list](), dict[str, np.ndarray](), set[str]()
    for path, files, layout in tensors(without(model), as_read=False):
        for at, name in files.items():
            parts.setdefault(name, []).append((path, at, layout))

    def put(x, at, layout):  # a tensor of the files with this part of it, without the vocabulary's padding
        x = processes.to_host(x[at] if at else x)
        x = x[tuple(slice(model.config.vocab if letter == "v" else None) for letter in layout.letters)]
        layout.write(out := np.zeros(layout.file_shape(x.shape), x.dtype), x)
        return out

    alphas, ranks = dict[str, float](), dict[str, int]()
    for name, own in parts.items():
        module, adapted = name.removesuffix(".weight"), [row for row in own if row[0] in nodes]
        if not adapted and on.get(own[0][0]):
            found[BEFORE + name] = sum(put(leaves[path], at, layout) for path, at, layout in own)
            whole.add(name.rpartition(".")[0])
        pieces: list[list] = [[], [], []]
        for path, at, layout in adapted:
            node = nodes[path]
            layouts = _layouts(layout, node.dims)
            for a, b, sign in [(node.a, node.b, 1), *((*pair, -1) for pair in [node.first] if pair)]:
                pieces[0].append(put(a, at, layouts[0]))
                pieces[1].append(sign * put(b, at, layouts[1]))
            if node.magnitude is not None:
                pieces[2].append(put(node.magnitude, at, layouts[2]))
            ranks[module] = sum(map(len, pieces[0]))
            alphas[module] = node.scale * ranks[module]
        if pieces[2] and len(adapted) < len(own):
            raise ModelError(
                f"{name} holds other weights beside {adapted[0][0]}: adapter.kind='dora' takes all or none"
            )
        keys = (*TABLE, "") if own[0][0] == "embed/w" else KEYS
        joins = np.concatenate, functools.partial(np.concatenate, axis=1), sum
        found |= {f"{BEFORE}{module}.{k}": np.asarray(j(x)) for k, j, x in zip(keys, joins, pieces, strict=True) if x}
    rank, alpha = min(ranks.values()), min(alphas.values())
    last = lambda module: module.rpartition(".")[2]  # noqa: E731
    apart = {last(m) for m in {name.removesuffix(".weight") for name in parts} - ranks.keys()}
    task = "SEQ_2_SEQ_LM" if model.config.cross else "CAUSAL_LM" if model.config.causal else None
    config = {
        "peft_type": "LORA",
        "task_type": TASKS.get(model.config.head, task),
        "base_model_name_or_path": model.source.directory,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: n for module, n in ranks.items() if n != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != alpha},
        "target_modules": sorted({module if last(module) in apart else last(module) for module in ranks}),
        "modules_to_save": sorted(whole) or None,
        "use_dora": any(node.magnitude is not None for node in nodes.values()),
        "lora_dropout": max(node.rate for node in nodes.values()),
        "inference_mode": True,
    }
    if jax.process_index() == 0:
        with writing("the directory", directory):
            directory.mkdir(parents=True, exist_ok=True)
        rows = [(name, x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in found.items()]
        write(directory, rows, stem="adapter_model")
        write_atomic(directory / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(directory: Path, model: Any, params: Any) -> tuple[Any, Any]:
    """(model, params) of a base with the adapters of a PEFT directory: rank, scale, targets are those of its files.

    Raises: WeightsError where they are of another base, or of a kind that is not read.
    """
    said = read_json(file := directory / "adapter_config.json", WeightsError)
    wrong = [k for k in OTHERS if said.get(k)] + ["init_lora_weights"] * (said.get("init_lora_weights") not in STARTS)
    if said.get("peft_type") != "LORA" or wrong or said.get("bias", "none") != "none":
        key = next(iter(wrong), "bias" if said.get("peft_type") == "LORA" else "peft_type")
        raise WeightsError(f"{file}: {key}={said.get(key)!r} is not read, only plain LoRA, rsLoRA and DoRA are")
    reader, abstract = Reader(directory), params_lib.flatten(model.abstract)
    left, out, found = set(reader.entries), params_lib.flatten(params), dict[str, list]()
    kind, root = "dora" if said.get("use_dora") else "lora", 0.5 if said.get("use_rslora") else 1
    scale = said["lora_alpha"] / said["r"] ** root

    def read(layout, name, shape):
        if name not in left or reader.shape(name) != layout.file_shape(shape):
            have = f"shape {list(reader.shape(name))}" if name in left else "none"
            raise WeightsError(f"{directory}: of {name} the base asks for shape {list(layout.file_shape(shape))}, found"
                               f" {have}; take the base that the adapter was trained on")  # fmt: skip
        used.add(name)
        return np.asarray(layout.read(reader, name, shape, [slice(None)] * len(shape)), np.float32)

    used = set[str]()
    for path, files, layout in tensors(model, as_read=False):
        p, lead = abstract[path], len(next(iter(files)))
        shown = dataclasses.replace(p, shape=(*p.shape[:lead], *visible(model, path, p, lead)))
        for at, name in files.items():
            module = name.removesuffix(".weight")
            keys = [f"{BEFORE}{module}.{key}" for key in (TABLE if path == "embed/w" else KEYS)]
            if BEFORE + name in left:
                out[path] = _filled(out[path], at, read(layout, BEFORE + name, shown.shape[lead:]))
            if keys[0] in left:
                rank = reader.shape(keys[0])[0]
                alpha = next((v for k, v in said.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({k})", module)),
                             said["lora_alpha"])  # fmt: skip
                node = LoRA.of(shown, kind=kind, rank=rank, scale=scale)
                parts = [x for x in (node.a, node.b, node.magnitude) if x is not None]
                of = zip(_layouts(layout, node.dims), keys, parts, strict=False)
                values = [read(one, key, x.shape[lead:]) for one, key, x in of]
                values[1] *= alpha / rank**root / scale
                found.setdefault(path, []).append((rank, at, values))
    if left - used or not found:
        raise WeightsError(
            f"{directory}: {sorted(left - used)[:3]} are not of this model; is it another base's adapter?"
        )
    made = {
        path: functools.partial(LoRA.of, kind=kind, rank=max(rank for rank, *_ in rows), scale=scale)
        for path, rows in found.items()
    }
    adapted = dataclasses.replace(model, nodes=tuple((re.escape(path), make) for path, make in made.items()))
    for path, node in nodes_of(adapted.abstract).items():
        node = jax.tree.map(lambda p: jnp.zeros(p.shape), node).replace(base=out[path])
        node = node.started() if kind == "dora" else node
        for _, at, values in found[path]:
            new = {
                name: _filled(getattr(node, name), at, x)
                for name, x in zip(("a", "b", "magnitude"), values, strict=False)
            }
            node = node.replace(**new)
        out[path] = node
    return adapted, params_lib.map_named(lambda name, _: out[name], model.abstract)


def _filled(x, at, part):
    """The array with a part of it set from the beginning on; `at`: of its first dimensions."""
    return jnp.asarray(x).at[(*at, *(slice(n) for n in part.shape))].set(part.astype(x.dtype))
