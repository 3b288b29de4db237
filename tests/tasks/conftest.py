"""A tiny model of texts with images, and a config of it."""

import json

import pytest
import tiny
from image_records import SIGLIP, TOKEN
from vision_language import png

from sftjax import config as config_lib


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's directory and, beside the records to come, five images."""
    where = tmp_path_factory.mktemp("base")
    path = tiny.directory(where / "model")
    text = json.loads((path / "config.json").read_text())
    llava = dict(model_type="llava", architectures=["LlavaForConditionalGeneration"], image_token_index=TOKEN)
    llava |= dict(vision_feature_select_strategy="full", text_config=text, vision_config=SIGLIP)
    (path / "config.json").write_text(json.dumps(llava))
    for i, size in enumerate([(9, 8), (30, 13), (16, 16), (1, 40), (21, 17)]):
        (where / f"{i}.png").write_bytes(png(*size, i))
    return where


@pytest.fixture
def config(base, tmp_path):
    c = config_lib.get_default()
    c.task, c.model.path, c.model.init = "image_text", str(base / "model"), "random"
    c.model.dtype, c.data.max_length, c.train.batch_size, c.data.cache_dir = "float32", 48, 4, str(tmp_path / "cache")
    c.train.duration = "2 steps"
    return c
