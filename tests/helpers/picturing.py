"""Tiny models of images, and pictures for them."""

import base64
import io

import numpy as np
from PIL import Image

RESNET = dict(
    architecture="resnet8_cifar", num_classes=2,
    pretrained_cfg={"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3},
)  # fmt: skip
VIT = dict(
    model_type="vit", architectures=["ViTForImageClassification"], hidden_size=32,
    num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4,
    hidden_dropout_prob=0.1,
)  # fmt: skip
LLAVA = dict(model_type="llava", architectures=["LlavaForConditionalGeneration"], vision_feature_select_strategy="full")
SIGLIP = {k: VIT[k] for k in VIT if k[0] in "nip" or k == "hidden_size"} | {"model_type": "siglip_vision_model"}


def squares(n):
    """Data URLs of n pictures, each brighter on its left or its right."""
    rng = np.random.default_rng(n)
    for i in range(n):
        pixels, out = rng.integers(0, 128, (9, 8, 3), np.uint8), io.BytesIO()
        pixels[:, 4 * (i % 2) :][:, :4] += 96
        Image.fromarray(pixels).save(out, "png")
        yield "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
