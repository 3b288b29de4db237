"""GSM8K with the Qwen tokenizer and its own ChatML template: what packing and masking make of it.

Differs from the default: random weights of config.json (two narrow layers under Qwen's whole
vocabulary), the tokenizer of another directory, the data's own field names, a few steps.

    python -m sftjax.train --config=experiments/gsm8k/config.py --workdir=runs/gsm8k

The data line shows packing and the trained share, metrics.jsonl the three token rates.
"""

import os

from sftjax.config import get_default


def get_config(arg=""):
    fixtures = os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures")
    c = get_default()
    c.model.path = "experiments/gsm8k/config.json"
    c.model.init = "random"
    c.model.dtype = "float32"
    c.model.attention = "blockwise"
    c.data.tokenizer = f"{fixtures}/tokenizer-qwen"
    c.data.train = f"{fixtures}/gsm8k/train.jsonl"
    c.data.fields.prompt = "question"
    c.data.fields.completion = "answer"
    c.data.max_length = 1024
    c.train.batch_size = 4
    c.train.duration = "30 steps"
    c.train.log_every = "5 steps"
    c.train.checkpoint_every = "0 steps"
    c.loss.chunk_tokens = 512  # of 151,936 logits each: 311 MB at a time
    c.optim.lr = 3e-3
    c.optim.warmup = "10%"
    return c
