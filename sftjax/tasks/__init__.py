"""The kinds of supervised tasks, by the name that `config.task` gives.

A new task is one file here and one line in TASKS; a user's own is `path/to/file.py:ClassName`.
"""

import difflib
import importlib

from ml_collections import ConfigDict

from sftjax.config import ConfigError, get_default
from sftjax.files import load_python
from sftjax.hf.heads import MASKED, PAIRED, kind_of
from sftjax.hf.names import reads_images
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.tasks.base import Example, Scores, Task  # noqa: F401 (offered here)

# name -> "module:class"; imported when a config names it.
TASKS = {
    "causal_lm": "sftjax.tasks.causal_lm:CausalLM",
    "classification": "sftjax.tasks.classification:Classification",
    "multi_label": "sftjax.tasks.classification:MultiLabel",
    "regression": "sftjax.tasks.regression:Regression",
    "token_labels": "sftjax.tasks.token_labels:TokenLabels",
    "masked_lm": "sftjax.tasks.masked_lm:MaskedLM",
    "seq2seq": "sftjax.tasks.seq2seq:Seq2Seq",
    "image_text": "sftjax.tasks.image_text:ImageText",
    "image_classification": "sftjax.tasks.image_classification:ImageClassification",
}

# By a config.json's problem_type.
PROBLEMS: dict = {"regression": "regression", "multi_label_classification": "multi_label"}
# By the ending of the name of an architecture with a head of the vocabulary.
WRITERS = {MASKED: "masked_lm", PAIRED: "seq2seq"}
# Keys of the config's section `eval` that only a task which generates reads, as they come.
ASKING = dict(metrics=("exact_match",), answer="", choices="", draws=1, shots=0)


def find(name: str) -> type[Task]:
    """The class of a task: a row of TASKS, or "path/to/file.py:ClassName".

    Raises: ConfigError for a name, a file or a class that does not exist.
    """
    if ":" in name:
        path, _, cls = name.rpartition(":")
        found = getattr(load_python(path, f"task={name!r}"), cls, None)
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise ConfigError(f"task={name!r}: {path} has no class {cls} derived from sftjax.tasks.Task")
        return found
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"task={name!r} is unknown; {hint}The tasks are {', '.join(TASKS)}, and your own is"
            " named as 'path/to/file.py:ClassName'"
        )
    module, _, cls = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def of_head(hf: dict) -> str:
    """The task that the head of a Hugging Face directory is made for, by its config.json."""
    kind = kind_of(hf)
    if kind == "document":
        one = hf.get("num_labels", len(hf.get("id2label") or (0, 0))) == 1
        return PROBLEMS.get("regression" if one else hf.get("problem_type"), "classification")
    if "vision_config" in hf and not reads_images(hf):
        return "image_text"
    if kind == "vocabulary":
        said = str(hf.get("architectures"))
        return next((task for ending, task in WRITERS.items() if ending in said), "causal_lm")
    if kind == "span":
        raise ConfigError(
            "the model has a head of spans: name the task that reads it, such as"
            " --config.task=experiments/xquad/task.py:ExtractiveQA"
        )
    if reads_images(hf):
        return "image_classification"
    return "token_labels" if kind == "token" else "causal_lm"


def make(config: ConfigDict, tokenizer: Tokenizer | None) -> Task:
    """The task that a config names, with its settings. tokenizer: None where it needs none."""
    task = find(config.task).of(config, tokenizer)
    for key, plain in {} if task.generates else ASKING.items():
        if (value := config.eval[key]) != plain:
            raise ConfigError(
                f"eval.{key}={value!r} is of answers that are generated, and task={config.task!r}"
                " generates none; leave it out"
            )
    if config.data.max_target_length and not hasattr(task.layout, "source"):
        raise ConfigError(f"data.max_target_length is nothing that task={config.task!r} reads")
    kinds = {"focal_gamma": "focal", "huber_delta": "huber"}
    for key, plain in get_default().loss.items():
        if (value := getattr(config.loss, key)) == plain:
            continue
        if key in kinds and config.loss.kind != kinds[key]:
            raise ConfigError(f"loss.{key} is of loss.kind={kinds[key]!r}, and that is not set")
        if task.options is not None and key not in task.options:
            may = ", ".join(f"loss.{k}" for k in task.options)
            raise ConfigError(f"loss.{key}={value!r} is not of task={config.task!r}, of which {may} may be set")
    task.beside = tuple(filter(None, (config.eval.choices, config.eval.group)))
    return task
