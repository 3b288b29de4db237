"""Which passage answers a question, XQuAD in English: MiniLM ranks a question's eight candidates.

python experiments/ranking/prepare.py
python -m sftjax.train --config=experiments/ranking/config.py --workdir=runs/ranking

config.py:Pairwise learns from pairs of candidates instead of from all eight at once.
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")


def get_config(task="Listwise", data="runs/ranking_data"):
    c = get_default()
    c.task = f"experiments/ranking/task.py:{task}"
    c.model.path = f"{FIXTURES}/minilm-l6"
    c.model.dtype = "float32"
    c.model.scan = False
    c.data.train = f"{data}/train.jsonl"
    c.data.validation = f"{data}/test.jsonl"
    c.data.max_length = 1280  # a row holds two questions with their candidates
    c.train.batch_size = 4
    c.train.duration = "4 epochs"
    c.optim.lr = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup = "10%"
    c.optim.weight_decay = 0.01
    c.eval.batch_size = 4
    c.eval.every = "2 epochs"
    c.eval.group = "article"  # questions of one article are not independent
    return c
