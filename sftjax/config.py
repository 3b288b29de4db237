"""Every default, once. An experiment file starts from get_default() and sets what differs.

Durations take any unit: "300 steps", "3 epochs", "50_000 examples", "2e6 tokens", "10%", or a bare number of steps; see
`duration`.
"""

import argparse
import ast
import contextlib
import difflib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from sftjax.errors import ConfigError
from sftjax.files import refuse_url, url_problem
from sftjax.training.config_file import line_of, load
from sftjax.training.durations import amount, duration  # noqa: F401 (offered here)

LR = 2e-5


def get_default() -> ConfigDict:
    """The whole tree, locked: setting a key that is not here is an error."""
    c = ConfigDict()
    c.seed = 0
    # causal_lm | seq2seq | classification | multi_label | regression | token_labels | masked_lm | image_classification,
    # or your own: "path/to/file.py:ClassName"; sftjax/tasks
    c.task = "causal_lm"

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face directory, hub id, or (with init="random") a config.json
    c.model.init = "pretrained"  # pretrained | random
    c.model.dtype = "bfloat16"  # of activations and matmuls
    c.model.param_dtype = "float32"  # of trained parameters and their moments
    c.model.frozen_dtype = ""  # of frozen parameters; "" = as in the files, so nothing is lost
    c.model.quantize = ""  # of frozen linear layers: nf4 | int4 | int8; "" = as they are
    # What a layer keeps for the backward pass: none (is computed again) | dots | attention | full | offload, or one of
    # jax.checkpoint_policies; models/layer.py
    c.model.remat = "dots"
    c.model.attention = "blockwise"  # blockwise | xla | splash (TPU) | path/to/file.py:NAME
    c.model.scan = True  # layers under lax.scan; False unrolls them
    c.model.embed_noise = 0.0  # NEFTune's alpha, such as 5: noise on the embeddings, in training
    c.model.vocab_multiple = 128  # embedding and head are padded to it, so they can be sharded
    c.model.split = ()  # cut the stack of layers here, so that rules can tell the parts apart

    c.data = ConfigDict()
    c.data.train = ""  # path, glob, directory, or hub id; several with commas
    # Several sources, in place of train: (dict(path="a.jsonl", weight=0.7), dict(path=...)). Keys: path, name, one of
    # weight (share of tokens) | count (documents) | replay (share of the whole), and those of data that differ for its
    # rows: limit, fields, train_on, ...; see data/mix.py
    c.data.sources = ()
    c.data.temperature = 1.0  # sources without a weight share by size ** (1 / temperature)
    c.data.phases = ()  # (dict(until="30%", weights=dict(a=0.9, b=0.1)), ..., dict(weights=...))
    c.data.streaming = False  # read shards as a stream, tokenise nothing first; needs steps
    c.data.shuffle_window = 10_000  # rows of a source shuffled together when streaming
    c.data.validation = ""  # sets whose loss is measured during the run, named by file stem
    c.data.test = ""  # set answered by generation before and after the run
    c.data.limit = 0  # use the first so many training records; 0 = all
    c.data.tokenizer = ""  # directory or hub id; "" = model.path
    c.data.add_tokens = ()  # special tokens that the tokenizer, and the model, get in addition
    c.data.template = ""  # a jinja chat template, or the name of one of the tokenizer's
    c.data.system = ""  # system prompt for conversations that have none
    c.data.template_kwargs = ""  # JSON for the template, such as {"enable_thinking": false}
    c.data.fields = ConfigDict(
        dict(prompt="", completion="", input="", system="", messages="", text="", tools="")
    )  # your column names; "" = found by their usual names
    c.data.fields.role = ""  # of a message: your names of its keys
    c.data.fields.content = ""
    # What is wanted of a text: a label, labels, a number, tags, or answers; several names: "a|b".
    c.data.fields.label = ""
    c.data.fields.image = ""
    c.data.fields.pair = ""  # the second text of a pair, of which a label or a number is wanted
    # Of a classification: the labels' names in order, ("negative", "positive"); then a whole number in a file is an
    # index. Or {value in the file: name}. () = those that the model knows.
    c.data.labels = config_dict.FieldReference((), field_type=object)
    c.data.roles = ""  # your names of roles, beside the usual ones: "USER=user,SYSTEM=assistant"
    c.data.train_on = "assistant"  # assistant | last | all | roles with commas
    c.data.stop_token = "turn"  # train the stop token of: trained turns | all | last | none
    # Reasoning before the last user's message, after it, and an empty think block:
    # train | keep (in the text, not trained) | drop (taken out before rendering; not of empty)
    c.data.reasoning = ConfigDict(dict(history="train", last="train", empty="keep"))
    c.data.max_length = 1024  # tokens in a row
    c.data.max_target_length = 0  # seq2seq: and of targets in a row; 0 = max_length
    c.data.overlong = "truncate_end"  # truncate_end | truncate_prompt | drop | split | error
    c.data.packing = "bfd"  # bfd | bfd_split | wrapped | none
    c.data.buckets = ()  # none: a batch is as wide as the first of (256, 512) that holds its rows
    c.data.eval_packing = "bfd"  # the same, for the validation sets; the loss does not depend on it
    c.data.clean = ConfigDict()  # see sftjax/clean/rules.py; rejects and report go to the workdir
    c.data.clean.rules = ()  # names of rules, or ("all",); () = off
    c.data.clean.near = 0.7  # near_duplicate: least similarity of two rows, 0 to 1
    c.data.clean.ngram = 13  # contamination: words in a row shared with data.validation or test
    c.data.clean.max_tokens = 0  # too_long: more tokens than this; 0 = max_length
    c.data.clean.suspects = 0.01  # label_suspects: the share of rows to list
    c.data.clean.remove_suspects = False  # label_suspects: remove what is listed
    c.data.split = ConfigDict()
    c.data.split.share = 0.0  # of data.train, for validation, by a hash of the prompt; 0 = none
    c.data.split.group_by = ""  # a field: rows with one value of it stay on one side
    c.data.split.stratify_by = ""  # a field: hold the share within each of its values
    c.data.augment = ()  # of training images: names in ops/pixels.py, one after the other
    c.data.on_error = "raise"  # of a bad row: raise | skip (to rejects.jsonl in the cache)
    c.data.max_skipped = 0.01  # skip: the share of rows past which the run ends with an error
    c.data.cache_dir = ""  # tokenised data; "" = <workdir>/cache
    c.data.workers = 0  # loader processes; 0 = threads
    c.data.prefetch = 2  # batches kept ready on the device

    c.train = ConfigDict()
    c.train.batch_size = 32  # rows in a step, over all devices and micro-batches
    c.train.micro_batches = 1
    c.train.duration = "1 epoch"
    c.train.log_every = "10 steps"
    c.train.checkpoint_every = "25%"
    c.train.keep = 2  # newest checkpoints kept, beside the best
    c.train.export = True  # write a Hugging Face directory at the end
    c.train.tensorboard = True
    c.train.trackers = ()  # also write to "wandb", "mlflow", "trackio": extras of these names
    # A step whose loss or gradient is not finite changes nothing; so many of them in a row end the run with an error
    # (stop), or go on from the last checkpoint with the data that follow (rollback). A spike is a loss so many standard
    # deviations above those before it; 0 = none.
    c.train.bad_steps = 10
    c.train.on_nonfinite = "stop"  # stop | rollback
    c.train.spike = 6.0
    c.train.on_spike = "log"  # log | stop | rollback
    c.train.grace = 120.0  # seconds that a stop by a signal may take; then the run ends as it is

    c.loss = ConfigDict()
    c.loss.normalise = "tokens"  # tokens | documents
    c.loss.label_smoothing = 0.0
    c.loss.z_loss = 0.0
    c.loss.dft = False  # Dynamic Fine-Tuning: each token's loss times its own probability
    c.loss.load_balance = 0.0  # coefficient of a mixture of experts' load-balancing loss
    # Of labels: cross_entropy | focal; of several at once: bce | focal; of numbers: mse | mae | huber; "" = the first
    # of them
    c.loss.kind = ""
    c.loss.focal_gamma = 2.0  # how much less a label counts that is right already
    c.loss.huber_delta = 1.0  # from where on an error counts as in mae, in standard deviations
    c.loss.mask_rate = 0.15  # of masked_lm: the share of tokens that are to be found
    c.loss.class_weights = ""  # of labels: "balanced", or a number for each: "1,2.5"
    c.loss.chunk_tokens = 4096  # positions whose logits exist at a time, at most

    c.adapter = ConfigDict()  # small trained changes of weights that stay as they are: docs/adapters.md
    c.adapter.kind = ""  # "" = none | lora | rslora | dora | pissa | olora
    c.adapter.rank = 16
    c.adapter.ranks = ()  # of some weights: ordered (preset of targets or regex, rank) pairs
    c.adapter.alpha = 32.0  # a change counts alpha / rank; of rslora, alpha / sqrt(rank)
    c.adapter.targets = ("all_linear",)  # attention | mlp | all_linear, or regexes over parameters' names
    c.adapter.dropout = 0.0  # of what an adapter reads

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | adam | sgd | adafactor | lion | muon | adamw8 (moments of 8 bits)
    c.optim.lr = LR  # with an adapter, 10 times that, unless a config sets it
    c.optim.schedule = "cosine"  # constant | linear | cosine | inverse_sqrt | wsd
    c.optim.warmup = "3%"
    c.optim.decay_phase = "20%"  # length of wsd's last phase
    c.optim.floor = 0.0  # lowest learning rate, as a share of lr
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.momentum = 0.9  # of sgd and muon
    c.optim.clip = 1.0  # global gradient norm; 0 = none
    c.optim.weight_decay = 0.0
    # Ordered (regex over the whole parameter name, value): the first match wins.
    c.optim.trainable = ((".*", True),)
    c.optim.lr_multipliers = ((".*", 1.0),)
    c.optim.layer_decay = 1.0  # of lr: each layer has so much of that of the layer above it
    # Norms and biases are not decayed; a "b" inside a weight is a factor of it.
    c.optim.decay = ((r".*(norm/scale|(?<!/w)/b)", 0.0), (".*", 1.0))

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, context=1, tensor=1, expert=1))
    c.mesh.coordinator = ""  # host:port of process 0, or "auto" on a cluster JAX knows
    c.mesh.processes = 1
    c.mesh.process_id = 0
    c.mesh.timeout = 300  # seconds to wait for the other processes

    c.eval = ConfigDict()
    c.eval.every = "20%"  # validation loss; also at the end
    c.eval.batch_size = 32
    # The metric that chooses the best checkpoint: "<set>/loss", or "answers/exact_match", for which data.test is
    # answered at every evaluation; "" = none
    c.eval.best = ""
    c.eval.patience = 0  # stop after so many evaluations without a better eval.best; 0 = never
    c.eval.samples = 3  # answers of the test set shown before and after
    # Of the answers to data.test: names in evaluation/metrics.py, or path/to/file.py:function
    c.eval.metrics = ("exact_match",)
    c.eval.shots = 0  # so many training rows stand before each question, with their answers
    c.eval.answer = ""  # of `number`: the pattern before it, such as "####"
    c.eval.choices = ""  # of `choice`: the field with a row's candidates; "" = all references
    c.eval.draws = 1  # so many answers to each question, with generate.temperature
    c.eval.group = ""  # the field that rows share which are not independent: of standard errors
    c.eval.test_limit = 0  # use the first so many test records; 0 = all

    c.profile = ConfigDict()
    c.profile.steps = ""  # "10-12": a trace of these steps, to <workdir>/profile; "" = none

    c.generate = ConfigDict()
    c.generate.max_new_tokens = 64
    c.generate.batch_size = 64
    c.generate.temperature = 0.0  # 0 = greedy
    c.generate.beams = 1  # of a beam search; 1 = none
    c.generate.length_penalty = 1.0  # beams: the power of its length that divides an answer's score
    c.generate.top_k = 0  # 0 = all
    c.generate.top_p = 1.0
    return c.lock()


# Keys that may change between a run and its resumption: they do not change what is learned.
FREE = tuple(
    """mesh. profile. data.cache_dir data.workers data.prefetch model.remat train.log_every
train.checkpoint_every train.keep train.export train.tensorboard train.trackers train.bad_steps
train.on_nonfinite train.spike train.on_spike train.grace""".split()
)
# So may these, which do not either, but metrics may then differ; and train.duration may grow.
MEASURES = ("eval.", "generate.", "data.validation", "data.test", "data.eval_packing")
# The least and the most that a number may be. What other files check with more knowledge (the mesh, the shares of
# sources, the rules of cleaning) is not repeated here.
_BELOW_1 = math.nextafter(1, 0)  # a mean over the past that has a 1 here never moves
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "data.limit data.clean.max_tokens eval.patience eval.samples eval.test_limit": (0, math.inf),
    "data.max_target_length generate.top_k": (0, 2**31),
    "eval.shots": (0, 1000),
    "eval.draws": (1, 10_000),
    "data.workers": (0, 1024),
    "data.prefetch": (0, 10_000),
    "adapter.rank train.keep train.bad_steps loss.chunk_tokens eval.batch_size generate.batch_size": (1, 2**31),
    "data.max_length train.batch_size train.micro_batches generate.max_new_tokens": (1, 2**31),
    "data.shuffle_window data.clean.ngram model.vocab_multiple": (1, 2**31),
    "adapter.alpha": (1e-6, math.inf),
    "model.embed_noise": (0, math.inf),
    "adapter.dropout": (0, _BELOW_1),
    "data.max_skipped data.clean.near data.clean.suspects data.split.share": (0, 1),
    "data.temperature": (1e-3, math.inf),
    "loss.label_smoothing optim.floor generate.top_p": (0, 1),
    "loss.mask_rate optim.layer_decay": (1e-6, 1),
    "loss.focal_gamma loss.huber_delta generate.temperature train.spike": (0, math.inf),
    "optim.b1 optim.b2 optim.momentum": (0, _BELOW_1),
    "loss.z_loss loss.load_balance optim.lr optim.eps optim.clip optim.weight_decay": (0, math.inf),
    "mesh.data mesh.fsdp mesh.context mesh.tensor mesh.expert": (-1, 2**20),
    "mesh.processes": (1, 2**20),
    "mesh.process_id": (0, 2**20),
    "mesh.timeout train.grace": (1, 10**6),
    "generate.beams": (1, 1000),
    "generate.length_penalty": (-100, 100),
}
RANGES = {key: limits for keys, limits in _RANGES.items() for key in keys.split()}
# Numbers that are allowed, and said: more than this, and why that is worth a line.
UNUSUAL = {
    "optim.lr": (1.0, "a step may be larger than the weights themselves, and losses may diverge"),
    "optim.weight_decay": (10.0, "each step takes off lr times this of every weight"),
}
# Names of which there are so many; a test compares them with the code that reads them.
_CHOICES = {
    "model.init": ("pretrained", "random"),
    "model.dtype model.param_dtype": ("float32", "bfloat16", "float16", "float64"),
    "model.frozen_dtype": ("", "float32", "bfloat16", "float16", "float64"),
    "data.stop_token": ("turn", "all", "last", "none"),
    "data.reasoning.history data.reasoning.last": ("train", "keep", "drop"),
    "data.reasoning.empty": ("train", "keep"),
    "data.overlong": ("truncate_end", "truncate_prompt", "drop", "split", "error"),
    "data.packing data.eval_packing": ("bfd", "bfd_split", "wrapped", "none"),
    "data.on_error": ("raise", "skip"),
    "adapter.kind": ("", "lora", "rslora", "dora", "pissa", "olora"),
    "model.quantize": ("", "nf4", "int4", "int8"),
    "loss.normalise": ("tokens", "documents"),
    "loss.kind": ("", "cross_entropy", "focal", "bce", "mse", "mae", "huber"),
    "optim.schedule": ("constant", "linear", "cosine", "inverse_sqrt", "wsd"),
    "train.on_nonfinite": ("stop", "rollback"),
    "train.on_spike": ("log", "stop", "rollback"),
    "optim.name": ("adamw", "adam", "sgd", "lion", "adafactor", "muon", "adamw8"),
}
CHOICES = {key: names for keys, names in _CHOICES.items() for key in keys.split()}
DURATIONS = """train.duration train.log_every train.checkpoint_every eval.every
optim.warmup optim.decay_phase""".split()
# Keys that name files and folders, several with commas; relative ones are taken from where a run began, also by its
# resumption elsewhere.
PATHS = """task model.path model.attention data.train data.validation data.test data.tokenizer
data.template data.cache_dir""".split()
# Tuples of names, which may also be written with commas.
NAMES = "adapter.targets data.add_tokens data.augment data.clean.rules eval.metrics train.trackers".split()
WHOLE = ("model.split", "data.buckets")  # positive whole numbers in a row
RULES = {  # ordered (regex, value) pairs: what a value is
    "optim.trainable": (bool, "True or False"),
    "optim.lr_multipliers": (float, "a number of 0 or more"),
    "optim.decay": (float, "a number of 0 or more"),
    "adapter.ranks": (int, "a whole number from 1 on"),
}
# Keys of `data` that an entry of data.sources may set for its rows alone.
OWN = """limit fields roles train_on stop_token reasoning system overlong template_kwargs clean
split augment on_error max_skipped""".split()


# ---- reading -------------------------------------------------------------------------------


def parse(argv: Sequence[str], **flags: str | float | bool | None) -> tuple[ConfigDict, argparse.Namespace]:
    """(config, namespace) of a command line.

    --config=FILE[:ARG] is required; --config.a.b=VALUE overrides one key; `flags` are further options as {name:
    default} (None = required, False = a switch), returned in the namespace.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:ARG")
    for name, default in flags.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            kind = str if default is None else type(default)
            parser.add_argument(f"--{name}", type=kind, default=default, required=default is None)
    known, rest = parser.parse_known_args(argv)
    for name in ("config", *flags):
        refuse_url(f"--{name}", getattr(known, name), ConfigError)
    config = load(known.config)
    overridden = override_all(config, rest, ["--config", *(f"--{name}" for name in flags)])
    check(config, known.config, overridden)
    return config, known


def override_all(config: ConfigDict, argv: Sequence[str], options: Sequence[str]) -> set[str]:
    """Apply every --config.a.b=VALUE of a command line; returns the keys. options: the others, for a ConfigError."""
    overridden, words = set[str](), iter(argv)
    for word in words:
        match = re.fullmatch(r"--config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
        if not match:
            raise ConfigError(f"unknown option {word}; the options are {', '.join(options)}")
        value = next(words, None) if match[2] is None else match[2]
        if value is None:
            raise ConfigError(f"--config.{match[1]} needs a value")
        override(config, match[1], value)
        overridden.add(match[1])
    return overridden


def override(config: ConfigDict, key: str, text: str, what: str = "--config.") -> None:
    """Set config.<key> from text, cast to the type of its value. what: stands before the key in a ConfigError."""
    parts, node = key.split("."), config
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            siblings = list(node) if isinstance(node, ConfigDict) else []
            where = ".".join(["config", *parts[:i]])
            near = difflib.get_close_matches(part, siblings, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(siblings) or 'none'}"
            raise ConfigError(f"{what}{key}: {where} has no key {part!r}; {hint}")
        group, node = node, node[part]
    if isinstance(node, ConfigDict):
        raise ConfigError(f"{what}{key} is a group; set one of {', '.join(node)}")
    group[parts[-1]] = _cast(text, node, f"{what}{key}")


def _cast(text, old, key):
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            value = float(value)
    if key.endswith("data.labels") and isinstance(value, (tuple, list, dict)):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, str) and key.removeprefix("--config.") in NAMES:
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if isinstance(old, tuple) and isinstance(value, (list, int)):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not type(old):
        raise ConfigError(f"{key}={text}: expected {type(old).__name__}, like {old!r}")
    return value


def check(config: ConfigDict, spec: str = "", overridden: Collection[str] = ()) -> None:
    """Raise ConfigError, with the key, its value and what is expected, for the first wrong value.

    It looks at types and at the tables beside the defaults; what depends on data, model and machine is checked there.
    spec: the file that the config came from, as `load` takes it; the message then begins with its line, unless the key
    is one of those `overridden` since.
    """
    key, problem = next(_problems(config, get_default(), ""), ("", ""))
    if problem and spec and key not in overridden:
        path = spec.partition(":")[0]
        problem = f"{path}:{line_of(path, key)}: {problem}"
    if problem:
        raise ConfigError(problem)


def _problems(group, default, prefix):
    """(key, what is wrong with it) of every wrong value."""
    for key, value in default.items():
        name = f"{prefix}{key}"
        if key not in group:
            yield name, f"the config has no {name}: start from sftjax.config.get_default()"
        elif not isinstance(value, ConfigDict):
            yield from ((name, problem) for problem in _wrong(name, group[key], value))
        elif isinstance(group[key], ConfigDict):
            yield from _problems(group[key], value, f"{name}.")
        else:
            yield name, f"{name}={group[key]!r}: expected a group with {', '.join(value)}"


def _wrong(name, value, default):
    """What is wrong with the value of a key: nothing, or a line."""
    kinds: Any = {float: (int, float), tuple: (tuple, list)}.get(type(default), type(default))
    kinds = (tuple, list, dict, ConfigDict) if name == "data.labels" else kinds
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        yield f"{name}={value!r:.200}: expected {type(default).__name__}, like {default!r}"
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = RANGES.get(name, (-math.inf, math.inf))
        if not (least <= value <= most and abs(value) < math.inf):
            bounds = f"{least} or more" if most == math.inf else f"a number from {least} to {most}"
            if most == math.inf and not abs(value) < math.inf:
                bounds = "a finite number" + f", {least} or more" * (least > -math.inf)
            # Python does not write a whole number of more than 4300 digits.
            digits = isinstance(value, float) or abs(value) < 10**300
            yield f"{name}={repr(value)[:200] if digits else 'a huge number'}: expected {bounds}"
    if name in CHOICES and value not in CHOICES[name]:
        known = " | ".join(choice or repr(choice) for choice in CHOICES[name])
        near = difflib.get_close_matches(value, CHOICES[name], 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{name}={value!r:.200}: expected {known}{hint}"
    if name in PATHS:
        yield from (f"{name}={part}: {said}" for part in value.split(",") if (said := url_problem(part)))
    if name == "data.sources":
        paths = (entry.get("path") for entry in value if hasattr(entry, "get"))
        parts = (part for path in paths for part in str(path).split(","))
        yield from (f"{name}: {part}: {said}" for part in parts if (said := url_problem(part)))
    if name in DURATIONS:
        try:
            amount(value, name)
        except ConfigError as e:
            yield str(e)
    if name in WHOLE and not all(type(n) is int and 0 < n < 2**31 for n in value):
        yield f"{name}={value!r:.200}: expected positive whole numbers, like (4, 8)"
    if name in RULES:
        yield from (f"{name}: {problem}" for rule in value for problem in _wrong_rule(rule, name))


def _wrong_rule(rule, name):
    kind, what = RULES[name]
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
        yield f"{rule!r:.200} is no rule, expected (regex, {what})"
        return
    try:
        re.compile(rule[0])
    except (re.error, RecursionError, OverflowError) as e:
        yield f"{rule[0]!r:.200} is no regex: {e}"
    number = isinstance(rule[1], (int, float) if kind is float else int) and not isinstance(rule[1], bool)
    if not (isinstance(rule[1], bool) if kind is bool else number and (kind is int) <= rule[1] < math.inf):
        yield f"{rule!r:.200}: expected (regex, {what})"


def settle(config: ConfigDict) -> tuple[ConfigDict, str]:
    """The config with optim.lr raised for adapters (LoRA Without Regret, 2025), unless it was set; a line on that.

    Raises: ConfigError for a setting of adapters without a kind of them.
    """
    kind, plain = config.adapter.kind, get_default().adapter
    if other := [k for k in plain if not kind and getattr(config.adapter, k) != plain[k]]:
        raise ConfigError(f"adapter.{other[0]}={config.adapter[other[0]]!r} is read with adapter.kind, and that is ''")
    if not kind or config.optim.lr is not LR:  # a 2e-5 that a config sets is another object
        return config, ""
    config = config.copy_and_resolve_references()
    config.optim.lr = 10 * LR
    return config, f"optim.lr is {10 * LR:g}, ten times its default, as an adapter is trained; set it to choose another"


def unusual(config: ConfigDict) -> list[str]:
    """A line for each value that is allowed, and that a run rarely has on purpose."""
    values = flat(config.to_dict())
    return [
        f"{key}={values[key]:g} is more than {most:g}: {why}"
        for key, (most, why) in UNUSUAL.items()
        if values[key] > most
    ]


def to_dict(config: ConfigDict) -> dict:
    """Plain nested dict (tuples as lists), for config.json."""
    return json.loads(json.dumps(config.to_dict()))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-4} of a nested config."""
    out = dict[str, Any]()
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out
