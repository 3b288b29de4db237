"""The main job: teach a 0.9M-parameter Llama to follow instructions, on a CPU in minutes.

Differs from the default: the embedded base model and data, float32 (a CPU's best), a learning rate
for a model of this size, and a test set answered by generation before and after.

    python -m sftjax.train --config=configs/quickstart.py --workdir=runs/quickstart

With the argument "shuffled" (configs/quickstart.py:shuffled) the answers belong to other prompts:
the control that must learn nothing; experiments/quickstart/README.md says how to make its data.
Expect exact match on the test set to go from 0% to above 90%.
"""

from sftjax.config import get_default


def get_config(arg=""):
    c = get_default()
    c.model.path = "experiments/quickstart/base_model"
    c.model.dtype = "float32"
    c.model.scan = False  # four layers: unrolled is faster on a CPU
    name = "train_shuffled" if arg == "shuffled" else "train"
    c.data.train = f"experiments/quickstart/data/{name}.jsonl"
    c.data.validation = "experiments/quickstart/data/validation.jsonl"
    c.data.test = "experiments/quickstart/data/test.jsonl"
    c.data.max_length = 256
    c.train.batch_size = 8
    c.train.duration = "4 epochs"
    c.optim.lr = 2e-3
    c.optim.b2 = 0.98
    c.optim.warmup = "5%"
    c.generate.max_new_tokens = 64
    c.generate.batch_size = 128
    return c
