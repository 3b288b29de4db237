"""A training step of an image classifier beside torch and transformers, and the loader beside it.

    python benchmarks/images.py [--bodies=resnet20,vit] [--rounds=9] [--threads=2] [--out=FILE]
    python benchmarks/images.py --loader --data=train5000.tar

Both sides take forward, loss, backward and SGD with momentum on the same weights and images in
float32, in one process, in turns: A B A B. The losses must be the same to 1e-3 before and after a
step. Printed are images a second, and the median of the turns' ratios with its 95% interval, of
time and of processor time.

Bodies: `resnet20`, He et al.'s for CIFAR at 128 images of 32x32; `resnet50` at 8 of 128x128;
`vit`, ViT-S/16 at 4 of 224x224, drawn at random. torch has channels_last, its faster form here.

--loader measures what share of a step of resnet20 a run waits for its images: the decoding of
JPEG files, by the loader's threads, from `metrics.jsonl` of a run of 30 steps.
"""

# ruff: noqa: E402 (the process starts again before anything is imported)

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "peers")]
from encoders import THREADS, in_turns, ratios, settle

if __name__ == "__main__":
    settle()

import argparse
import functools
import json
import tempfile

import jax
import numpy as np
import optax

import sftjax
from sftjax import config as config_lib
from sftjax import hf, losses
from sftjax import params as params_lib
from sftjax.train import train
from sftjax.training import xla_flags

RATE, MOMENTUM, ALLOWED = 0.01, 0.9, 1e-3
VIT = dict(
    model_type="vit", architectures=["ViTForImageClassification"], hidden_size=384,
    num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, hidden_dropout_prob=0.0,
)  # fmt: skip
R50 = dict(model_type="resnet", architectures=["ResNetForImageClassification"], num_labels=10)
SMALL = dict(architecture="resnet20_cifar", pretrained_cfg={"input_size": [3, 32, 32]})
# body -> (config.json, images of a step, their side)
BODIES = {"resnet20": (SMALL, 128, 32), "resnet50": (R50, 8, 128), "vit": (VIT, 4, 224)}
CLASSES = tuple(f"class {i}" for i in range(10))


def small_torch():
    """He et al.'s ResNet-20 in torch, with the names of its tensors in the files."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, n, m, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(n, m, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(m, m, 3, 1, 1, bias=False)
            self.bn1, self.bn2, self.stride = nn.BatchNorm2d(m), nn.BatchNorm2d(m), stride

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if x.shape != y.shape:
                more = (y.shape[1] - x.shape[1]) // 2
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
            return torch.relu(x + y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            before = 16
            for i, width in enumerate((16, 32, 64), 1):
                blocks = [Block(before if j == 0 else width, width, 2 if i > 1 and j == 0 else 1) for j in range(3)]
                setattr(self, f"layer{i}", nn.Sequential(*blocks))
                before = width
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    return Net()


class OfTorch:
    """The model of a directory, its loss, torch's SGD."""

    def __init__(self, folder: Path, body: str, images: np.ndarray, targets: np.ndarray, c) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForImageClassification

        torch.set_num_threads(THREADS)
        if body == "resnet20":
            self.net = small_torch()
            self.net.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            self.logits = self.net
        else:
            self.net = AutoModelForImageClassification.from_pretrained(folder)
            self.logits = lambda x: self.net(pixel_values=x).logits
        self.net = self.net.train().to(memory_format=torch.channels_last)
        self.tx = torch.optim.SGD(self.net.parameters(), RATE, momentum=MOMENTUM, fused=True)
        self.images, self.targets, self.torch = torch.tensor(images), torch.tensor(targets), torch
        shape = (1, 3, 1, 1)
        self.mean, self.std = (torch.tensor(x).reshape(shape) for x in (c.mean, c.std))

    def step(self) -> float:
        x = (self.images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=self.torch.channels_last)
        loss = self.torch.nn.functional.cross_entropy(self.logits(x), self.targets)
        loss.backward()
        self.tx.step()
        self.tx.zero_grad(set_to_none=True)
        return float(loss.detach())


class OfSftjax:
    """The step that `train` compiles."""

    def __init__(self, folder: Path, images: np.ndarray, targets: np.ndarray) -> None:
        model, params = hf.load_pretrained(folder, remat="none", attention="xla", scan=False)
        stats, tx = params.pop("stats", None), optax.sgd(RATE, MOMENTUM)
        self.config = model.config
        self.state = sftjax.TrainState.create(params=params, tx=tx, model_state=stats)
        step = functools.partial(sftjax.train_step, loss_fn=losses.classification(model), tx=tx)
        options = xla_flags.options(jax.default_backend())
        self.run = jax.jit(step, donate_argnums=0, compiler_options=options)
        weights = np.ones((len(images), 1), np.float32)
        self.batch = dict(image=images, targets=targets[:, None].astype(np.int32), weights=weights)

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch)
        return float(metrics["loss"])  # waits for the step


def measure(body: str, rounds: int, steps: int) -> dict:
    """Images a second of both sides, and their ratios."""
    own, n, side = BODIES[body]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3)).astype(np.uint8)
    targets = rng.integers(0, 10, n)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(own | dict(num_classes=10, num_labels=10)))
        model = hf.load_model(folder, labels=CLASSES)
        params = params_lib.init(model.abstract, jax.random.key(0))
        stats = {} if model.state is None else {"stats": params_lib.init(model.state, jax.random.key(0))}
        hf.save_pretrained(folder, model, params | stats)
        ours = OfSftjax(folder, images, targets)
        theirs = OfTorch(folder, body, images, targets, ours.config)
    found = [[side.step() for _ in range(2)] for side in (theirs, ours)]
    if not np.allclose(*found, rtol=ALLOWED, atol=0):
        raise ValueError(f"torch has the losses {found[0]}, sftjax {found[1]}: not the same work")

    def turn(side):
        return lambda: [side.step() for _ in range(steps)]

    times = in_turns({"torch": turn(theirs), "sftjax": turn(ours)}, rounds)
    out = {name: n * steps / np.median([wall for wall, _ in some]) for name, some in times.items()}
    return dict(body=body, losses=found, images_per_s=out, ratio=ratios(*times.values()))


def loader(data: str) -> dict:
    """The median share of a step that waits for its batch, of 20 steps after 10."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMALL | dict(num_classes=0)))
        c = config_lib.get_default()
        c.task, c.data.train, c.data.augment = "image_classification", data, ("flip", "crop")
        c.model.path, c.model.init, c.model.dtype = folder, "random", "float32"
        c.train.batch_size, c.train.duration, c.train.log_every = 128, "30 steps", "1"
        c.train.export, c.train.checkpoint_every = False, "0"
        train(c, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [x for x in map(json.loads, lines) if x.get("step", 0) > 10 and "data_wait" in x]
    return dict(data_wait=float(np.median([x["data_wait"] for x in steps])), steps=len(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", default="resnet20,vit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--data", default="")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if args.loader:
        found = [loader(args.data)]
    else:
        found = [measure(body, args.rounds, args.steps) for body in args.bodies.split(",")]
    for one in found:
        print(json.dumps(one))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
