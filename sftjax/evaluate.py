"""`sftjax evaluate`: what a model, an export or a checkpoint scores on any data.

It trains nothing, needs no training data, and writes to no run's folder but its cache.
"""

import argparse
import contextlib
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax import exits, hf, parallel, tasks
from sftjax import params as params_lib
from sftjax.clean import prepare
from sftjax.data.mixing.spec import sources
from sftjax.errors import CheckpointError, ConfigError, DataError, NotFoundError
from sftjax.evaluation.evaluator import Evaluator
from sftjax.evaluation.sets import Sets
from sftjax.files import finite, read_json, write_atomic
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.terminal import columns, json_text, show
from sftjax.training import build, xla_flags
from sftjax.training import workdir as workdir_lib
from sftjax.training.checkpoint import disk
from sftjax.training.checkpoint.table import read_weights
from sftjax.training.identity import read_manifest

OPTIONS = ("--model", "--data", "--config", "--step", "--shots", "--json", "--out")


def main(argv: Sequence[str]) -> None:
    """Measure models: sftjax evaluate --model=DIR [--model=...] --data=FILE [--json]."""
    parser = argparse.ArgumentParser(
        prog="sftjax evaluate",
        allow_abbrev=False,
        description="What models score on data. Without --config the defaults hold, in float32;"
        " a workdir brings its own config. --config.KEY=VALUE overrides one key of either.",
    )
    add = parser.add_argument
    add("--model", action="append", required=True, help="a Hugging Face directory, an export, or"
        " the workdir of a run; given again, models are measured side by side")  # fmt: skip
    add("--data", action="append", default=[], help="a file, glob or hub data set; without it, the"
        " data.validation and data.test of the config")  # fmt: skip
    add("--config", default="", help="FILE.py or FILE.py:ARG")
    add("--step", default="latest", help="of a workdir: latest, best or a number")
    add("--shots", default="", help="numbers with commas: each in turn as eval.shots")
    add("--json", action="store_true", help="print one JSON object, and nothing else")
    add("--out", default="", help="a file for the same JSON and each row's values, for sftjax compare")
    options, rest = parser.parse_known_args(argv)
    xla_flags.settle()
    found = []
    for path in options.model:
        for shots in options.shots.split(","):
            more = [f"--config.eval.shots={shots.strip()}"] if shots else []
            config, run = configured(path, options.config, [*rest, *more])
            for data in map(typed, options.data) if options.data else _own_data(config):
                found.append(evaluate(config, data, run, options.step))
                found[-1] |= {"model": path} | ({"shots": config.eval.shots} if shots else {})
    if options.out:
        write_atomic(options.out, json.dumps(finite(_one(found)), allow_nan=False) + "\n")
    shown = _one([{k: v for k, v in one.items() if k != "rows"} for one in found])
    show(json_text(finite(shown)) if options.json else table(found))


def _one(found):
    return found[0] if len(found) == 1 else {"results": found}


def configured(path: str, spec: str, argv: Sequence[str]) -> tuple[ConfigDict, Path | None]:
    """(config, workdir; None if it is no run): how a model is measured. spec: a config file, or "". argv: overrides."""
    run = Path(path).expanduser()
    is_run = (run / "checkpoints").is_dir() and (run / "config.json").is_file()
    if spec:
        config = config_lib.load(spec)
    elif is_run:
        config = workdir_lib.read_config(run)
    else:
        config = config_lib.get_default()
        config.model.dtype = "float32"
    if not is_run:
        config.model.path, config.model.init = path, "pretrained"
        if not spec:
            folder = hf.resolve(path, weights=False)
            file = folder / "config.json"
            if not file.is_file():
                raise NotFoundError(
                    f"--model={path} is no model: it has no config.json; give a Hugging Face"
                    " directory, an export, or the workdir of a run"
                )
            c = hf.load_model(folder).config
            if getattr(c, "learned_positions", False):  # a longer row can't be measured
                config.data.max_length = min(config.data.max_length, c.max_positions)
    overridden = config_lib.override_all(config, argv, OPTIONS)
    if not is_run and not spec and "task" not in overridden:
        config.update(task=tasks.of_head(read_json(file, ConfigError)))
    config_lib.check(config, spec, overridden)
    return config, run if is_run else None


def typed(path: str) -> str:
    """A path of the command line from the root on, as what is measured may lie elsewhere."""
    head, mark, rest = path.partition("#")
    where = Path(head).expanduser()
    there = where.exists() or glob.glob(str(where))
    return f"{where.absolute()}{mark}{rest}" if there else path


def _own_data(config):
    d = config.data
    own = [path for text in (d.validation, d.test) for path in text.split(",") if path.strip()]
    if not own:
        raise ConfigError("--data is missing, and the config has no data.validation or data.test")
    return list(dict.fromkeys(own))


def evaluate(config: ConfigDict, data: str, run: Path | None = None, step: str = "latest") -> dict[str, Any]:
    """{"data", "n" rows, "metrics": {name: value}, "tables"} of the config's model on `data`.

    run: the workdir of which a checkpoint is measured, else model.path itself is; step: which, see disk.find. Raises:
    NotFoundError, CheckpointError, DataError, ConfigError.
    """
    if "," in data and not Path(data).exists():
        raise ConfigError(f"--data={data}: name one data set each time: --data=A --data=B")
    if run is None and step != "latest":
        raise ConfigError(f"--step={step} is of a workdir's checkpoints, and {config.model.path} is none")
    home = workdir_lib.began_in(run.absolute()) if run else Path.cwd()
    mesh = parallel.make_mesh({axis: config.mesh[axis] for axis in parallel.AXES})
    folder = run.absolute() if run else cache_folder()
    with contextlib.chdir(home), workdir_lib.compile_cache(folder), jax.set_mesh(mesh):
        task = tasks.make(config, load_tokenizer(config))
        if run is None and config.model.quantize and not config.adapter.kind:  # nothing is trained here
            config = config.copy_and_resolve_references()
            config.optim.trainable = ((".*", False),)
        model, trainable = build.make_model(config, task)
        params, state, at = _weights(config, task, model, trainable, mesh, run, step)
        sets = Sets(config, task, Path(config.data.cache_dir or folder / "cache/tokens"), mesh)
        if config.eval.shots and (config.data.train or config.data.sources):
            every = (prepare.training_rows(one.config, task, sets.cache) for one in sources(config))
            sets.records = [rows.train for rows in every]
        sets.open(data, "")
        [facts] = sets.facts["evaluation"].values()  # those of questions come beside
        asked = ""
        if task.generates:
            [rows] = (sets.opened[name] for name in sets.sets)
            try:
                sets.open("", data)
            except DataError as e:  # of one row among others it is a mistake
                if e.kind != "no_prompt" or e.where != rows.where(0):
                    raise
                asked = "these rows ask nothing: only their loss is measured"
        found = Evaluator(task, model, sets, config).full(params, state, rows=True)
    if asked:
        show(asked, file=sys.stderr)
    # One set of rows: the answers to them stand under the same names as their loss.
    bare = lambda tree: {k.partition("/")[2]: v for k, v in tree.items()}  # noqa: E731
    out: dict[str, Any] = {"data": data, "n": facts["rows"]}
    out["metrics"] = bare(found["losses"]) | {k: v for k, v in found.items() if type(v) is float}
    out |= {k: bare(found[k]) for k in ("errors", "tables") if k in found}
    if baselines := [x for some in found.get("baselines", {}).values() for x in some.items()]:
        out["baselines"] = dict(baselines)
    if sets.questions:
        out["questions"] = len(sets.questions)
    out["rows"] = found.get("rows", {})
    return out | ({"step": at} if run else {})


def _weights(config, task, model, trainable, mesh: Mesh, run, step):
    """(parameters, model_state, step)."""
    if run is None:
        return *build.make_params(config.model, model, trainable, mesh, seed=config.seed), None
    directory = run / "checkpoints"
    best = config.eval.best
    at = disk.find(directory, step, best, task.lower_is_better(best))
    nothing = optax.identity()  # in place of the optimizer, whose state is not read
    whole = build.abstract_state(config.model, model, trainable, nothing, mesh)
    target, base = dict(params=whole.params, frozen=whole.frozen, model_state=whole.model_state), None
    if config.adapter.kind or config.model.quantize:  # a checkpoint holds none of the base
        new = task.tokenizer.convert_tokens_to_ids(list(config.data.add_tokens)) if task.tokenizer else []
        base, _ = build.make_params(config.model, model, trainable, mesh, seed=config.seed, new=new)
        target["frozen"] = None
        if read_manifest(directory / "manifest.json")["identity"].get("base", "") != workdir_lib.base_of(config):
            raise CheckpointError(
                f"{directory} holds adapters of another base than model.path has now, or of another kind or scale"
            )
    found = read_weights(directory / str(at), target)
    return params_lib.combine(found["params"], found["frozen"] if base is None else base), found["model_state"], at


def cache_folder() -> Path:
    """Where tokenised rows and compiled programs of no run are kept: $SFTJAX_CACHE."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SFTJAX_CACHE") or Path(home) / "sftjax")


def table(found: Sequence[dict[str, Any]]) -> str:
    """The results side by side: a row for each metric, a column for each model and data set."""
    names = list(dict.fromkeys(k for one in found for k in one["metrics"]))
    short = {one["model"]: Path(one["model"]).name for one in found}
    if len(set(short.values())) < len(short):
        short = {path: path for path in short}
    head = [
        f"{short[one['model']]} on {Path(one['data']).name}" + (f", {one['shots']} shots" if "shots" in one else "")
        for one in found
    ]
    rows = [["", *head], ["rows", *(f"{one['n']:,}" for one in found)]]
    if any(one.get("questions", one["n"]) != one["n"] for one in found):
        rows.append(["questions", *(f"{one.get('questions', 0):,}" for one in found)])
    for name in names:
        values = (one["metrics"].get(name) for one in found)
        rows.append([name, *("-" if v is None else f"{v:.4f}" for v in values)])
    return columns(rows, range(1, len(found) + 1))


if __name__ == "__main__":
    exits.run(main)
