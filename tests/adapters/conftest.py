"""A directory with a tiny model and small data."""

import pytest
import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model with weights, and small data files."""
    where = tmp_path_factory.mktemp("files")
    tiny.drawn(where / "model", 1)
    for name, n in {"train": 100, "validation": 10}.items():
        lines = (tiny.QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines()[:n]
        (where / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return where
