"""A directory with a tiny model and small data."""

import jax
import pytest
import tiny

from sftjax import hf
from sftjax import params as params_lib


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model with weights, and small data files."""
    where = tmp_path_factory.mktemp("files")
    directory = tiny.directory(where / "model")
    model = hf.load_model(directory)
    hf.save_pretrained(directory, model, params_lib.init(model.abstract, jax.random.key(1)))
    for name, n in {"train": 100, "validation": 10}.items():
        lines = (tiny.QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines()[:n]
        (where / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return where
