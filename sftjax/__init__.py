"""sftjax: supervised fine-tuning in JAX. The public surface, and nothing else."""

__version__ = "0.1.0"

from sftjax import data, losses
from sftjax.hf import load_pretrained, save_pretrained
from sftjax.models.decoder import Model
from sftjax.step import Loss, TrainState, eval_step, train_step

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
