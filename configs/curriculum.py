"""Three phases over several sources: format, then skills, then hard skills; and a replay share.

Differs from configs/quickstart.py: data.sources in place of data.train, mixed by data.phases, and a
share of plain text that keeps the base model's own skill. The argument "mixed" takes the phases
away (the same rows, in one mixture), "no_replay" the text.

    sh experiments/curriculum/make_data.sh
    python -m sftjax.train --config=configs/curriculum.py --workdir=runs/curriculum
"""

from sftjax.config import get_default


def get_config(arg=""):
    c = get_default()
    c.model.path = "experiments/quickstart/base_model"
    c.model.dtype = "float32"
    c.model.scan = False
    d = "runs/curriculum_data"
    c.data.sources = tuple(dict(path=f"{d}/{name}.jsonl") for name in ("format", "special", "hard"))
    if arg != "no_replay":
        c.data.sources += (dict(path=f"{d}/text.jsonl", replay=0.1),)
    if arg != "mixed":
        c.data.phases = (
            dict(until="25%", weights=dict(format=0.8, special=0.2)),
            dict(until="60%", weights=dict(format=0.2, special=0.6, hard=0.2)),
            dict(weights=dict(format=0.15, special=0.25, hard=0.6)),
        )
    c.data.validation = f"experiments/quickstart/data/validation.jsonl,{d}/unseen_text.jsonl"
    c.data.test = "experiments/quickstart/data/test.jsonl"
    c.data.max_length, c.train.batch_size = 256, 8
    c.train.duration = "800 steps"
    c.optim.lr, c.optim.b2, c.optim.warmup = 2e-3, 0.98, "5%"
    c.generate.max_new_tokens, c.generate.batch_size = 64, 128
    return c
