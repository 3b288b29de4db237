"""Phi-4-reasoning-vision's recipe at a tiny size: the projector alone, then all; reasoning by a token, 20 to 80.

python experiments/phi4_vision/prepare.py
python -m sftjax.train --config=experiments/phi4_vision/config.py:captions --workdir=runs/phi4_vision_captions
python experiments/phi4_vision/prepare.py runs/phi4_vision_data parts runs/phi4_vision_captions/export
python -m sftjax.train --config=experiments/phi4_vision/config.py:projector --workdir=runs/phi4_vision_projector
python -m sftjax.train --config=experiments/phi4_vision/config.py:joint --workdir=runs/phi4_vision_joint

captions makes what stands for a pretrained tower and a pretrained decoder. blind is joint without the pictures. With
--config.data.test=runs/phi4_vision_data/test_think.jsonl the same questions are asked by the other token.
"""

from sftjax.config import get_default

STARTS = {"projector": "{data}/parts", "joint": "runs/phi4_vision_projector/export"}
STARTS["blind"] = STARTS["joint"]


def get_config(stage="joint", data="runs/phi4_vision_data"):
    c, blind = get_default(), "blind/" if stage == "blind" else ""
    c.task, c.model.dtype, c.model.scan = "image_text", "float32", False
    c.model.attention = "xla"
    c.model.path = STARTS.get(stage, "{data}/model").format(data=data)
    c.data.max_length, c.train.batch_size = 384, 8
    c.optim.lr, c.optim.warmup, c.optim.weight_decay = 1e-3, "5%", 0.01
    if stage in ("captions", "projector"):
        c.data.train, c.data.validation = f"{data}/captions.jsonl", f"{data}/validation_captions.jsonl"
        c.train.duration = "12 epochs" if stage == "captions" else "3 epochs"
        c.model.init = "random" if stage == "captions" else "pretrained"
    if stage == "projector":
        c.optim.trainable = (("projector/.*", True), (".*", False))
    if stage in ("joint", "blind"):
        counts = {"direct": 4800, "think": 1200}  # of a cycle's examples
        c.data.sources = tuple(dict(path=f"{data}/{blind}{k}.jsonl", count=n) for k, n in counts.items())
        c.data.validation = f"{data}/{blind}validation_direct.jsonl"
        c.data.test = f"{data}/{blind}test_direct.jsonl"
        c.train.duration = "2500 steps"
        c.optim.lr, c.optim.lr_multipliers = 5e-4, (("tower/.*", 0.5), ("projector/.*", 2.0), (".*", 1.0))
        c.eval.metrics = ("exact_match", "experiments/phi4_vision/metric.py:final")
        c.generate.max_new_tokens = 24
    return c
