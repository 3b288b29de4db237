"""Pairs of texts, several labels, numbers: MiniLM on sets that prepare.py makes of real texts.

python experiments/made_sets/prepare.py
python -m sftjax.train --config=experiments/made_sets/config.py:pairs --workdir=runs/made_pairs

The argument is pairs, multi_label or regression.
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")


def get_config(name="pairs", data="runs/made_sets"):
    c = get_default()
    c.task = {"pairs": "classification"}.get(name, name)
    c.model.path = f"{FIXTURES}/minilm-l6"
    c.model.dtype = "float32"
    c.model.attention = "xla"  # short rows have no blocks to skip
    c.model.scan = False
    c.data.train = f"{data}/{name}/train.jsonl"
    c.data.validation = f"{data}/{name}/test.jsonl"
    c.data.max_length = 128
    if name == "pairs":
        c.data.fields.text, c.data.fields.pair = "question", "sentence"
        c.data.labels = ("no", "yes")
    if name == "multi_label":
        c.data.labels = ("article", "meeting", "post", "review", "story")
    c.train.batch_size = 4  # rows, of a few texts each
    c.train.duration = "4 epochs" if name == "pairs" else "2 epochs"
    c.optim.lr = 5e-5 if name == "pairs" else 2e-4
    c.optim.schedule, c.optim.warmup = "linear", "6%"
    c.optim.weight_decay = 0.01
    return c
