"""Continue the training of a small story model on plain text; the argument names the model.

Differs from the default: text records of which every token is trained, a row of the model's own
context, float32. run.py makes the data and runs this for both models; or, after run.py,

    python -m sftjax.train --config=experiments/stories/config.py:stories260K-hf --workdir=runs/mine
"""

import os

from sftjax.config import get_default

# The context that each model was trained with, and a learning rate for its size.
MODELS = {"stories260K-hf": (512, 5e-4), "babyllama105-hf": (256, 1e-4)}


def get_config(arg="stories260K-hf"):
    c = get_default()
    c.data.max_length, c.optim.lr = MODELS[arg]
    c.model.path = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures") + f"/{arg}"
    c.model.dtype = "float32"
    c.model.attention = "blockwise"
    c.data.train = "runs/stories/data/train.jsonl"
    c.data.validation = "runs/stories/data/validation.jsonl"
    c.train.batch_size = 8
    c.train.duration = "40 steps"
    c.train.checkpoint_every = "0 steps"
    c.eval.every = "50%"
    c.optim.warmup = "10%"
    return c
