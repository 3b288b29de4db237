"""Few examples of SST-2, for an encoder or a small decoder; run.py draws them and runs all cases.

The argument is a body and what is trained of it: minilm-l6,full or babyllama105-hf,last.
"""

import os

from sftjax.config import get_default

FIXTURES = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")


def get_config(arg="minilm-l6,full", train="runs/few_shot/data/32_0.jsonl"):
    body, trained = arg.split(",")
    c = get_default()
    c.task = "classification"
    c.model.path = f"{FIXTURES}/{body}"
    c.model.dtype = "float32"
    c.model.attention = "xla"
    c.model.scan = False
    c.data.train = train
    c.data.validation = f"{FIXTURES}/sst2/dev.tsv"
    c.data.fields.text = "sentence|content"
    c.data.fields.label = "label"
    c.data.labels = ("negative", "positive")
    c.data.max_length = 128 if body == "minilm-l6" else 256  # of letters
    c.train.batch_size = 2  # rows
    c.train.checkpoint_every, c.train.export = "0", False
    c.eval.every = "0"
    c.optim.lr, c.optim.schedule, c.optim.warmup = 2e-4, "linear", "10%"
    if trained == "last":  # its last layer, and the head with what lies before it
        last = {"minilm-l6": 5}.get(body, 4)
        c.model.split = (last,)
        c.optim.trainable = ((f"layers/{last}-.*|pooler/.*|score/.*|norm/.*", True), (".*", False))
        c.optim.lr = 1e-3
    return c
