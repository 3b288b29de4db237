"""Sentiment as a chat: stories260K learns to answer a film review's sentence with its label.

Differs from the default: a chat template in plain text (the model has none), short rows, float32,
a learning rate for a model of this size, and dev.tsv answered by generation before and after.

    python experiments/sst2/prepare.py
    python -m sftjax.train --config=experiments/sst2/config.py --workdir=runs/sst2

README.md has the result.
"""

import os

from sftjax.config import get_default


def get_config(data="runs/sst2_data"):
    c = get_default()
    c.model.path = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures") + "/stories260K-hf"
    c.model.dtype = "float32"
    c.model.attention = "blockwise"
    c.model.scan = False
    c.data.template = "experiments/sst2/template.jinja"
    c.data.train = f"{data}/train.jsonl"
    c.data.test = f"{data}/dev.jsonl"
    c.data.max_length = 256
    c.train.batch_size = 16
    c.train.duration = "2 epochs"
    c.train.log_every = "1%"
    c.optim.lr = 2e-3
    c.optim.b2 = 0.99
    c.optim.warmup = "5%"
    c.generate.max_new_tokens = 16
    c.generate.batch_size = 109  # 436 questions in four batches
    return c
