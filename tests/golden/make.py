"""Make families.json: what transformers computes for the models of tests/families.py, in fp32.

    python tests/golden/make.py

Needs the extra `parity`. Each document is run alone and without padding, so that the test shows
that padding changes nothing. Gradient norms are those of the tensors in a model's files.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "helpers")]
import reference  # noqa: E402
from families import CASES, write  # noqa: E402
from reference import F, torch, transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

# Below and beyond every window and trained length of the cases. Shortest first: dynamic rotary
# embeddings remember the longest row they have seen.
LENGTHS = (9, 33, 61, 96)
PLACES = [[0, 8], [1, 20], [2, 59], [3, 41], [3, 95]]  # (document, position) of the stored logits
NEW = 16
LEAST_GAP = 1e-4  # between a step's two best logits, of the largest: so that rounding decides none


def inputs() -> dict:
    rng = np.random.default_rng(1)
    return {
        "prompt": rng.integers(3, 64, 41).tolist(),
        "documents": [rng.integers(3, 64, n).tolist() for n in LENGTHS],
        # of the loss at each position, of the token after it
        "weights": [[*rng.integers(0, 2, n - 1).tolist(), 0] for n in LENGTHS],
        "places": PLACES,
    }


def numbers(path, given) -> dict:
    model, out = reference.load(path), {}
    out["continuation"] = continuation(model, given["prompt"])
    logits = [model(torch.tensor([d])).logits[0] for d in given["documents"]]
    out["logits"] = [[short(x) for x in logits[d][at].tolist()] for d, at in given["places"]]
    total = 0
    for x, tokens, weights in zip(logits, given["documents"], given["weights"], strict=True):
        losses = F.cross_entropy(x[:-1], torch.tensor(tokens[1:]), reduction="none")
        total += (losses * torch.tensor(weights[:-1])).sum()
    loss = total / sum(map(sum, given["weights"]))
    loss.backward()
    out["loss"] = short(loss.item())
    for p in model.parameters():  # saved as if they were weights, they have the files' names
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    model.save_pretrained(path)
    gradients = load_file(path / "model.safetensors")
    out["gradients"] = {k: short(np.linalg.norm(gradients[k])) for k in sorted(gradients)}
    return out


def continuation(model, prompt) -> list[int]:
    text = reference.greedy(model, prompt, NEW)
    steps = reference.logits(model, np.array([prompt + text]))[0, len(prompt) - 1 : -1]
    second, best = np.sort(steps, -1)[:, -2:].T
    if np.min(best - second) < LEAST_GAP * np.abs(steps).max():
        raise SystemExit(f"the greedy text of {type(model)} is all but a tie: take another prompt")
    return text


def short(x) -> float:
    return float(f"{float(x):.6g}")


def main():
    made = {"torch": torch.__version__, "transformers": transformers.__version__}
    out = {"made_with": made, **inputs(), "cases": {}}
    for name in CASES:
        with tempfile.TemporaryDirectory() as directory:
            out["cases"][name] = numbers(write(name, directory), out)
        print(name, "loss", out["cases"][name]["loss"], flush=True)
    lists = {k: v for k, v in out.items() if k != "cases"}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in out["cases"].items())
    text = json.dumps(lists)[:-1] + ',\n"cases": {\n' + lines + "\n}}\n"  # a line for each case
    (HERE / "families.json").write_text(text)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
