"""The names of a model's tensors in Hugging Face files, by the tables of the families."""

import difflib
import importlib
from collections.abc import Container, Iterator
from types import ModuleType

import jax

from sftjax.errors import ModelError
from sftjax.hf import heads
from sftjax.hf.layout import Layout
from sftjax.models import base, decoder
from sftjax.params import Param

# By model_type: each is a module of sftjax.families, as a rule of the same name.
MODULES = {
    "deberta-v2": "deberta",
    "gemma3": "llava",
    "gemma3_text": "gemma3",
    "iquestcoder": "llama",
    "iquestloopcoder": "iquest",
    "paligemma": "llava",
    "phi4-siglip": "llava",
    "siglip": "vit",
    "timm": "resnet",
    "xlm-roberta": "roberta",
}
TYPES = """bart bert deberta-v2 distilbert gemma gemma2 gemma3 gemma3_text gpt2 gpt_neox gpt_oss granite
iquestcoder iquestloopcoder llama llava mistral mixtral modernbert olmo2 paligemma phi3 phi4-siglip qwen2 qwen3
qwen3_moe resnet roberta siglip smollm3 t5 timm vit xlm-roberta""".split()
FAMILIES = {name: importlib.import_module(f"sftjax.families.{MODULES.get(name, name)}") for name in TYPES}


PARTS = {"encoder": "encoder", "tower": "vision"}  # of a tree: the field of the Config with the part's own


def family_of(hf: dict) -> ModuleType:
    """The family's module: by model_type, but the loop form may call itself a llama."""
    kind, known = hf.get("model_type"), ", ".join(FAMILIES)
    if kind is None and "architecture" in hf:
        kind = "timm"
    if not isinstance(kind, str):
        raise ModelError(f"model_type is {kind!r}; the known ones are {known}")
    if "IQuestLoopCoder" in str(hf.get("architectures")):
        kind = "iquestloopcoder"
    if kind not in FAMILIES:
        near = [k for k in FAMILIES if kind and k.startswith(kind)]
        near = near or difflib.get_close_matches(kind, FAMILIES, 1, 0.4)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ModelError(f"model_type {kind!r} is not supported; known: {known}{hint}")
    return FAMILIES[kind]


def reads_images(hf: dict) -> bool:
    """Is it the config.json of a model of images, and not of texts too."""
    family = FAMILIES.get("timm" if "architecture" in hf else str(hf.get("model_type")))
    return hasattr(family, "IMAGES") and not hasattr(family, "TEXTS")


def names(model: base.Model) -> list[tuple]:
    """The rows of the family's table for this model, as llama.names gives them."""
    rows = family_of(model.source.config).names(model.config)
    if model.config.classes and model.config.causal:
        rows = [row for row in rows if row[1] != "head/w"] + heads.SCORES[model.config.head]
    return rows


def tensors(model: base.Model, as_read: bool = True) -> Iterator[tuple[str, dict[tuple[int, ...], str], Layout]]:
    """(parameter, {leading index: name in the files}, Layout) of every parameter, or part of one.

    The leading index is (), (layer of the stack,), or (layer, expert). as_read=False: the
    names that transformers gives today; in files of a bare model they lack the first part.
    """
    known = model.source.dtypes if as_read else {}
    for name, path, text, *part in names(model):
        layout, c = Layout(text, *part), model.config
        if own := PARTS.get(path.partition("/")[0]):
            c = getattr(c, own)
        if "layers/" not in path:
            one = in_files(name, known)
            if path == "embed/w" and c.tied and one not in known:
                head = ends(model)[1]  # safetensors keep one name of a tensor that two share
                one = head if head is not None and head in known else one
            yield path, {(): one}, layout
            continue
        experts = name.count("{}") > 1
        for stack, n in decoder.stacks(c).items():
            if "/attn_norm/" in path and not decoder.period(c, stack)[0].attn_norm:
                continue
            first = int(stack.split("-")[0])
            files: dict[tuple[int, ...], str] = {
                (i, e) if experts else (i,): in_files(name.format(first + i, e), known)
                for i in range(n)
                for e in range(c.experts if experts else 1)
            }
            yield path.replace("layers/", f"layers/{stack}/", 1), files, layout


def in_files(name: str, known: Container[str]) -> str:
    """The one of a tensor's names that is known: of the whole model, of a bare one, of old."""
    short = name.partition(".")[2]
    for new in (name, short, name.replace("vision_tower.vision_model.", "vision_tower.")):
        old = new.replace("LayerNorm.weight", "LayerNorm.gamma")
        for one in (new, old.replace("LayerNorm.bias", "LayerNorm.beta")):
            if one in known:
                return one
    return name


def visible(model: base.Model, path: str, p: Param | jax.Array, lead: int) -> tuple[int, ...]:
    """A parameter's shape after its leading dimensions, as far as the files have it."""
    rows = (model.config.vocab,) if path in ("embed/w", "head/w", "vocab_bias/b") else ()
    return (*rows, *p.shape[lead + len(rows) :])


def ends(model: base.Model) -> tuple[str | None, str | None]:
    """The names of embedding and vocabulary head in the files, if tied too; None for none."""
    untied = model.replace(tied=False, head="vocabulary", classes=0)
    names = {path: files[()] for path, files, _ in tensors(untied) if () in files}
    return names.get("embed/w"), names.get("head/w")
