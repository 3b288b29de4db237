"""Pretrain the quickstart's base model from random weights on generated plain text.

Differs from the default: random weights of base_model/config.json, text records, every token
trained. experiments/quickstart/pretrain.sh runs it after writing the text:

    python -m sftjax.train --config=configs/pretrain_quickstart.py --workdir=runs/pretrain
"""

from sftjax.config import get_default


def get_config(arg=""):
    c = get_default()
    c.model.path = "experiments/quickstart/base_model"
    c.model.init = "random"
    c.model.dtype = "float32"
    c.data.train = "runs/pretrain_text/train.jsonl"
    c.data.max_length = 256
    c.model.scan = False
    c.train.batch_size = 8
    c.train.duration = "3 epochs"
    c.train.log_every = "100 steps"
    c.train.checkpoint_every = "10%"
    c.optim.lr = 2e-3
    c.optim.b2 = 0.98
    c.optim.weight_decay = 0.05
    c.optim.warmup = "2%"
    c.optim.floor = 0.05
    return c
