"""A small T5 that is trained here: copies and reverses words, sums up stories and meetings.

python experiments/small_t5/prepare.py
python -m sftjax.train --config=experiments/small_t5/config.py:reverse --workdir=runs/t5_reverse

The argument names the task: copy, reverse, summary (which goes on from copy's export), qmsum, or
shuffled, the control: reverse with other rows' targets.
"""

from sftjax.config import get_default


def get_config(name="reverse", data="runs/small_t5"):
    c = get_default()
    c.task = "seq2seq"
    c.model.path = f"{data}/pieces" if name == "qmsum" else f"{data}/words"
    c.model.init = "random"
    c.model.dtype = "float32"
    c.model.attention = "xla"  # short rows have no blocks to skip
    for part in ("train", "validation", "test"):
        c.data[part] = f"{data}/data/{name}/{part}.jsonl"
    c.data.max_length, c.data.max_target_length = 128, 128
    c.train.batch_size = 8  # rows, of about 14 pairs each
    c.train.duration = "4 epochs" if name == "reverse" else "12 epochs"  # of 300,000 pairs, or 60,000
    c.optim.lr, c.optim.schedule, c.optim.warmup = 3e-3, "linear", "5%"
    c.optim.weight_decay = 0.0
    c.generate.max_new_tokens = 32
    if name == "summary":
        c.model.path, c.model.init = "runs/t5_copy/export", "pretrained"
        c.train.duration, c.optim.lr = "10 epochs", 1e-3
        c.eval.metrics = ("rouge1", "rouge2", "rougeL", "exact_match")
    if name == "qmsum":
        c.data.max_length, c.data.max_target_length = 384, 192
        c.train.batch_size, c.train.duration, c.optim.lr = 4, "30 epochs", 1e-3
        c.generate.max_new_tokens = 120
        c.eval.metrics = ("rouge1", "rouge2", "rougeL")
    return c
