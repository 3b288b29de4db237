"""Partial fine-tuning: train the last layers and the final norm, freeze all before them.

Differs from configs/chat.py: the stack of layers is cut at layer `arg` (default 2), and the rules
freeze what lies before the cut; the frozen prefix costs no backward pass and no optimizer state.

    python -m sftjax.train --config=configs/freeze.py:24 --workdir=runs/freeze \
        --config.model.path=<Hugging Face directory with 32 layers> --config.data.train=my.jsonl
"""

from sftjax.config import get_default


def get_config(arg="2"):
    c = get_default()
    c.model.split = (int(arg),)
    c.model.remat = "full"
    c.data.max_length = 2048
    c.train.batch_size = 64
    c.optim.trainable = (
        (f"layers/{arg}-.*", True),
        ("norm/scale", True),
        (".*", False),
    )
    c.optim.lr = 5e-5
    return c
