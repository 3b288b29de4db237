"""Sentiment of film reviews as in experiments/sst2_bert, by LoRA: the base stays, 2% as many numbers are trained.

Differs from there: the adapter and its learning rate. The argument is the kind: lora, rslora, dora or pissa.

    python -m sftjax.train --config=experiments/adapters/config.py --workdir=runs/sst2_lora
"""

from experiments.sst2_bert import config as full


def get_config(kind="lora"):
    c = full.get_config()
    c.adapter.kind = kind
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.optim.lr = 1e-3
    return c
