"""Full fine-tuning of a chat model on your own conversations.

Differs from the default: rows of 2048 tokens, full remat.
Every accelerator found is used (mesh.fsdp=-1).

    python -m sftjax.train --config=configs/chat.py --workdir=runs/mine \
        --config.model.path=<Hugging Face directory or hub id> --config.data.train=my.jsonl

my.jsonl: one {"messages": [...]} or {"prompt": ..., "completion": ...} a line.
"""

from sftjax.config import get_default


def get_config(arg=""):
    c = get_default()
    c.data.max_length = 2048
    c.model.remat = "full"
    c.train.batch_size = 64
    c.train.duration = "2 epochs"
    c.optim.lr = 1e-5
    c.optim.weight_decay = 0.0
    return c
