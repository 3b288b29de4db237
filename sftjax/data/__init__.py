"""Data: records -> conversations -> tokens and weights -> packed rows -> batches."""

from sftjax.data.masking.encode import Encoded, encode
from sftjax.data.masking.question import prompt_and_answer, stop_ids
from sftjax.data.mixing.mixture import Mixture
from sftjax.data.packing.pack import make_batch, pack, shift
from sftjax.data.packing.rows import Buckets, Rows, loader
from sftjax.data.records.sources import open_source
from sftjax.data.token_store import TokenStore, build_store
from sftjax.errors import DataError

__all__ = [
    "Buckets", "DataError", "Encoded", "Mixture", "Rows", "TokenStore", "build_store", "encode", "loader", "make_batch",
    "open_source", "pack", "prompt_and_answer", "shift", "stop_ids",
]  # fmt: skip
