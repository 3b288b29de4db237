"""The tokenizer of a config, with its added tokens and its template."""

from pathlib import Path

from ml_collections import ConfigDict

from sftjax.errors import ConfigError
from sftjax.files import read_object, read_text
from sftjax.hf.directory import load_model, resolve
from sftjax.hf.names import reads_images
from sftjax.hf.tokenizer_files import Tokenizer, open_tokenizer

TEMPLATE_BYTES = 1 << 24


def load_tokenizer(config: ConfigDict) -> Tokenizer | None:
    """The tokenizer that the config names, with data.template if set; None where it names none."""
    d = config.data
    if not (d.tokenizer or config.model.path):
        return None
    path = resolve(d.tokenizer or config.model.path, weights=False)
    folder = path if path.is_dir() else path.parent
    if not d.tokenizer and reads_images(read_object(folder / "config.json")):
        return None
    tokenizer = open_tokenizer(folder)
    if d.add_tokens:
        _add_tokens(tokenizer, d.add_tokens, config.model.path)
    if d.template:  # the export then carries it too
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if d.template not in named and not Path(d.template).is_file():
            names = f", nor a template of the tokenizer's ({', '.join(sorted(named))})" if named else ""
            raise ConfigError(f"data.template={d.template!r} does not exist: it is no file{names}")
        tokenizer.chat_template = named.get(d.template) or read_text(d.template, ConfigError, TEMPLATE_BYTES)
    return tokenizer


def _add_tokens(tokenizer, tokens, model):
    """Special tokens, each of which needs a new row; it may be in the tokenizer without one."""
    rows = load_model(model).config.vocab if model else 0
    ids = tokenizer.get_vocab()
    for token in tokens:
        if not isinstance(token, str) or not token:
            raise ConfigError(f"data.add_tokens has {token!r}; expected strings, ('<a>', '<b>')")
        if ids.get(token, rows) < rows:
            raise ConfigError(
                f"data.add_tokens: {token!r} is token {ids[token]} already, and the model has a row"
                " for it; leave it out"
            )
    tokenizer.add_tokens(list(tokens), special_tokens=True)
