"""A training step of a decoder that reads images beside transformers' LLaVA, in torch.

    python benchmarks/image_text.py [--rounds=9] [--threads=2] [--out=FILE]

Both sides take forward, loss, backward and AdamW (torch's fused one) of the same weights in float32, on the same
images and texts, in one process, in turns: A B A B. The losses must be the same to 1e-3 before and after a step.
Printed are examples a second, and the median of the turns' ratios with its 95% interval, of time and of processor time.

The model is a LLaVA of a CLIP tower (6 layers of 256, images of 96x96 in 36 patches) and a Llama (8 layers of 384), of
random weights. An example has one image, and a text of 20 to 200 tokens, half of which is trained. torch has them in
one batch, each text padded to the longest, or sorted into batches alike in length; sftjax has them packed.
"""

# ruff: noqa: E402 (the process starts again before anything is imported)

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]
from encoders import THREADS, in_turns, ratios, settle

if __name__ == "__main__":
    settle()

import argparse
import functools
import io
import json
import tempfile

import jax
import numpy as np
import optax

import sftjax
from sftjax import hf, losses
from sftjax import params as params_lib
from sftjax.data.packing.images import ImageTextRows, Patches
from sftjax.data.packing.pack import blank_batch, pack
from sftjax.training import xla_flags

IMAGE, WIDTH, LR, ALLOWED = 999, 512, 1e-4, 1e-3
CONFIG = dict(
    model_type="llava", architectures=["LlavaForConditionalGeneration"], image_token_index=IMAGE,
    text_config=dict(
        model_type="llama", vocab_size=1000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024,
    ),
    vision_config=dict(
        model_type="clip_vision_model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, image_size=96, patch_size=16, projection_dim=256,
    ),
)  # fmt: skip


def examples(n: int, patches: Patches, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """(tokens, weights, bytes of the image, how many) of each, as a store has them."""
    from PIL import Image

    rng, out = np.random.default_rng(seed), []
    for length in rng.integers(20, 200, n):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (patches.side, patches.side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(file, "png")
        text = rng.integers(1, 990, length)
        tokens = np.concatenate([[1], np.full(patches.most, IMAGE), text]).astype(np.int32)
        weights = np.zeros(len(tokens), np.float32)
        weights[-length // 2 :] = 1
        data = np.frombuffer(file.getvalue(), np.uint8)
        out.append((tokens, weights, data, np.array([len(data)], np.int32)))
    return out


class OfTorch:
    """transformers' LLaVA; its batches."""

    def __init__(self, folder: Path, docs: list, patches: Patches, batches: int) -> None:
        import torch
        from transformers import LlavaForConditionalGeneration

        torch.set_num_threads(THREADS)
        self.net = LlavaForConditionalGeneration.from_pretrained(folder).train()
        self.tx = torch.optim.AdamW(self.net.parameters(), LR, weight_decay=0.0, fused=True)
        self.torch, self.batches = torch, []
        order = sorted(range(len(docs)), key=lambda i: len(docs[i][0])) if batches > 1 else range(len(docs))
        for part in np.array_split(np.array(list(order)), batches):
            some = [docs[i] for i in part]
            width = max(len(d[0]) for d in some)
            ids, labels = np.zeros((len(some), width), np.int64), np.full((len(some), width), -100)
            mask = np.zeros((len(some), width), np.int64)
            for row, (tokens, weights, *_) in enumerate(some):
                n = len(tokens)
                ids[row, :n], mask[row, :n], labels[row, :n] = tokens, 1, np.where(weights > 0, tokens, -100)
            cells = np.stack([patches.of(d[2].tobytes()) for d in some])
            side = patches.side
            images = np.swapaxes(cells, 2, 3).reshape(len(some), side, side, 3).transpose(0, 3, 1, 2)
            self.batches.append([torch.tensor(x) for x in (ids, mask, labels, images)])
        self.total = sum((b[2][:, 1:] != -100).sum() for b in self.batches)

    def step(self) -> float:
        found = 0.0
        for ids, mask, labels, images in self.batches:
            pixels = (images.float() / 255 - 0.5) / 0.5
            logits = self.net(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1]
            loss = self.torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            loss = loss / self.total
            loss.backward()
            found += float(loss.detach())
        self.tx.step()
        self.tx.zero_grad(set_to_none=True)
        return found


class OfSftjax:
    """The step that `train` compiles, of packed rows."""

    def __init__(self, folder: Path, docs: list, patches: Patches) -> None:
        model, params = hf.load_pretrained(folder, remat="none", scan=False)
        tx = optax.adamw(LR, weight_decay=0.0)
        self.state = sftjax.TrainState.create(params=params, tx=tx)
        step = functools.partial(sftjax.train_step, loss_fn=losses.causal_lm(model), tx=tx)
        self.run = jax.jit(step, donate_argnums=0, compiler_options=xla_flags.options(jax.default_backend()))
        share = max(float(np.mean(d[0] == IMAGE)) for d in docs)
        layout = ImageTextRows(share=share, patches=patches)
        rows = pack([len(d[0]) for d in docs], WIDTH)
        self.batch = blank_batch(len(rows), WIDTH, layout=layout)
        for r, pieces in enumerate(rows):
            layout.fill({k: v[r] for k, v in self.batch.items()}, docs, pieces)

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch)
        return float(metrics["loss"])


def measure(n: int, rounds: int) -> list[dict]:
    """Examples a second of both sides, and their ratios, with torch's batch whole and in four by length."""
    found = []
    for batches in (1, 4):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(CONFIG))
            model = hf.load_model(folder)
            hf.save_pretrained(folder, model, params_lib.init(model.abstract, jax.random.key(0)))
            v = model.config.vision
            patches = Patches(v.image_size, v.patch, v.channels)
            docs = examples(n, patches)
            ours, theirs = OfSftjax(folder, docs, patches), OfTorch(folder, docs, patches, batches)
        both = [[side.step() for _ in range(2)] for side in (theirs, ours)]
        if not np.allclose(*both, rtol=ALLOWED, atol=0):
            raise ValueError(f"torch has the losses {both[0]}, sftjax {both[1]}: not the same work")
        times = in_turns({"torch": theirs.step, "sftjax": ours.step}, rounds)
        rate = {side: n / np.median([wall for wall, _ in some]) for side, some in times.items()}
        found.append(
            dict(torch_batches=batches, losses=both, examples_per_s=rate, ratio=ratios(times["torch"], times["sftjax"]))
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    found = measure(args.examples, args.rounds)
    for one in found:
        print(json.dumps(one))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
