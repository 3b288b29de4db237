"""Models and data for the image experiments, from the fixtures.

    python experiments/images/prepare.py [runs/images]

$SFTJAX_FIXTURES is the directory that holds resnet-cifar10/ and mnist/. Writes the small ResNets
with a config.json in timm's form, and MNIST's 8,000 images as PNG in Parquet: 5,500 of them to
train on, 500 to choose by, 2,000 to test on; `shuffled` has the training rows with their labels
drawn anew from one another, and `few_N_S` N of each digit, drawn by seed S.
"""

import gzip
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
SHOTS, SEEDS = (1, 5, 20, 100), (0, 1, 2)


def models(out):
    source = FIXTURES / "resnet-cifar10"
    known = json.loads((source / "config.json").read_text())
    pixels = {"input_size": [3, 32, 32], **known["normalize"], "classifier": "linear"}
    for name in known["models"]:
        config = {"architecture": f"{name}_cifar", "num_classes": 10}
        config |= {"label_names": known["classes"], "pretrained_cfg": pixels}
        for suffix, classes in {"": 10, "_body": 0}.items():  # the second: for another head
            folder = out / (name + suffix)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config | {"num_classes": classes}))
            shutil.copyfile(source / f"{name}.safetensors", folder / "model.safetensors")


def idx(name, skip):
    data = gzip.decompress((FIXTURES / "mnist" / name).read_bytes())
    return np.frombuffer(data, np.uint8, offset=skip)


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return {"bytes": out.getvalue(), "path": None}


def digits(out):
    images = idx("images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = [str(n) for n in idx("labels-idx1-ubyte.gz", 8)]
    rows = [{"image": png(i), "label": n} for i, n in zip(images, labels, strict=True)]
    random.Random(0).shuffle(rows)
    sets = {"train": rows[:5500], "validation": rows[5500:6000], "test": rows[6000:]}
    mixed = [r["label"] for r in sets["train"]]
    random.Random(1).shuffle(mixed)
    sets["shuffled"] = [r | {"label": n} for r, n in zip(sets["train"], mixed, strict=True)]
    for n in SHOTS:
        for seed in SEEDS:
            order = random.Random(seed).sample(sets["train"], len(sets["train"]))
            of = {str(d): [r for r in order if r["label"] == str(d)] for d in range(10)}
            sets[f"few_{n}_{seed}"] = [r for own in of.values() for r in own[:n]]
    (out / "mnist").mkdir(parents=True, exist_ok=True)
    for name, own in sets.items():
        pq.write_table(pa.Table.from_pylist(own), out / "mnist" / f"{name}.parquet")


def main(out="runs/images"):
    models(Path(out))
    digits(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
