"""preprocessor_config.json: how a model's images become numbers."""

from pathlib import Path
from typing import Any

from sftjax.errors import ModelError
from sftjax.files import read_object

FILE = "preprocessor_config.json"
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # of pixels that are not normalised


def read(directory: Path) -> dict:
    """What a directory says; {} where it has no such file."""
    return read_object(directory / FILE)


def fields(preprocessor: dict) -> dict[str, Any]:
    """Of a vision config: how images are normalised, and their side, where the file says so.

    Raises: ModelError for what is not supported.
    """
    rescale = preprocessor.get("rescale_factor") or 1 / 255
    if not preprocessor.get("do_rescale", True) or abs(rescale * 255 - 1) > 1e-3:
        raise ModelError(f"rescale_factor={rescale}: images are read from 0 to 1, by 1 / 255")
    plain = preprocessor.get("do_normalize", True)
    found = {k: preprocessor.get(f"image_{k}") if plain else v for k, v in PLAIN.items()}
    out: dict[str, Any] = {k: tuple(v) for k, v in found.items() if v}
    size = preprocessor.get("crop_size") or preprocessor.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    if size.get("height") != size.get("width"):
        raise ModelError(f"size={size}: images that are no squares are not supported")
    side = size.get("height") or size.get("shortest_edge")
    return out | ({"image_size": side} if side else {})


def exported(c: Any, directory: Path) -> dict[str, Any]:
    """What an export says: as the directory that a model came from; else what its config does."""
    return read(directory) or dict(
        image_processor_type="ViTImageProcessor",
        do_resize=True,
        size={"height": c.image_size, "width": c.image_size},
        resample=2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(c.mean),
        image_std=list(c.std),
    )
