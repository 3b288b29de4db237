"""The same payments as texts, read by MiniLM: 2,000 rows of them, as it is slow.

python experiments/fraud/make_data.py
python -m sftjax.train --config=experiments/fraud/config_text.py --workdir=runs/fraud_text
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")


def get_config(data="runs/fraud_data"):
    c = get_default()
    c.task = "classification"
    c.model.path = f"{FIXTURES}/minilm-l6"
    c.model.dtype = "float32"
    c.model.attention = "xla"  # short rows have no blocks to skip
    c.model.scan = False
    c.data.train = f"{data}/text_train.jsonl"
    c.data.validation = f"{data}/text_test.jsonl"
    c.data.labels = ("genuine", "fraud")
    c.data.max_length = 256
    c.train.batch_size = 4  # rows, of about six payments each
    c.train.duration = "3 epochs"
    c.loss.class_weights = "balanced"
    c.optim.lr = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup = "10%"
    c.optim.weight_decay = 0.01
    c.eval.every = "1 epoch"
    return c
