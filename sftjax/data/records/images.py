"""Images: folders and tar files of them as records, and the pixels of one.

A record has the `image`, its `file` and, where it lies in a folder of its own, that folder's name as its `label`. In
files of other kinds an image is a path beside that file, a data URL, bytes, or the {"bytes", "path"} that `datasets`
writes.
"""

import base64
import binascii
import hashlib
import mmap
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sftjax.data.records.failures import excerpt, readable
from sftjax.errors import ConfigError, DataError
from sftjax.terminal import warn

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PIXELS = 1 << 26  # of an image, at most: a small file may claim to be as large as memory
BYTES = 1 << 28  # of its file
# Forms of pixels of which Pillow makes others without loss of range.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


# ---- records -------------------------------------------------------------------------------


def is_image(name: str) -> bool:
    """Does a file of this name, below a folder, hold an image, and is nothing of it hidden?"""
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not _hidden(name)


def _hidden(name):
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _record(image, name) -> dict[str, Any]:
    label = PurePosixPath(name).parent.name
    return {"image": image, "file": name} | ({"label": label} if label else {})


def below(folder: Path) -> Iterator[str]:
    """The names of all files below a folder; a link to a folder above it is not followed."""
    for at, folders, names in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(at), "")
        places = {d: os.path.join(os.path.realpath(os.path.join(at, d)), "") for d in folders}
        folders[:] = [d for d in folders if not here.startswith(places[d])]
        yield from (os.path.relpath(os.path.join(at, n), folder) for n in names)


def _say_others(path, names):
    """Warn of the files that are not read, by the endings of their names."""
    others = [PurePosixPath(n) for n in names if not (is_image(n) or _hidden(n))]
    kinds = Counter(p.suffix.lower() or p.name for p in others)
    if kinds:
        some = ", ".join(f"{n} of {kind}" for kind, n in kinds.most_common(5))
        warn(f"{path}: files that are not read as images: {some}")


class Tar:
    """The images of a tar file that is not compressed, by the order in which they lie in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path, "tar", (OSError, tarfile.TarError)), tarfile.open(path, "r:") as file:
            members = [m for m in file if m.isfile()]
        found = [m for m in members if is_image(m.name)]
        _say_others(path, (m.name for m in members))
        self.files = [m.name for m in found]
        self._places = [(m.offset_data, m.size) for m in found]
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        start, size = self._places[i]
        return _record(self._bytes[start : start + size], self.files[i])

    def where(self, i: int) -> str:
        """The file, and the name in it."""
        return f"{self.path}:{self.files[i]}"


class Folder:
    """The images below a folder, by name; a folder for each class."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = list(below(path))
        self.files = sorted(filter(is_image, found))
        self.bytes = sum((path / name).stat().st_size for name in self.files)
        _say_others(path, found)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return _record(str((self.path / self.files[i]).absolute()), self.files[i])

    def where(self, i: int) -> str:
        """The image's file."""
        return str(self.path / self.files[i])

    def digest(self) -> str:
        """A hash of the names, sizes and times of the files."""
        stats = ((name, (self.path / name).stat()) for name in self.files)
        text = "\n".join(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)
        return hashlib.sha256(text.encode()).hexdigest()


def labels_of(source: Any) -> list[str]:
    """The names of the folders in which a source's images lie, sorted; [] where it has others."""
    names = [name for r in source.readers for name in getattr(r, "files", ("",))]
    found = {PurePosixPath(name).parent.name for name in names}
    return [] if "" in found else sorted(found)


def as_url(data: bytes) -> str:
    """A data URL of an image's file."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}
    return f"data:image/{kinds.get(data[:4], 'jpeg')};base64,{base64.b64encode(data).decode()}"


# ---- pixels --------------------------------------------------------------------------------


def encoded(value: Any, where: str) -> bytes:
    """The bytes of an image's file, from what a record holds. where: the record's place.

    Raises: DataError for what is no image, and for a file that is not there.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str) or not value:
        problem = f"the image is {excerpt(value)}, expected a path, a data URL or bytes"
        raise DataError(problem, where=where, kind="wrong_type")
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            problem = f"the image's data URL is no base64: {error}"
            raise DataError(problem, where=where, kind="bad_image") from None
    path = Path(where.rpartition(":")[0]).parent / value
    if not path.is_file():
        raise DataError(f"the image {path} is not there", where=where, kind="no_file")
    with readable(path, "image"):
        if path.stat().st_size > BYTES:
            problem = f"the image {path} has {path.stat().st_size:,} bytes, more than {BYTES:,}"
            raise DataError(problem, where=where, kind="too_large")
        return path.read_bytes()


def pixels(
    data: bytes, size: int | Callable[[int, int], tuple[int, int]], channels: int, where: str = ""
) -> np.ndarray:
    """uint8 [height, width, channels] of an image's file, resized.

    size: the side of a square, its middle; or a function that gives the height and width of the whole from its own.
    channels: 1 (gray) or 3 (RGB); transparency is left out, as transformers does. Raises: DataError for what cannot be
    read whole, is animated, has more than PIXELS, or has more than 8 bits.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ConfigError("images need Pillow: pip install 'sftjax[images]'") from None

    def refuse(problem, fix="", kind="bad_image"):
        return DataError(problem, fix, where=where, kind=kind)

    try:
        image: Any = Image.open(BytesIO(data))
        if image.width * image.height > PIXELS:
            problem = f"the image has {image.width} x {image.height} pixels"
            raise refuse(problem, f"at most {PIXELS:,} are read", "too_large")
        # Cameras write MPO: a picture and its preview.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise refuse(f"the image has {image.n_frames} frames", "take one of them out of it")
        if image.mode not in MODES:
            problem = f"the image's pixels are of mode {image.mode}, expected one of 8 bits"
            raise refuse(problem, f"save it as one of {', '.join(MODES)}")
        mode = "L" if channels == 1 else "RGB"
        if isinstance(size, int):
            image.draft(mode, (size, size))  # a large JPEG is read at a smaller size
        image = ImageOps.exif_transpose(image).convert(mode)
        if isinstance(size, int):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        else:
            height, width = size(image.height, image.width)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    except DataError:
        raise
    except Exception as error:  # Pillow's readers fail in many ways
        said = f"{type(error).__name__}: {error}".replace(str(BytesIO), "the file")
        raise refuse(f"the image cannot be read: {said[:200]}") from None
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
