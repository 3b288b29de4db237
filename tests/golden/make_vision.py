"""Make vision.json: what transformers computes for models of images, in fp32.

    python tests/golden/make_vision.py

Needs the extra `parity`. With batch statistics of the files ("eval"), and for ResNets with those of
the batch ("train"): logits, the mean loss, the gradients' norms by tensor, and new statistics.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "helpers")]
from reference import F, torch, transformers  # noqa: E402
from vision import CASES, PIXELS, WANTED, images, write  # noqa: E402


def short(x):
    return [float(f"{v:.7g}") for v in np.asarray(x, np.float64).ravel().tolist()]


def norms(named):
    return {k: float(f"{np.linalg.norm(v):.6g}") for k, v in sorted(named.items())}


def pixel_values():
    x = (images() / 255 - PIXELS["image_mean"]) / PIXELS["image_std"]
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def reference(path):
    return transformers.AutoModelForImageClassification.from_pretrained(path)


def measured(model) -> dict:
    """Logits, loss and gradients of a model as it is."""
    model.zero_grad()
    logits = model(pixel_values=pixel_values()).logits
    loss = F.cross_entropy(logits, torch.tensor(WANTED))
    loss.backward()
    return {"logits": short(logits.detach()), "loss": short(loss.item())}


def case(name, directory) -> dict:
    model = reference(write(name, directory))
    out = {"eval": measured(model.eval())}
    kept = {k: p.detach().clone() for k, p in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad if p.grad is not None else 0 * p)
    model.save_pretrained(directory)
    out["eval"]["gradients"] = gradients(directory)
    if "resnet" in name:
        model.load_state_dict(kept)
        out["train"] = measured(model.train())
        found = {k: v for k, v in model.state_dict().items() if k.endswith(("_mean", "_var"))}
        out["train"]["statistics"] = norms({k: v.numpy() for k, v in found.items()})
    return out


def gradients(directory):
    from safetensors.numpy import load_file

    found = load_file(Path(directory) / "model.safetensors")
    skipped = ("_mean", "_var", "num_batches_tracked")
    mine = {k: v for k, v in found.items() if not k.endswith(skipped) and ".head." not in k}
    return norms(mine)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {name: case(name, Path(folder) / name) for name in CASES}
    (HERE / "vision.json").write_text(json.dumps(found, indent=1) + "\n")
