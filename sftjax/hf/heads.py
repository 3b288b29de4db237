"""The head of a Hugging Face directory: which it has, its labels, and what an export says of it."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax

from sftjax.errors import ModelError
from sftjax.models.base import Model
from sftjax.terminal import printable

CLASSIFIER = "ForSequenceClassification"
# The first part of transformers' class names.
PREFIXES = {
    "bert": "Bert", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text",
    "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "gpt_oss": "GptOss", "granite": "Granite",
    "iquestcoder": "IQuestCoder", "iquestloopcoder": "IQuestLoopCoder", "llama": "Llama",
    "mistral": "Mistral", "mixtral": "Mixtral", "olmo2": "Olmo2", "phi3": "Phi3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "smollm3": "SmolLM3",
}  # fmt: skip
SCORE = ("score.weight", "score/w", "c d -> c d")  # of every decoder
PARTS = ("score/", "pooler/")  # parameters of a head: made anew where the files have another head


# ---- labels --------------------------------------------------------------------------------


def is_classifier(hf: dict) -> bool:
    """Does the directory of this config.json hold a head of classes?"""
    return any(a.endswith(CLASSIFIER) for a in hf.get("architectures") or ())


def is_other(hf: dict) -> bool:
    """Does it say that it holds another head, or none?"""
    return bool(hf.get("architectures")) and not is_classifier(hf)


def numbered(n: int) -> tuple[str, ...]:
    """The names that transformers gives to classes without names."""
    return tuple(f"LABEL_{i}" for i in range(n))


def stored_labels(hf: dict) -> tuple[str, ...]:
    """The labels of the head in a directory, in the order of its rows; () without such a head."""
    if not is_classifier(hf):
        return ()
    by_id = hf.get("id2label")
    if by_id is None:  # what transformers assumes
        return numbered(hf.get("num_labels", 2))
    expected = [str(i) for i in range(len(by_id))]
    if not by_id or sorted(map(str, by_id)) != sorted(expected):
        raise ModelError(f"id2label has the keys {list(by_id)}, expected 0, 1, ... without a gap")
    return tuple(str(by_id.get(i, by_id.get(int(i)))) for i in expected)


def choose(hf: dict, given: Sequence[str] | None, classes: int | None) -> tuple[str, ...]:
    """The labels of the model to load; () for the vocabulary head.

    given: the user's, or None; classes: how many, or None. ModelError where these and the
    directory's own head disagree.
    """
    own = stored_labels(hf)
    if given is None:
        n = len(own) if classes is None else classes
        if own and n not in (0, len(own)):
            raise ModelError(f"classes={n}, but the files have a head of {_list(own)}")
        return own if n == len(own) else numbered(n)
    given = _checked(given)
    if classes is not None and classes != len(given):
        raise ModelError(f"classes={classes}, but there are {len(given)} labels")
    if own and len(own) != len(given):
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


def _checked(given) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(x, str) and x for x in given):
        raise ModelError(f"labels={given!r}, expected names in a row: ('negative', 'positive')")
    given = tuple(given)
    if not given or len(set(given)) < len(given):
        raise ModelError(f"labels={given!r}, expected one or more names, all of them different")
    return given


def _list(labels) -> str:
    some = ", ".join(labels[:5]) + ", ..." * (len(labels) > 5)
    return f"{len(labels)} labels ({some})"


# ---- files ---------------------------------------------------------------------------------


def fresh(model: Model, path: str, in_files: bool) -> bool:
    """Is this parameter of a head to be made anew: because the files have none, or another's?

    A directory that says it has a head of classes must hold it.
    """
    hf = model.source.config
    if not path.startswith(PARTS) or is_classifier(hf):
        return False
    return not in_files or (path.startswith("score/") and is_other(hf))


def others(model: Model, family: ModuleType, head: str | None) -> re.Pattern[str]:
    """The tensors that belong to a head which this model does not have.

    head: the name of the family's vocabulary head.
    """
    known = [getattr(family, "OTHERS", r"score\.weight")]
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
        logging.getLogger("sftjax").warning(printable(f"{path}: {'; '.join(parts)}"))


def _some(names, most=4) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


# ---- export --------------------------------------------------------------------------------


def exported(model: Model) -> dict:
    """The config.json of the source, saying which head the model has."""
    hf, n = dict(model.source.config), model.config.classes
    # The loop form may call itself a llama, and is then told by this name alone.
    loop = "IQuestLoopCoder" in str(hf.get("architectures"))
    prefix = PREFIXES["iquestloopcoder" if loop else hf["model_type"]]
    if not n:
        if not model.config.causal and is_other(hf):
            hf["architectures"] = [prefix + "Model"]
        return hf
    labels = model.source.labels if len(model.source.labels) == n else numbered(n)
    if not is_classifier(hf):
        hf["architectures"] = [prefix + CLASSIFIER]
        hf.pop("problem_type", None)  # of another task
    hf.pop("num_labels", None)  # follows from the labels
    hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
    hf["label2id"] = {label: i for i, label in enumerate(labels)}
    return hf
