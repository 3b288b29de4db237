"""Hugging Face directories in and out."""

from sftjax.hf.directory import (
    FAMILIES,
    Origin,
    load_model,
    load_params,
    load_pretrained,
    resolve,
    save_pretrained,
    stored_dtypes,
    with_dtypes,
)

__all__ = [
    "FAMILIES",
    "Origin",
    "load_model",
    "load_params",
    "load_pretrained",
    "resolve",
    "save_pretrained",
    "stored_dtypes",
    "with_dtypes",
]
