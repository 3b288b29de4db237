"""preprocessor_config.json: how a model's images become numbers."""

import json
from pathlib import Path
from typing import Any

from sftjax.errors import ModelError
from sftjax.files import read_json

FILE, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def read(directory: Path) -> dict:
    """What a directory says; {} where it says nothing. Raises: ModelError for no JSON object."""
    for name in (PROCESSOR, FILE):  # in this order, as transformers 5, which writes the first alone
        path = directory / name
        found = read_json(path, ModelError) if path.exists() else {}
        if not isinstance(found, dict):
            raise ModelError(f"{path} holds no JSON object")
        if found := found if name == FILE else found.get("image_processor"):
            return found
    return {}


def config(family: Any, hf: dict, directory: Path) -> Any:
    """The Config of a family of images, by its config.json and what its directory says of pixels.

    Raises: ModelError where images have other channels than 1 or 3, or than the mean and std.
    """
    whole = family.config(hf, read(directory))
    c = getattr(whole, "vision", whole)
    if c.channels not in (1, 3):
        raise ModelError(f"images of {c.channels} channels; 1 (gray) and 3 (RGB) are read")
    numbers = all(type(x) in (int, float) for x in (*c.mean, *c.std))
    if not numbers or {len(c.mean), len(c.std)} != {c.channels} or min(c.std) <= 0:
        raise ModelError(
            f"mean {c.mean} and std {c.std}: expected {c.channels} numbers each, and deviations"
            f" above 0; {FILE} or pretrained_cfg gives them"
        )
    return whole


def fields(preprocessor: dict) -> dict[str, Any]:
    """Of a vision config: how images are normalised, and their side, where the file says so.

    Raises: ModelError for what is not supported.
    """
    rescale = preprocessor.get("rescale_factor") or 1 / 255
    if preprocessor.get("do_rescale", True) is not True or rescale != 1 / 255:
        raise ModelError(f"{FILE}: rescale_factor={rescale!r:.99}; images are read by 1 / 255")
    plain, out = preprocessor.get("do_normalize", True), dict[str, Any]()
    for name, value in {"mean": [0.0] * 3, "std": [1.0] * 3}.items():
        found = preprocessor.get(f"image_{name}") if plain else value
        if not isinstance(found or [], list):
            raise ModelError(f"{FILE}: image_{name}={found!r:.99}, expected a list of numbers")
        out |= {name: tuple(found)} if found else {}
    most, least = (preprocessor.get(f"{name}_num_patches") for name in ("max", "min"))
    if most is not None:
        least = 1 if least is None else least
        if not all(type(n) is int and n > 0 for n in (most, least)) or least > most:
            raise ModelError(f"{FILE}: {least!r:.99} to {most!r:.99} patches, expected whole numbers, the least first")
        out["patches"] = (least, most)
    size = preprocessor.get("crop_size") or preprocessor.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    sides = {*size.values()} if isinstance(size, dict) else {0}
    if len(sides) > 1 or not all(type(n) is int and n > 0 for n in sides):
        raise ModelError(f"{FILE}: size={size!r:.99}, expected that of a square")
    return out | ({"image_size": sides.pop()} if sides else {})


def write(directory: Path, config: Any, source: Path) -> None:
    """Write what an export says of images, where its model reads any: what is done with one here.

    Of a model of texts too, in the files of the directory it came from, which say how its processor puts both together.
    """
    vision = getattr(config, "vision", None)
    if not vision and not hasattr(config, "image_size"):
        return
    own, found = _exported(vision or config), {}
    for name in (FILE, PROCESSOR) if vision else ():
        if (source / name).is_file():
            found[name] = read_json(source / name, ModelError)
    kind = found.get(FILE, {}).get("image_processor_type") if getattr(vision, "patches", ()) else None
    found[FILE] = found.get(FILE, {}) | own | ({"image_processor_type": kind} if kind else {})
    if found.get(PROCESSOR, {}).get("image_processor"):
        found[PROCESSOR]["image_processor"] |= own
    for name, said in found.items():
        (directory / name).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _exported(c) -> dict[str, Any]:
    side, limits = c.image_size, getattr(c, "patches", ())
    out: dict[str, Any] = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True) | {"do_pad": False}
    out |= dict(resample=2, rescale_factor=1 / 255, image_mean=list(c.mean), image_std=list(c.std))
    if limits:
        own = dict(patch_size=c.patch, min_num_patches=limits[0], max_num_patches=limits[1])
        return out | own | {"image_processor_type": "Siglip2ImageProcessor"}
    size = dict(do_center_crop=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return out | size | {"image_processor_type": "CLIPImageProcessor"}
