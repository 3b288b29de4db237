"""safetensors files (huggingface.co/docs/safetensors), read by slices, written by tensors."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

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
    """{name: (dtype, shape, byte offset)}, checked by the format's own library."""
    check_regular(file, WeightsError)
    try:
        with safe_open(file, "np"), open(file, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(n), object_pairs_hook=_once)
    except OSError as e:
        raise WeightsError(f"{file} cannot be read: {e.strerror or e}") from None
    except (SafetensorError, ValueError) as e:
        raise _damaged(file, e) from None
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        code, shape = entry["dtype"], tuple(entry["shape"])
        if code not in DTYPES:
            raise _damaged(file, f"tensor {name:.200} has unsupported dtype {code!r}")
        if len(shape) > 32 or max(shape, default=0) >= 2**48:  # of no element; numpy has limits too
            raise _damaged(file, f"tensor {name:.200} has shape {shape!s:.80}")
        out[name] = (np.dtype(DTYPES[code]), shape, 8 + n + entry["data_offsets"][0])
    return out


def _once(pairs):
    """A JSON object none of whose keys stands twice: readers differ in which of the two counts."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name stands in it twice")
    return out


def _damaged(file, problem, part="safetensors header"):
    return WeightsError(f"{file}: damaged {part}: {problem}. Download it again.")


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
