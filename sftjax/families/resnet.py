"""ResNets, by transformers' files (model_type "resnet") and by torchvision's names, as of timm.

timm's config.json says {"architecture": "resnet50", "num_classes": ..., "pretrained_cfg": ...}. The small ones of He et
al. for CIFAR are read under "resnet20_cifar", "resnet56_cifar": 6 n + 2 layers.
"""

import re
from typing import Any

from sftjax.errors import ModelError
from sftjax.families import common, pixels
from sftjax.models.resnet import Config, blocks, convolutions

DEPTHS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
IMAGES = True
OTHERS = r"(.*\.)?fc\..*|classifier\..*|linear\..*"


def config(hf: dict, preprocessor: dict | None = None) -> Config:
    """resnet.Config from the fields of a config.json and, for its pixels, preprocessor_config.json.

    Raises: ModelError for a form that is not supported.
    """
    if "architecture" in hf:
        return _torch(hf)
    common.refuse(hf, hidden_act="relu", downsample_in_first_stage=False)
    kind = hf.get("layer_type", "bottleneck")
    if kind not in ("basic", "bottleneck"):
        raise ModelError(f"layer_type={kind!r}, expected 'basic' or 'bottleneck'")
    depths, widths = (
        tuple(hf.get(name, plain))
        for name, plain in {"depths": (3, 4, 6, 3), "hidden_sizes": (256, 512, 1024, 2048)}.items()
    )
    if len(depths) != len(widths) or max(depths) > 1000:
        raise ModelError(f"depths={depths} and hidden_sizes={widths}: expected one of each a stage")
    return Config(
        depths=depths,
        widths=widths,
        stem=hf.get("embedding_size", 64),
        bottleneck=kind == "bottleneck",
        early_stride=hf.get("downsample_in_bottleneck", False),
        files="transformers",
        channels=hf.get("num_channels", 3),
        **pixels.fields(preprocessor or {}),
    )


def _torch(hf) -> Config:
    common.refuse(hf, model_args={})
    name, own = hf["architecture"], hf.get("pretrained_cfg") or hf
    common.check(own)
    size = own.get("input_size") or (3, 224, 224)
    if len(size) != 3 or size[1] != size[2]:
        raise ModelError(f"input_size={size}, expected [channels, side, side]")
    fields: dict[str, Any] = dict(
        channels=size[0],
        image_size=size[1],
        classifier=own.get("classifier", "fc"),
        **{k: tuple(own[k]) for k in ("mean", "std") if k in own},
    )
    if small := re.fullmatch(r"resnet(\d+)_cifar", name):
        depth, rest = divmod(int(small[1]) - 2, 6)
        if rest or not 1 <= depth < 1000:
            raise ModelError(f"architecture={name!r}: a ResNet of this form has 6 n + 2 layers")
        return Config((depth,) * 3, (16, 32, 64), 16, small=True, **fields)
    if name not in DEPTHS:
        known = ", ".join([*DEPTHS, "resnet20_cifar"])
        raise ModelError(f"architecture={name!r} is not supported; known: {known}")
    bottleneck, depths = DEPTHS[name]
    widths = tuple((4 if bottleneck else 1) * n for n in (64, 128, 256, 512))
    return Config(depths, widths, bottleneck=bottleneck, **fields)


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names; those of "stats/" are the norms' statistics."""
    theirs = c.files == "transformers"
    embedder = "resnet.embedder.embedder."
    first = (f"{embedder}convolution", f"{embedder}normalization") if theirs else ("conv1", "bn1")
    rows = _convolution(*first, "stem")
    for name, *block in blocks(c):
        _, stage, n = name.split("/")
        prefix = f"resnet.encoder.stages.{stage}.layers.{n}." if theirs else f"layer{int(stage) + 1}.{n}."
        for part, *_ in convolutions(c, *block):
            i = part[-1]
            if theirs:
                own = "shortcut" if part == "shortcut" else f"layer.{int(i) - 1}"
                file, norm = f"{own}.convolution", f"{own}.normalization"
            else:
                file, norm = (part, f"bn{i}") if i.isdigit() else ("downsample.0", "downsample.1")
            rows += _convolution(prefix + file, prefix + norm, f"{name}/{part}")
    if c.classes:
        head = "classifier.1" if theirs else c.classifier
        rows += common.linear(head, "score", "c d -> c d")
    return rows


def _convolution(file, norm, path):
    of_norm = [
        ("weight", f"{path}_norm/scale"),
        ("bias", f"{path}_norm/b"),
        ("running_mean", f"stats/{path}_norm/mean"),
        ("running_var", f"stats/{path}_norm/var"),
    ]
    rows = [(f"{file}.weight", f"{path}/w", "d c h w -> h w c d")]
    return rows + [(f"{norm}.{end}", own, "d -> d") for end, own in of_norm]
