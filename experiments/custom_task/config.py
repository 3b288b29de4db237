"""A task and a model of one's own: regression by an nnx module with batch normalisation.

python experiments/custom_task/make_data.py
python -m sftjax.train --config=experiments/custom_task/config.py --workdir=runs/custom_task
"""

from sftjax.config import get_default


def get_config(data="runs/custom_task_data"):
    c = get_default()
    c.task = "experiments/custom_task/task.py:Regression"
    c.data.train = f"{data}/train.jsonl"
    c.data.validation = f"{data}/validation.jsonl"
    c.train.batch_size = 32
    c.train.duration = "40 epochs"
    c.eval.best = "validation/r2"
    c.optim.lr = 1e-2
    return c
