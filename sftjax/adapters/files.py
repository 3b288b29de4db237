"""Adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors.

Several weights in one tensor of the files, as in Phi-3's qkv_proj, are one module to PEFT: their factors stand along a
diagonal of blocks. experiments/adapters/read_peft.py reads such directories.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sftjax import params as params_lib
from sftjax.adapters.lora import nodes_of, without
from sftjax.errors import ModelError, writing
from sftjax.files import write_atomic
from sftjax.hf import drawn
from sftjax.hf.layout import Layout
from sftjax.hf.names import tensors
from sftjax.hf.safetensors_io import write
from sftjax.parallel import processes

BEFORE = "base_model.model."
KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
TASKS = {"document": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}  # PEFT's, by the head


def layouts(layout: Layout, dims: str) -> list[Layout]:
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

    rows, said = model.source.config.get("vocab_size"), set(drawn(without(model)))
    if rows and model.config.vocab > rows:
        raise ModelError(f"the base has {rows} rows for tokens, and this model {model.config.vocab}")
    if on.get("embed/w") and model.config.tied:
        raise ModelError("the embedding is trained, which is the head too, and PEFT would part the two")
    scale, modules = next(iter(nodes.values())).scale, set[str]()
    for name, own in parts.items():
        module, adapted = name.removesuffix(".weight"), [row for row in own if row[0] in nodes]
        plain = [path for path, *_ in own if on.get(path) or path in said]
        if adapted and plain:
            raise ModelError(f"{name} holds {plain[0]}, which is trained whole beside adapters")
        if plain:
            found[BEFORE + name] = sum(put(leaves[path], at, layout) for path, at, layout in own)
            whole.add(name.rpartition(".")[0])
        pieces: list[list] = [[], [], []]
        for path, at, layout in adapted:
            node = nodes[path]
            one, two, three = layouts(layout, node.dims)
            for a, b, sign in [(node.a, node.b, 1), *([(*node.first, -1)] if node.first else [])]:
                pieces[0].append(put(a, at, one))
                pieces[1].append(sign * node.scale / scale * put(b, at, two))
            pieces[2] += [] if node.magnitude is None else [put(node.magnitude, at, three)]
            modules.add(module)
        if pieces[2] and len(adapted) < len(own):
            raise ModelError(f"{name} holds weights without adapters too: to PEFT, 'dora' is of all or none")
        joins: Any = np.concatenate, functools.partial(np.concatenate, axis=1), sum
        found |= {f"{BEFORE}{module}.{k}": j(x) for k, j, x in zip(KEYS, joins, pieces, strict=True) if x}
    if both := sorted(whole & modules):
        raise ModelError(f"{both[0]} has an adapter, and a bias that is trained beside it")
    rank = max(len(x) for name, x in found.items() if name.endswith(KEYS[0]))  # more than ours of several in one tensor
    for name, x in found.items():
        axis = next((i for i, key in enumerate(KEYS[:2]) if name.endswith(key)), None)
        pad = [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)]
        found[name] = np.pad(x, pad)
    task = "SEQ_2_SEQ_LM" if model.config.cross else "CAUSAL_LM" if model.config.causal else None
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": TASKS.get(model.config.head, task), "r": rank}
    config |= {"lora_alpha": scale * rank, "use_dora": any(n.magnitude is not None for n in nodes.values())}
    config |= {"target_modules": sorted(modules), "modules_to_save": sorted(whole) or None, "inference_mode": True}
    config |= {"base_model_name_or_path": model.source.directory}
    if jax.process_index() == 0:
        with writing("the directory", directory):
            directory.mkdir(parents=True, exist_ok=True)
        rows = [(name, x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in found.items()]
        write(directory, rows, stem="adapter_model")
        write_atomic(directory / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
