"""The head of a Hugging Face directory: which it has, its labels, and what an export says of it."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax

from sftjax.errors import ModelError
from sftjax.models.base import Model
from sftjax.terminal import warn

# Heads of classes by the last part of transformers' class names. A document has classes, or one number; a token has
# classes; of a span the first and the last token are found.
ENDINGS = {
    "document": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "image": "ForImageClassification",
}
MASKED = "ForMaskedLM"
PAIRED = "ForConditionalGeneration"
VOCABULARY = (MASKED, PAIRED, "ForCausalLM", "LMHeadModel", "ForPreTraining")
SPAN = ("start", "end")  # the rows of a head of spans
# Of every decoder, by the head.
SCORES = {
    "document": [("score.weight", "score/w", "c d -> c d")],
    "token": [("score.weight", "score/w", "c d -> c d"), ("score.bias", "score/b", "c -> c")],
}
PARTS = ("score/", "pooler/", "pooler_norm/", "vocab_bias/")  # parameters that heads have


# ---- labels --------------------------------------------------------------------------------


def kind_of(hf: dict) -> str:
    """The head that this config.json names: a key of ENDINGS, "vocabulary", or "" for another."""
    if "architecture" in hf:  # timm's form
        return "image" if hf.get("num_classes") else ""
    for name in hf.get("architectures") or ():
        for kind, ending in ENDINGS.items():
            if name.endswith(ending):
                return kind
        if name.endswith(VOCABULARY):
            return "vocabulary"
    return ""


def is_other(hf: dict, kind: str) -> bool:
    """Does it say that it holds another head than this kind, or none?"""
    return bool(hf.get("architectures") or hf.get("architecture")) and kind_of(hf) != kind


def numbered(n: int) -> tuple[str, ...]:
    """The names that transformers gives to classes without names."""
    return tuple(f"LABEL_{i}" for i in range(n))


def stored_labels(hf: dict, kind: str = "document") -> tuple[str, ...]:
    """The labels of this kind of head in a directory, in the order of its rows; () without it."""
    if kind_of(hf) != kind or kind not in ENDINGS:
        return ()
    if kind == "span":
        return SPAN
    if "architecture" in hf:  # timm's form
        return tuple(hf.get("label_names") or numbered(hf["num_classes"]))
    by_id = hf.get("id2label")
    if by_id is None:  # what transformers assumes
        return numbered(hf.get("num_labels", 2))
    expected = [str(i) for i in range(len(by_id))]
    if not by_id or sorted(map(str, by_id)) != sorted(expected):
        raise ModelError(f"id2label has the keys {list(by_id)}, expected 0, 1, ... without a gap")
    return tuple(str(by_id.get(i, by_id.get(int(i)))) for i in expected)


def choose(
    hf: dict, causal: bool, head: str | None, given: Sequence[str] | None, classes: int | None, images: bool = False
) -> tuple[str, tuple[str, ...]]:
    """(head, labels) of the model to load; labels () for a head of no classes.

    head, given (labels), classes (their number): what the user asks for, None for what the files have; classes=0 is
    none. images: is it a model of images. ModelError where these and the directory's own head disagree.
    """
    plain, own_kind = "vocabulary" if causal else "", kind_of(hf)
    if head is None:
        classified = "image" if images else "document"
        head = classified if given is not None or classes else own_kind or plain
        head = plain if classes == 0 else head
    known = {"image", ""} if images else {*ENDINGS, "vocabulary", plain} - {"image", "span" if causal else "image"}
    if head not in known:
        raise ModelError(f"head={head!r}, expected one of {', '.join(filter(None, sorted(known)))}")
    if head not in ENDINGS:
        return head, ()
    given = SPAN if head == "span" else given
    return head, _labels(hf, head, given, classes)


def _labels(hf, head, given, classes) -> tuple[str, ...]:
    own = stored_labels(hf, head)
    if given is None:
        n = len(own) if classes is None else classes
        if own and n != len(own):
            raise ModelError(f"classes={n}, but the files have a head of {_list(own)}")
        if not n:
            raise ModelError(f"head={head!r} needs labels, the names of its classes")
        return own or numbered(n)
    if isinstance(given, str) or not all(isinstance(x, str) and x for x in given):
        raise ModelError(f"labels={given!r}, expected names in a row: ('negative', 'positive')")
    given = tuple(given)
    if not given or len(set(given)) < len(given):
        raise ModelError(f"labels={given!r}, expected one or more names, all of them different")
    if classes is not None and classes != len(given):
        raise ModelError(f"classes={classes}, but there are {len(given)} labels")
    if own and len(own) != len(given) and head != "image":
        raise ModelError(
            f"{_list(given)} asked for, but the files (id2label) have a head of {_list(own)}; give"
            f" {len(own)} labels, or take a directory without a head of classes"
        )
    if own and set(own) == set(given) and own != given:
        raise ModelError(
            f"labels={given} are those of the files in another order, which is {own}: a row of the"
            " head would get another's name; give them in the files' order"
        )
    return given


def _list(labels) -> str:
    return f"{len(labels)} labels ({_some(labels, 5)})"


def _some(names, most=4) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


# ---- files ---------------------------------------------------------------------------------


def fresh(model: Model, path: str, name: str) -> bool:
    """Is this parameter of a head to be made anew: because the files have none, or another's?

    name: in the files. A directory that says it has the head must hold it.
    """
    hf, kind = model.source.config, model.config.head
    if kind == "image" and path.startswith("score/") and kind_of(hf) == kind:
        own = stored_labels(hf, kind)
        return len(own) != model.config.classes or own not in (model.source.labels, numbered(len(own)))
    if not path.startswith(PARTS) or (kind in ENDINGS and kind_of(hf) == kind):
        return False
    return name not in model.source.dtypes or (path.startswith("score/") and is_other(hf, kind))


def others(model: Model, family: ModuleType, head: str | None) -> re.Pattern[str]:
    """Tensors of a head which this model has not; head: the name of the vocabulary's."""
    known = [getattr(family, "OTHERS", r"score\.(weight|bias)")]
    if model.config.classes and head:
        known += [re.escape(head), r"lm_head\..*", r"score\.(weight|bias)", r"qa_outputs\..*"]
    return re.compile("|".join(known))


def report(path: str | Path, left_out: list[str], made: list[str], seed: int) -> None:
    """Say in one line what was not read from the files, and what was made in its place."""
    parts = []
    if left_out:
        parts.append(f"{len(left_out)} tensors of another head are left out ({_some(left_out)})")
    if made:
        parts.append(f"{len(made)} are made anew from seed {seed} ({_some(made)})")
    if parts and jax.process_index() == 0:
        warn(f"{path}: {'; '.join(parts)}")


# ---- export --------------------------------------------------------------------------------


def exported(model: Model) -> dict:
    """The config.json of the source, saying which head the model has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    hf, n, kind = dict(model.source.config), model.config.classes, model.config.head
    labels = model.source.labels if len(model.source.labels) == n else numbered(n)
    if "architecture" in hf:  # timm's form
        return hf | {"num_classes": n} | ({"label_names": list(labels)} if n else {})
    # The loop form may call itself a llama, and is then told by this name alone.
    loop = "iquestloop" in f"{hf.get('architectures')} {hf['model_type']}".lower()
    known = {"iquestcoder": "IQuestCoderConfig", "phi4-siglip": "Phi4VisionR"} | CONFIG_MAPPING_NAMES
    prefix = "IQuestLoopCoder" if loop else known[hf["model_type"]].removesuffix("Config")
    if not n:
        if not model.config.causal and is_other(hf, kind):
            hf["architectures"] = [prefix + (MASKED if kind else "Model")]
        return hf
    if kind_of(hf) != kind:
        hf["architectures"] = [prefix + ENDINGS[kind]]
        hf.pop("problem_type", None)  # of another task
    if model.source.problem:
        hf["problem_type"] = model.source.problem
    for key in ("num_labels", "id2label", "label2id"):  # they follow from the labels
        hf.pop(key, None)
    if kind != "span":
        hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf["label2id"] = {label: i for i, label in enumerate(labels)}
    return hf
