"""Records of texts with images, a tiny model that reads them, and its task."""

import base64
import dataclasses
import json

import numpy as np

from sftjax import tasks
from sftjax.data.packing.images import Patches
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.tasks.image_text import ImageText

MARKER, TOKEN, MOST = "<|reserved_0|>", 108, 4
SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    image_size=8, patch_size=4,
)  # fmt: skip
ANY = Patches(12, 4, 3, (4, 9))


def make(config, any_size=False, tokenizer=None) -> ImageText:
    task = tasks.make(config, tokenizer or load_tokenizer(config))
    if any_size:
        task.patches = ANY
        task.layout = dataclasses.replace(task.layout, patches=ANY)
    return task


def file(base, i):
    return (base / f"{i}.png").read_bytes()


def url(base, i):
    return "data:image/png;base64," + base64.b64encode(file(base, i)).decode()


def write(where, records):
    where.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(where)


def turn(role, content):
    return {"role": role, "content": content}


def chat(user, *images, answer="cat", **more):
    return {"messages": [turn("user", user), turn("assistant", answer)], "images": list(images)} | more


def images_of(example):
    """The bytes of each image of a stored example."""
    stops = np.cumsum(example[3])
    return [example[2][stop - n : stop].tobytes() for stop, n in zip(stops, example[3], strict=True)]


def counted(rows, task):
    """Every row of a store has as many patches as tokens of images, and they are those of its images, in order."""
    for r in range(len(rows)):
        batch = rows.batch([r])
        spec = task.layout.spec(1, batch["tokens"].shape[1])
        assert {k: v.shape for k, v in batch.items()} == {k: f.shape for k, f in spec.items()}
        wanted = [x for doc, _, _ in rows.pieces(r) for x in images_of(rows.store[doc])]
        cut = [task.patches.of(data) for data in wanted]
        flat = np.concatenate([x.reshape(-1, *x.shape[2:]) for x in cut]) if cut else batch["patches"][0, :0]
        assert len(flat) == (batch["tokens"] == TOKEN).sum()
        np.testing.assert_array_equal(batch["patches"][0, : len(flat)], flat)
        assert not batch["patches"][0, len(flat) :].any()
        if task.patches.limits:
            sizes = [x.shape[:2] for x in cut]
            segments = np.repeat(np.arange(1, len(cut) + 1), [h * w for h, w in sizes])
            np.testing.assert_array_equal(batch["patch_segments"][0, : len(flat)], segments)
            assert not batch["patch_segments"][0, len(flat) :].any()
            places = [(y, x, h, w) for h, w in sizes for y in range(h) for x in range(w)]
            np.testing.assert_array_equal(batch["patch_places"][0, : len(flat)], np.reshape(places, (-1, 4)))
