"""Read adapters that PEFT, or a run of ours, has written: LoRA, rsLoRA and DoRA, onto a base.

    model, params = load("adapter", *sftjax.load_pretrained("base"))

Rank, scale, targets and the parameters that were trained whole are those of the files. Several weights in one tensor
of the files, as in Phi-3's qkv_proj, share what PEFT has as one module.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import params as params_lib
from sftjax.adapters.files import BEFORE, KEYS, layouts
from sftjax.adapters.lora import LoRA
from sftjax.errors import WeightsError
from sftjax.files import read_json
from sftjax.hf.names import tensors, visible
from sftjax.hf.safetensors_io import Reader

# What adapter_config.json has to say; another start than these changes the base, which is no part of the files.
READ: dict[str, tuple] = {"peft_type": ("LORA",), "bias": ("none", None)}
READ["init_lora_weights"] = (True, False, None, "gaussian", "eva", "orthogonal")
READ |= dict.fromkeys(("lora_bias", "target_parameters", "trainable_token_indices"), (None, False, [], {}))


def load(directory: str | Path, model: Any, params: Any) -> tuple[Any, Any]:
    """(model, params) of a base with the adapters of a PEFT directory.

    Raises: WeightsError where they are of another base, or of a kind that is not read.
    """
    directory = Path(directory)
    said = read_json(file := directory / "adapter_config.json", WeightsError)
    for field, values in READ.items():
        if (found := said.get(field)) not in values:
            raise WeightsError(f"{file}: {field}={found!r} is not read, expected {values[0]!r}: LoRA, rsLoRA or DoRA")
    reader, abstract, out = Reader(directory), params_lib.flatten(model.abstract), params_lib.flatten(params)
    left, made = set(reader.entries), dict[str, functools.partial]()
    scale = said["lora_alpha"] / said["r"] ** (root := 0.5 if said.get("use_rslora") else 1)
    of = functools.partial(LoRA.of, kind="dora" if said.get("use_dora") else "lora", scale=scale)

    def put(w, at, layout, name, shape, factor=1.0):  # a tensor into an array that may be larger
        shown, have = layout.file_shape(shape), reader.shape(name) if name in reader.entries else "none"
        if have != shown:
            raise WeightsError(f"{directory}: {name}: expected shape {shown}, found {have}; is it of another base?")
        left.discard(name)
        x = layout.read(reader, name, shape, [slice(None)] * len(shape)).astype(w.dtype) * factor
        return jnp.asarray(w).at[(*at, *map(slice, shape))].set(x.astype(w.dtype))

    for path, files, layout in tensors(model, as_read=False):
        p, lead = abstract[path], len(next(iter(files)))
        shown = dataclasses.replace(p, shape=(*p.shape[:lead], *visible(model, path, p, lead)))
        modules = {at: f"{BEFORE}{name.removesuffix('.weight')}." for at, name in files.items()}
        for at, name in files.items():
            if BEFORE + name in reader.entries:  # trained whole
                out[path] = put(out[path], at, layout, BEFORE + name, shown.shape[lead:])
        ranks = {at: reader.shape(m + KEYS[0])[0] for at, m in modules.items() if m + KEYS[0] in reader.entries}
        if not ranks:
            continue
        made[path] = functools.partial(of, rank=max(ranks.values()))
        node: Any = dataclasses.replace(jax.tree.map(lambda x: jnp.zeros(x.shape), made[path](p)), base=out[path])
        node = node if node.magnitude is None else node.started()
        for at, rank in ranks.items():
            own = (
                alpha
                for key, alpha in (said.get("alpha_pattern") or {}).items()
                if re.fullmatch(rf"(.*\.)?({key})", modules[at][:-1])
            )
            factors = {"b": next(own, said["lora_alpha"]) / rank**root / scale}
            for field, one, key in zip(("a", "b", "magnitude"), layouts(layout, node.dims), KEYS, strict=True):
                if (x := getattr(of(shown, rank=rank), field)) is not None:
                    x = put(getattr(node, field), at, one, modules[at] + key, x.shape[lead:], factors.get(field, 1.0))
                    node = dataclasses.replace(node, **{field: x})
        out[path] = node
    if left or not made:
        raise WeightsError(f"{directory}: {sorted(left)[:3]} are not of this model; is it an adapter of another base?")
    adapted = dataclasses.replace(model, nodes=tuple((re.escape(path), make) for path, make in made.items()))
    return adapted, params_lib.map_named(lambda name, _: out[name], model.abstract)
