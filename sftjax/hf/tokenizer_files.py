"""A tokenizer's files, read without running what lies in them, and exported: docs/trust.md."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sftjax.data.masking.template import Tokenizer
from sftjax.errors import ConfigError
from sftjax.files import check_regular, read_json

TEMPLATES = "additional_chat_templates"  # a folder
NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tekken.json", "*.model", "*.tiktoken", "*.model.v*", f"{TEMPLATES}/*.jinja"),
)
BYTES = 1 << 30  # of one file
_REFERENCE = re.compile(r"(?:[\w./-]+--)?(\w+)\.\w+")  # a class in auto_map: file.Class


def open_tokenizer(folder: Path, what: str = "data.tokenizer, else model.path") -> Any:
    """The tokenizer of a directory, whose code is never run. what: the options that name it."""
    from transformers import AutoTokenizer  # slow to import

    for file in files_of(folder, existing=False):
        check_regular(file, ConfigError, BYTES)
        if file.suffix == ".json":
            read_json(file, ConfigError)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as e:  # a library in Rust may panic, which is no Exception
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        problem = f"no tokenizer could be loaded from {folder} ({what})"
        if "trust_remote_code" in str(e):
            raise ConfigError(
                f"{problem}: it is code of its own (auto_map in tokenizer_config.json), and sftjax"
                " runs no code of a model's; name another tokenizer by data.tokenizer"
            ) from e
        raise ConfigError(f"{problem}: {type(e).__name__}: {str(e)[:1000]}") from e


def files_of(folder: Path, existing: bool = True) -> list[Path]:
    """A directory's files of a tokenizer, in order. existing=False: what is no regular file too."""
    found = sorted({path for name in NAMES for path in folder.glob(name)})
    return [path for path in found if path.is_file()] if existing else found


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer so that whatever loads the directory that it came from loads this one."""
    source = Path(tokenizer.name_or_path or os.devnull)
    origin = _origin(source)
    if origin is None or not _same(tokenizer, origin):
        tokenizer.save_pretrained(directory)
    else:
        for file in files_of(source):
            target = directory / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    said = directory / "tokenizer_config.json"
    config = read_json(said, ConfigError) if said.exists() else {}
    new = with_code(_for_all(config, source), source, directory)
    if origin is not None and tokenizer.chat_template != origin.chat_template:
        new = _with_template(new, tokenizer.chat_template, directory)
    if new != config:
        said.write_text(json.dumps(new, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _origin(source):
    """The tokenizer of the directory `source`; None where there is none, or none any more."""
    if not source.is_dir() or not files_of(source):
        return None
    try:
        return open_tokenizer(source)
    except ConfigError:
        return None


def _with_template(config, template, directory):
    """The config beside which `template`, a text or {name: text}, is the only one."""
    for file in files_of(directory):
        if file.parent.name == TEMPLATES or file.name.startswith("chat_template."):
            file.unlink()
    shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
    config = {k: v for k, v in config.items() if k != "chat_template"}
    if isinstance(template, str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif template:
        config["chat_template"] = [{"name": k, "template": v} for k, v in template.items()]
    return config


def _same(one, other) -> bool:
    """Do they make the same tokens of every text? Their chat templates aside."""
    if type(one) is not type(other) or one.special_tokens_map != other.special_tokens_map:
        return False
    if not getattr(one, "is_fast", False):
        return one.get_vocab() == other.get_vocab()
    asked = {"padding": None, "truncation": None}  # for by the last call
    ours, theirs = (json.loads(x.backend_tokenizer.to_str()) | asked for x in (one, other))
    return ours == theirs


def _for_all(config: dict, source: Path) -> dict:
    """A tokenizer_config.json of transformers 5 in the form that version 4 reads too."""
    extra = config.get("extra_special_tokens")
    written = config.get("is_local") is not None  # by it, with what it was called with
    if not (config.get("tokenizer_class") == "TokenizersBackend" or written or isinstance(extra, list)):
        return config
    said = source / "tokenizer_config.json"
    known = read_json(said, ConfigError) if said.is_file() else {}
    named = known.get("tokenizer_class") or config.get("tokenizer_class")
    if named in (None, "TokenizersBackend"):
        named = "PreTrainedTokenizerFast"
    dropped = ("backend", "is_local", "local_files_only", "extra_special_tokens")
    out = {k: v for k, v in config.items() if k not in dropped} | {"tokenizer_class": named}
    if isinstance(extra, list):  # version 4 has names for these, and a list under another key
        out["additional_special_tokens"] = extra
    elif extra is not None:
        out["extra_special_tokens"] = extra
    return out


def with_code(config: dict, source: Path, directory: Path) -> dict:
    """A config whose auto_map names code that an export has: copied from the source, or not named.

    The code is not run here. A reference to another repository, "org/name--file.Class", stays.
    """
    named = config.get("auto_map")
    if named is None:
        return config
    values = named.values() if isinstance(named, dict) else [None]
    references = [r for v in values for r in (v if isinstance(v, list) else [v]) if r is not None]
    found = [isinstance(r, str) and _REFERENCE.fullmatch(r) for r in references or [None]]
    local = {m[1] for m in found if m and "--" not in m.string}
    if not all(found) or not all((source / f"{name}.py").is_file() for name in local):
        return {k: v for k, v in config.items() if k != "auto_map"}
    # They may import one another.
    for file in source.glob("*.py") if local else ():
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
    return config
