"""Answers that stand in a context, XQuAD in English: MiniLM points to where they begin and end.

python experiments/xquad/prepare.py
python -m sftjax.train --config=experiments/xquad/config.py --workdir=runs/xquad
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")


def get_config(data="runs/xquad_data"):
    c = get_default()
    c.task = "experiments/xquad/task.py:ExtractiveQA"
    c.model.path = f"{FIXTURES}/minilm-l6"
    c.model.dtype = "float32"
    c.model.attention = "xla"
    c.model.scan = False
    c.data.train = f"{data}/train.jsonl"
    c.data.validation = f"{data}/test.jsonl"
    c.data.test = f"{data}/test.jsonl"
    c.data.max_length = 384
    c.data.overlong = "split"  # windows that overlap
    c.train.batch_size = 4  # rows, of about two questions each
    c.train.duration = "8 epochs"
    c.optim.lr = 3e-4
    c.optim.schedule = "linear"
    c.optim.warmup = "10%"
    c.optim.weight_decay = 0.01
    c.eval.metrics = ("token_f1", "squad_em")
    return c
