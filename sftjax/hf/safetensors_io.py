"""safetensors files (huggingface.co/docs/safetensors), read by slices, written by tensors."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from sftjax.errors import WeightsError, writing
from sftjax.files import JSON_BYTES, check_regular, parse_json, read_text

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
HEADER_BYTES = 100_000_000  # the most that the format allows
_PLAIN = re.compile(r"[^/\\\0.][^/\\\0]*\.safetensors")  # a name, and no path
_CODES = {np.dtype(v): k for k, v in DTYPES.items()}


class Reader:
    """All tensors of a directory: model.safetensors, or the shards of its index."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, tuple] = {}  # name -> (file, dtype, shape, byte offset)
        for file in self._files():
            for name, entry in _header(file).items():
                if name in self.entries:
                    raise WeightsError(f"{file}: tensor {name} is also in {self.entries[name][0].name}")
                self.entries[name] = (file, *entry)

    def _files(self):
        single = self.directory / "model.safetensors"
        index = self.directory / "model.safetensors.index.json"
        if single.exists():  # beside other safetensors files, as transformers chooses
            return [single]
        if index.exists():
            files = _indexed(index)
            if missing := [f for f in files if not (self.directory / f).exists()]:
                some = missing[:8] + ["..."] * (len(missing) > 8)
                raise WeightsError(f"{index} names files that are absent: {some}. Download them too.")
            return [self.directory / f for f in files]
        if shards := sorted(self.directory.glob("*.safetensors")):
            return shards
        if pickles := [f.name for end in ("bin", "pt", "pth", "ckpt") for f in self.directory.glob(f"*.{end}")]:
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

    def read(self, name: str, index: Any = ..., shape: Sequence[int] | None = None) -> np.ndarray:
        """A copy of tensor[index], the tensor being of `shape`, or its own; only those bytes are read."""
        file, dtype, own, offset = self.entries[name]
        shape = own if shape is None else shape
        if 0 in own:
            return np.zeros(shape, dtype)[index]
        mapped = np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=own or (1,))
        return np.array(mapped.reshape(shape)[index])


def _indexed(index) -> list[str]:
    """The files that an index names, all of which have to lie beside it."""
    try:
        value = parse_json(read_text(index, WeightsError, JSON_BYTES))
    except ValueError as e:
        raise _damaged(index, e, "index") from None
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
        raise _damaged(index, "expected an object with weight_map, {tensor: file}", "index")
    files = sorted(set(names.values()))
    if wrong := [file for file in files if not _PLAIN.fullmatch(file)]:
        expected = "a file of its own folder such as model-00001-of-00002.safetensors"
        raise _damaged(index, f"it names {wrong[0]!r:.200}, expected {expected}", "index")
    return files


def _header(file) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """{name: (dtype, shape, byte offset)}, checked as the format's own library does."""
    size = check_regular(file, WeightsError)
    try:
        with open(file, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            text = f.read(n) if n <= min(size - 8, HEADER_BYTES) else b""
    except OSError as e:
        raise WeightsError(f"{file} cannot be read: {e.strerror or e}") from None
    if size < 8 or n > size - 8:
        raise WeightsError(f"{file} is not a safetensors file, or is cut short ({size} bytes)")
    if n > HEADER_BYTES:
        raise _damaged(file, f"it has {n:,} bytes, the format allows {HEADER_BYTES:,}")
    try:
        header = parse_json(text, object_pairs_hook=_once)
    except ValueError as e:
        raise _damaged(file, e) from None
    if not isinstance(header, dict):
        raise _damaged(file, f"it is {header!r:.40}, expected an object")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise _damaged(file, f"__metadata__ is {about!r:.40}, expected an object of texts")
    out, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, start, stop = _entry(entry)
        except ValueError as e:
            raise _damaged(file, f"tensor {name:.200} {e}") from None
        if 8 + n + stop > size:
            raise WeightsError(
                f"{file} is cut short: tensor {name} ends at byte {8 + n + stop}, the file at"
                f" {size}. Download it again."
            )
        spans.append((start, stop, name))
        out[name] = (dtype, shape, 8 + n + start)
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the one before it" if start < end else "leaves a hole before it"
            raise _damaged(file, f"tensor {name:.200} begins at byte {start}, and {what} ({end})")
        end = stop
    if 8 + n + end != size:
        raise _damaged(file, f"its tensors end at byte {8 + n + end}, the file at {size}")
    return out


def _once(pairs):
    """A JSON object none of whose keys stands twice: readers differ in which of the two counts."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name stands in it twice")
    return out


def _damaged(file, problem, part="safetensors header"):
    return WeightsError(f"{file}: damaged {part}: {problem}. Download it again.")


def _entry(entry):
    """(dtype, shape, start, stop) of a tensor. Raises: ValueError, without file and name."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {entry!r:.40}, expected an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise ValueError(f"has no {field}")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"has unsupported dtype {code!r:.40}")
    if not _sizes(shape) or len(shape) > 32:  # numpy's own limit is 64
        raise ValueError(f"has shape {_short(shape)}, expected whole numbers")
    if not _sizes(span) or len(span) != 2:
        raise ValueError(f"has data_offsets {_short(span)}, expected two whole numbers")
    dtype, (start, stop) = np.dtype(DTYPES[code]), span
    need = math.prod(shape) * dtype.itemsize
    if stop - start != need:
        raise ValueError(f"has bytes {start} to {stop}, {code} {shape} needs {need}")
    return dtype, tuple(shape), start, stop


def _sizes(x):
    # An array with no element may have another dimension of any size, but none past 64 bits.
    return isinstance(x, list) and all(type(n) is int and 0 <= n < 2**48 for n in x)


def _short(x):
    text = repr(x[:8] if isinstance(x, list) else x)
    return text if len(text) <= 80 else text[:79] + "…"


def write(
    directory: str | Path,
    tensors: Iterable[tuple[str, Sequence[int], DTypeLike, Callable[[], np.ndarray]]],
    max_shard_bytes: int = 5 * 2**30,
    stem: str = "model",
) -> None:
    """Write (name, shape, dtype, get) rows; get() makes one array, which is dropped once written.

    One file, named by `stem`, or shards of at most max_shard_bytes with their index.
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
    if len(shards) == 1:
        return _write_file(directory / f"{stem}.safetensors", shards[0])
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard)
        weight_map |= {row[0]: file for row in shard}
    total = sum(row[-1] for shard in shards for row in shard)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (directory / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _write_file(path, rows):
    header, offset = {"__metadata__": dict[str, Any](format="pt")}, 0
    for name, shape, dtype, _, size in rows:
        code = _CODES[np.dtype(dtype)]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors start aligned
    with writing("the file", path), open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _, _, dtype, get, _ in rows:
            x = np.ascontiguousarray(get(), dtype=dtype)
            f.write(x.view(np.uint8).reshape(-1).data if x.size else b"")
