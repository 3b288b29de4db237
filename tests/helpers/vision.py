"""Small models of images, whose weights follow from the tensors' names, and images for them."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sftjax import hf as hf_lib
from sftjax import params as params_lib
from sftjax.hf import names as names_lib

LABELS = {"0": "cat", "1": "dog", "2": "owl"}
TOWER = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=24,
    patch_size=8,
)  # fmt: skip
RESNET = dict(
    model_type="resnet", architectures=["ResNetForImageClassification"], depths=[2, 1, 2],
    hidden_sizes=[16, 24, 32], embedding_size=8, id2label=LABELS,
)  # fmt: skip
CASES = {
    "vit": dict(
        model_type="vit", architectures=["ViTForImageClassification"], hidden_act="gelu",
        hidden_dropout_prob=0.0, id2label=LABELS, **TOWER,
    ),
    "siglip": dict(
        model_type="siglip", architectures=["SiglipForImageClassification"], id2label=LABELS,
        vision_config=TOWER, text_config={"vocab_size": 77},
    ),
    "resnet-basic": RESNET | dict(layer_type="basic"),
    "resnet-bottleneck": RESNET | dict(layer_type="bottleneck"),
    "resnet-early": RESNET | dict(layer_type="bottleneck", downsample_in_bottleneck=True),
}  # fmt: skip
TIMM = dict(
    architecture="resnet8_cifar", num_classes=3, label_names=[*LABELS.values()],
    pretrained_cfg={"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3},
)  # fmt: skip
PIXELS = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], size={"shortest_edge": 24})
WANTED = [0, 2, 1, 2]


def write(name, directory) -> Path:
    """The case's directory; variances are positive."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CASES[name]))
    (directory / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    fill(name, directory)
    return directory


def fill(name, directory):
    """Write the weights of the model that a directory's files say, by its name and theirs."""
    model, tensors = hf_lib.load_model(directory), {}
    tree = params_lib.flatten(model.abstract | {"stats": model.state or {}})
    for path, files, layout in names_lib.tensors(model):
        own = tree[path].shape[len(next(iter(files))) :]
        for file in files.values():
            rng = np.random.default_rng(zlib.crc32(f"{name} {file}".encode()))
            x = rng.normal(size=layout.file_shape(own))
            std = 0.1 if len(own) == 1 else 1.2 * np.prod(own[:-1]) ** -0.5
            x = np.exp(x) if path.endswith("/var") else path.endswith("norm/scale") + std * x
            tensors[file] = x.astype(np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def images(side=24, n=4) -> np.ndarray:
    """uint8 [n, side, side, 3]."""
    return np.random.default_rng(5).integers(0, 256, (n, side, side, 3)).astype(np.uint8)
