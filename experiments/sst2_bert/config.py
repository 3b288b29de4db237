"""Sentiment of film reviews: MiniLM, a BERT of 6 layers, becomes a classifier on SST-2.

Differs from the default: the task, the names of the files' columns, short packed rows, float32.

    python -m sftjax.train --config=experiments/sst2_bert/config.py --workdir=runs/sst2_bert

The argument is another model directory, such as that of a decoder. README.md has the results.
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")


def get_config(model=f"{FIXTURES}/minilm-l6"):
    c = get_default()
    c.task = "classification"
    c.model.path = model
    c.model.dtype = "float32"
    c.model.attention = "xla"  # short rows have no blocks to skip: 0.8 of the time
    c.model.scan = False
    c.data.train = f"{FIXTURES}/sst2/train.tsv"
    c.data.validation = f"{FIXTURES}/sst2/dev.tsv"
    c.data.fields.text = "sentence|content"
    c.data.labels = ("negative", "positive")
    c.data.max_length = 128
    c.train.batch_size = 4  # rows, of about ten reviews each
    c.optim.lr = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup = "6%"
    c.optim.weight_decay = 0.01
    return c
