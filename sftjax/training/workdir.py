"""The workdir of a run: whose it is, the config and environment it keeps, its compile cache."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax import hf
from sftjax.errors import ConfigError, WriteError
from sftjax.files import read_json, read_object, refuse_url, write_atomic
from sftjax.training import log, resume
from sftjax.training.checkpoint import disk
from sftjax.training.data import Feed
from sftjax.training.identity import sha256, version


def make_workdir(workdir: Path | str) -> Path:
    """The folder of a run, made if it is not there. Raises: ConfigError, WriteError."""
    refuse_url("--workdir", workdir, ConfigError)
    workdir = Path(workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as e:
        raise WriteError(f"--workdir={workdir} cannot be written: {e.strerror or e}") from None
    return workdir


def prepare_workdir(config: ConfigDict, workdir: Path | str) -> Path:
    """Make the workdir, or check that the one found is this config's; write config and env."""
    workdir = make_workdir(workdir)
    new, file = config_lib.to_dict(config), workdir / "config.json"
    began = began_in(workdir)
    if not _trained(workdir):
        # Nothing trained yet: a first start that failed must not bind its workdir.
        if jax.process_index() == 0:
            (workdir / "checkpoints" / "manifest.json").unlink(missing_ok=True)
    elif file.exists():
        resume.check_config(file, new, began)
    env = resume.joined(workdir / "env.json", environment(began), _trained(workdir))
    if jax.process_index() == 0:
        for path, value in ((file, new), (workdir / "env.json", env)):
            write_atomic(path, json.dumps(value, indent=2) + "\n")
    return workdir


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run, and defaults for what its config.json lacks. Raises: ConfigError."""
    file = workdir / "config.json"
    config, values = config_lib.get_default(), read_json(file, ConfigError)

    def fill(group, given, prefix):
        for key, value in given.items():
            if key not in group:
                raise ConfigError(f"{file}: {prefix}{key} is no key of this version's configs")
            if isinstance(group[key], ConfigDict) and isinstance(value, Mapping):
                fill(group[key], value, f"{prefix}{key}.")
            else:
                group[key] = _tuples(value)

    try:
        fill(config, values, "")
    except (AttributeError, TypeError, ValueError) as e:
        raise ConfigError(f"{file}: {' '.join(str(e).split())}") from e
    config_lib.check(config)
    return config


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def began_in(workdir: Path) -> Path:
    """Where a run began, by which its relative paths are taken; else the directory here."""
    first: Any = read_object(workdir / "env.json").get("directory")
    known = _trained(workdir) and isinstance(first, str) and os.path.isabs(first) and os.path.isdir(first)
    return Path(first) if known else Path.cwd()


def _trained(workdir):
    return any(p.name.isdecimal() for p in (workdir / "checkpoints").glob("*"))


def warn(config: ConfigDict) -> None:
    """Say on standard error what of a config a run rarely has on purpose."""
    for line in config_lib.unusual(config):
        log.warn(line)
    if config.model.attention == "blockwise" and jax.default_backend() == "gpu":
        log.warn("model.attention=blockwise is slow on a GPU; what is faster: docs/attention.md")


def manifest(config: ConfigDict, feed: Feed, model: Any) -> dict:
    """What checkpoints belong to: the tokenised data, the config.json of a model that has one."""
    identity, task = {"tokenised data": feed.identity}, feed.task
    reading = json.dumps(task.key(), sort_keys=True, default=str)
    hashes = {"how rows are read (the chat template, special tokens)": reading}
    if task.tokenizer is not None:
        hashes["the tokenizer"] = task.tokenizer.backend_tokenizer.to_str()
    if getattr(model, "source", None) is not None:
        hashes["the model's config.json"] = json.dumps(model.source.config, sort_keys=True)
        identity["model"] = sha256(hashes["the model's config.json"])
    if base := base_of(config):
        hashes["the base of the adapters (model.path), or their kind or scale"] = identity["base"] = base
    known = {name: sha256(text) for name, text in hashes.items()}
    found = dict(identity=identity, hashes=known, steps=feed.steps, best=config.eval.best, **feed.facts)
    return json.loads(json.dumps(found))


def base_of(config: ConfigDict) -> str:
    """What adapters are of, which checkpoints do not hold: the files' checksums, or the seed; and their scale."""
    if not config.adapter.kind and not config.model.quantize:
        return ""
    files = sorted(hf.resolve(config.model.path).glob("*.safetensors")) if config.model.init == "pretrained" else ()
    base = {f.name: disk.measure(f) for f in files} or config.seed
    fewer = [config.model.quantize] * bool(config.model.quantize)
    return json.dumps([base, config.adapter.kind, config.adapter.rank, config.adapter.alpha, *fewer])


@contextlib.contextmanager
def compile_cache(workdir: Path) -> Iterator[None]:
    """Keep compiled programs in the workdir, unless the user has named another place."""
    # JAX adds its options to the class as it is imported, so its types have none of them.
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir / "cache" / "xla"))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def environment(directory: Path | str = "") -> dict:
    """Versions, devices and the command, for env.json; directory: where the run began."""
    packages = ("sftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    commit = None
    with contextlib.suppress(OSError):  # no git here
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = done.stdout.strip() or None
    return {
        "command": sys.argv,
        "directory": str(directory or Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: version(p) for p in (*packages, "transformers", "numpy")},
        "devices": [str(d.device_kind) for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": commit,
    }
