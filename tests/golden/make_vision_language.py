"""Make vision_language.json: what transformers computes for decoders that read images, in fp32.

    python tests/golden/make_vision_language.py

Needs the extra `parity`. Of texts with two images, one and none: logits of each last token, the mean loss, and the
gradients' norms by tensor.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "helpers")]
from vision_language import CASES, docs, loaded, stored  # noqa: E402
from vision_language_reference import gradients, theirs  # noqa: E402


def short(x, digits):
    return [float(f"{v:.{digits}g}") for v in np.asarray(x, np.float64).ravel().tolist()]


def case(name, directory) -> dict:
    model, _ = loaded(name, directory / "in")
    reference, texts = theirs(directory / "in"), docs(model)
    last = [short(reference.logits(model, d)[-1].detach(), 7) for d in texts]
    value = gradients(reference, model, texts, directory / "out")
    norms = {k: float(f"{np.linalg.norm(x):.6g}") for k, x in sorted(stored(directory / "out").items())}
    return {"logits": last, "loss": value, "gradients": {k: x for k, x in norms.items() if ".head." not in k}}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {name: case(name, Path(folder) / name) for name in CASES}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(x)}" for name, x in found.items())
    (HERE / "vision_language.json").write_text("{\n" + lines + "\n}\n")
