"""Data: records -> conversations -> tokens and weights -> packed rows -> batches."""

from sftjax.data.buckets import Buckets
from sftjax.data.chat import Encoded, encode, prompt_and_answer, stop_ids
from sftjax.data.mixture import Mixture
from sftjax.data.pack import make_batch, pack, shift
from sftjax.data.pipeline import TokenStore, build_store
from sftjax.data.rows import Rows, loader
from sftjax.data.sources import open_source
from sftjax.errors import DataError

__all__ = [
    "Buckets",
    "DataError",
    "Encoded",
    "Mixture",
    "Rows",
    "TokenStore",
    "build_store",
    "encode",
    "loader",
    "make_batch",
    "open_source",
    "pack",
    "prompt_and_answer",
    "shift",
    "stop_ids",
]
