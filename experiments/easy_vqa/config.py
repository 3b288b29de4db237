"""Questions about pictures of shapes, easy-VQA: a small vision transformer and a small decoder, both trained here.

python experiments/easy_vqa/prepare.py
python -m sftjax.train --config=experiments/easy_vqa/config.py --workdir=runs/easy_vqa
python -m sftjax.train --config=experiments/easy_vqa/config.py:blind --workdir=runs/easy_vqa_blind

blind is the control: the same questions without the images.
"""

from sftjax.config import get_default


def get_config(name="images", data="runs/easy_vqa_data"):
    c = get_default()
    c.task = "image_text"
    c.model.path, c.model.init = f"{data}/model", "random"
    c.model.dtype = "float32"
    c.model.attention = "xla"  # short rows have no blocks to skip
    c.model.scan = False
    for part in ("train", "validation", "test"):
        c.data[part] = f"{data}/{'blind/' if name == 'blind' else ''}{part}.jsonl"
    c.data.max_length = 384  # an image has 64 tokens, its ten questions about 110: two conversations a row
    c.train.batch_size = 8
    c.train.duration = "8 epochs"
    c.optim.lr, c.optim.schedule, c.optim.warmup = 1e-3, "cosine", "5%"
    c.optim.weight_decay = 0.05
    c.generate.max_new_tokens = 3
    return c
