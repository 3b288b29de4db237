"""safetensors files read by slices and written tensor by tensor.

The format is a JSON header of names, dtypes, shapes and offsets, then raw little-endian bytes
(https://huggingface.co/docs/safetensors). Reading maps one tensor at a time and copies only the
slice asked for, so host memory follows the slice and not the file.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from sftjax.errors import WeightsError, writing

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(v): k for k, v in DTYPES.items()}


class Reader:
    """All tensors of a directory: model.safetensors, or the shards of its index."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, tuple] = {}  # name -> (file, dtype, shape, byte offset)
        for file in self._files():
            for name, entry in _header(file).items():
                if name in self.entries:
                    raise WeightsError(
                        f"{file}: tensor {name} is also in {self.entries[name][0].name}"
                    )
                self.entries[name] = (file, *entry)

    def _files(self):
        single = self.directory / "model.safetensors"
        index = self.directory / "model.safetensors.index.json"
        if single.exists():  # beside other safetensors files, as transformers chooses
            return [single]
        if index.exists():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(names.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise WeightsError(f"{index}: damaged index: {e!r}. Download it again.") from None
            missing = [f for f in files if not (self.directory / f).exists()]
            if missing:
                raise WeightsError(
                    f"{index} names files that are absent: {missing}. Download them too."
                )
            return [self.directory / f for f in files]
        files = sorted(self.directory.glob("*.safetensors"))
        if files:
            return files
        pickles = [f.name for f in self.directory.glob("*.bin")] + [
            f.name for ext in ("pt", "pth", "ckpt") for f in self.directory.glob(f"*.{ext}")
        ]
        if pickles:
            raise WeightsError(
                f"{self.directory} holds only pickled weights ({', '.join(sorted(pickles)[:3])});"
                " a pickle can run any code, so only safetensors are read. Convert it with"
                " transformers: model.save_pretrained(dir, safe_serialization=True)"
            )
        raise WeightsError(f"{self.directory} has no *.safetensors file")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; the header says it."""
        return self.entries[name][2]

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor; the header says it."""
        return self.entries[name][1]

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """A copy of tensor[index]; only those bytes are read."""
        file, dtype, shape, offset = self.entries[name]
        if 0 in shape:
            return np.zeros(shape, dtype)[index]
        mapped = np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape or (1,))
        return np.array(mapped.reshape(shape)[index])


def _header(file) -> dict:
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            text = f.read(n) if n <= size - 8 else b""
    except OSError as e:
        raise WeightsError(f"{file} cannot be read: {e.strerror or e}") from None
    if size < 8 or n > size - 8:
        raise WeightsError(f"{file} is not a safetensors file, or is cut short ({size} bytes)")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {
            k: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for k, e in header.items()
        }
        sizes = {k: stop - start for k, (_, _, start, stop) in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(
            f"{file}: damaged safetensors header: {e!r}. Download it again."
        ) from None
    out = {}
    for name, (code, shape, start, stop) in entries.items():
        if code not in DTYPES:
            raise WeightsError(f"{file}: tensor {name} has unsupported dtype {code}")
        dtype = np.dtype(DTYPES[code])
        need = math.prod(shape) * dtype.itemsize
        if start < 0 or sizes[name] != need:
            raise WeightsError(
                f"{file}: damaged safetensors header: tensor {name} has bytes {start} to {stop},"
                f" {code} {list(shape)} needs {need}. Download it again."
            )
        if 8 + n + stop > size:
            raise WeightsError(
                f"{file} is cut short: tensor {name} ends at byte {8 + n + stop}, the file at"
                f" {size}. Download it again."
            )
        out[name] = (dtype, shape, 8 + n + start)
    return out


def write(
    directory: str | Path,
    tensors: Iterable[tuple[str, Sequence[int], DTypeLike, Callable[[], np.ndarray]]],
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write (name, shape, dtype, get) rows; get() makes one array, which is dropped once written.

    One file model.safetensors, or shards of at most max_shard_bytes with their index, as
    transformers names them.
    """
    directory = Path(directory)
    shards, room = [list[tuple]()], max_shard_bytes
    for row in tensors:
        size = int(np.prod(row[1], dtype=np.int64)) * np.dtype(row[2]).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((*row, size))
        room -= size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        many = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = many if len(shards) > 1 else "model.safetensors"
        _write_file(directory / file, shard)
        weight_map |= {row[0]: file for row in shard}
    if len(shards) > 1:
        total = sum(row[-1] for shard in shards for row in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_file(path, rows):
    header, offset = {"__metadata__": dict[str, Any](format="pt")}, 0
    for name, shape, dtype, _, size in rows:
        span = [offset, offset + size]
        code = _CODES[np.dtype(dtype)]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": span}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors start aligned
    with writing("the file", path), open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name, shape, dtype, get, _ in rows:
            x = np.ascontiguousarray(get(), dtype=dtype)
            if x.shape != tuple(shape):
                raise WeightsError(f"{name}: writing shape {x.shape}, expected {tuple(shape)}")
            f.write(x.view(np.uint8).reshape(-1).data if x.size else b"")
