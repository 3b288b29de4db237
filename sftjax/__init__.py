"""sftjax: supervised fine-tuning in JAX. The public surface, and nothing else."""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftjax import data, losses
    from sftjax.hf import load_pretrained, save_pretrained
    from sftjax.models.decoder import Model
    from sftjax.step import Loss, TrainState, eval_step, train_step

__version__ = "0.1.0"

__all__ = [
    "Loss",
    "Model",
    "TrainState",
    "data",
    "eval_step",
    "load_pretrained",
    "losses",
    "save_pretrained",
    "train_step",
]

_MODULES = {
    "Loss": "sftjax.step",
    "Model": "sftjax.models.decoder",
    "TrainState": "sftjax.step",
    "eval_step": "sftjax.step",
    "load_pretrained": "sftjax.hf",
    "save_pretrained": "sftjax.hf",
    "train_step": "sftjax.step",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first used, so that `sftjax --help` need not load JAX.

    Raises: AttributeError for a name that is neither public nor a module of sftjax.
    """
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        module = f"{__name__}.{name}"
        if name.startswith("_") or importlib.util.find_spec(module) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = importlib.import_module(module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
