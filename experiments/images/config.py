"""A ResNet for CIFAR-10 learns to read digits: its last stage and a new head, or all of it.

python experiments/images/prepare.py
python -m sftjax.train --config=experiments/images/config.py:last --workdir=runs/mnist_last

The argument is last or full, and after a comma the set of training rows: last,few_20_0.
"""

from sftjax.config import get_default


def get_config(argument="last", data="runs/images"):
    what, _, rows = argument.partition(",")
    rows = rows or "train"
    c = get_default()
    c.task = "image_classification"
    c.model.path = f"{data}/resnet20_body"
    c.model.dtype = "float32"
    c.data.train = f"{data}/mnist/{rows}.parquet"
    c.data.validation = f"{data}/mnist/validation.parquet"
    c.data.test = f"{data}/mnist/test.parquet"
    c.data.labels = tuple("0123456789")
    c.data.augment = ("crop",)
    c.train.batch_size = 100
    c.train.duration = "8 epochs" if rows in ("train", "shuffled") else "100 steps"
    c.optim.lr, c.optim.warmup = 3e-3, "5%"
    if what == "last":
        c.optim.trainable = ((r"(stages/2/|score/).*", True), (".*", False))
    return c
