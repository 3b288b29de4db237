"""Hugging Face directories in and out."""
# ruff: noqa: F401 (its names are offered here)

from sftjax.hf.directory import (
    FAMILIES,
    Origin,
    drawn,
    load_model,
    load_params,
    load_pretrained,
    resolve,
    save_pretrained,
    stored_dtypes,
    with_dtypes,
)
