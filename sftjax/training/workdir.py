"""The workdir of a run: whose it is, the config and environment it keeps, its compile cache."""

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from sftjax import config as config_lib
from sftjax.errors import ConfigError, WriteError, writing
from sftjax.files import parse_json, read_json, refuse_url, write_atomic
from sftjax.terminal import printable
from sftjax.training import checkpoint

if TYPE_CHECKING:
    from sftjax.training.data import Feed


def prepare_workdir(config: ConfigDict, workdir: Path | str) -> Path:
    """Make the workdir, or check that the one found is this config's; write config and env."""
    refuse_url("--workdir", workdir, ConfigError)
    workdir = Path(workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as e:
        raise WriteError(f"--workdir={workdir} cannot be written: {e.strerror or e}") from None
    new, file = config_lib.to_dict(config), workdir / "config.json"
    began = began_in(workdir)
    if not _trained(workdir):
        # Nothing trained yet: a first start that failed must not bind its workdir.
        if jax.process_index() == 0:
            (workdir / "checkpoints" / "manifest.json").unlink(missing_ok=True)
    elif file.exists():
        old = read_json(file, ConfigError)
        if not isinstance(old, dict):
            raise ConfigError(f"{file} is {old!r:.40}, expected the config of the run that began")
        _same_config(old, new, workdir, began)
    if jax.process_index() == 0:
        for path, value in ((file, new), (workdir / "env.json", environment(began))):
            with writing("the file", path):
                write_atomic(path, json.dumps(value, indent=2) + "\n")
    return workdir


def began_in(workdir: Path) -> Path:
    """The directory from which the relative paths of a run's config are taken: where it began.

    Here, for a run that begins, or whose first directory is not there any more.
    """
    said, here = workdir / "env.json", Path.cwd()
    if not _trained(workdir) or not said.exists():
        return here
    try:
        first = Path(parse_json(said.read_text(encoding="utf-8"))["directory"])
        return first if first.is_absolute() and first.is_dir() else here
    except (OSError, ValueError, KeyError, TypeError):
        return here


def _trained(workdir):
    return any(p.name.isdecimal() for p in (workdir / "checkpoints").glob("*"))


def _same_config(old, new, workdir, began):
    old, new = _flat(old), _flat(new)

    def meant(key, value):  # by a path, however it is written
        if key not in config_lib.PATHS or not isinstance(value, str):
            return value
        parts = value.split(",")
        return [os.path.normpath(began / part.strip()) if part.strip() else "" for part in parts]

    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    keys = [k for k in keys if meant(k, old.get(k)) != meant(k, new.get(k))]
    keys = [k for k in keys if not k.startswith(config_lib.FREE)]
    if keys:
        lines = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys[:10])
        raise ConfigError(
            f"--workdir={workdir} belongs to a run with another config:\n{lines}\nUse another"
            " workdir, or the same settings to resume that run."
        )


def warn(config: ConfigDict) -> None:
    """Say on standard error what of a config a run rarely has on purpose."""
    if jax.process_index() == 0:
        for line in config_lib.unusual(config):
            logging.getLogger("sftjax").warning("%s", printable(line))


def manifest(config: ConfigDict, feed: "Feed") -> dict:
    """What checkpoints belong to: the data as tokenised (so its files, tokenizer and template)."""
    return checkpoint.make_manifest(config_lib.to_dict(config), {"tokenised data": feed.identity})


def _flat(tree, prefix="") -> dict:
    out: dict[str, Any] = {}
    for k, v in tree.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


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
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        commit = done.stdout.strip() or None
    return {
        "command": sys.argv,
        "directory": str(directory or Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: checkpoint.version(p) for p in (*packages, "transformers", "numpy")},
        "devices": [str(d.device_kind) for d in jax.devices()],
        "processes": jax.process_count(),
        "commit": commit,
    }
