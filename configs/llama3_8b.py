"""Llama-3.1-8B, full fine-tuning: a v5p-16 TPU slice ("tpu", the default) or one node of 8 GPUs.

Differs from the default: rows of 8192 tokens, full remat, fsdp over all chips; on a GPU node two
micro-batches, as its 640 GB hold less beside the fp32 state.

    python -m sftjax.train --config=configs/llama3_8b.py:tpu --workdir=runs/llama3 \
        --config.data.train=my.jsonl --config.mesh.coordinator=auto
"""

from sftjax.config import get_default


def get_config(arg="tpu"):
    c = get_default()
    c.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    c.model.remat = "full"
    c.data.max_length = 8192
    c.train.batch_size = 32
    c.train.duration = "2 epochs"
    c.train.micro_batches = {"tpu": 1, "gpu": 2}[arg]
    c.optim.lr = 1e-5
    c.optim.b2 = 0.95
    c.optim.warmup = "3%"
    return c
