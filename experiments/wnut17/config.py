"""Named entities of tweets and posts, WNUT17: MiniLM, a BERT of 6 layers, labels each word.

python experiments/wnut17/prepare.py
python -m sftjax.train --config=experiments/wnut17/config.py --workdir=runs/wnut17
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")
KINDS = ("corporation", "creative-work", "group", "location", "person", "product")


def get_config(data="runs/wnut17_data"):
    c = get_default()
    c.task = "token_labels"
    c.model.path = f"{FIXTURES}/minilm-l6"
    c.model.dtype = "float32"
    c.model.attention = "xla"  # short rows have no blocks to skip
    c.model.scan = False
    c.data.train = f"{data}/train.jsonl"
    c.data.validation = f"{data}/dev.jsonl"
    c.data.labels = ("O", *(f"{at}-{kind}" for kind in KINDS for at in "BI"))
    c.data.max_length = 128
    c.train.batch_size = 4  # rows, of about four sentences each
    c.train.duration = "3 epochs"
    c.optim.lr = 3e-4
    c.optim.schedule = "linear"
    c.optim.warmup = "6%"
    c.optim.weight_decay = 0.01
    c.eval.best = "dev/seqeval_f1"
    return c
