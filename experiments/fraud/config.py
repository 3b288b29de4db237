"""Fraud in a table of payments, by an MLP of one's own: see task.py.

python experiments/fraud/make_data.py
python -m sftjax.train --config=experiments/fraud/config.py --workdir=runs/fraud_0
"""

from sftjax.config import get_default


def get_config(train="train", data="runs/fraud_data"):
    c = get_default()
    c.task = "experiments/fraud/task.py:Fraud"
    c.data.train = f"{data}/{train}.jsonl"  # config.py:shuffled_0 is a control
    c.data.validation = f"{data}/validation.jsonl"
    c.data.test = f"{data}/test.jsonl"
    c.train.batch_size = 256
    c.train.duration = "40 epochs"
    c.train.log_every = "100 steps"
    c.loss.class_weights = "1,5"
    c.optim.lr = 2e-3
    c.optim.weight_decay = 0.2
    c.eval.every = "4 epochs"
    c.eval.batch_size = 1000
    return c
