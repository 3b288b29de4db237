"""A small random Llama and batches for it, shared by the tests."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import hf as hf_lib
from sftjax import params as params_lib
from sftjax.models import decoder

CONFIG = decoder.Config(vocab=64, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp=64, init_std=0.1)


QUICKSTART = Path(__file__).resolve().parents[2] / "experiments" / "quickstart"


def directory(path):
    """Make `path` the Hugging Face directory of a small model with the quickstart's tokenizer and
    no weights."""
    path.mkdir()
    for file in (QUICKSTART / "base_model").iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    config |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    (path / "config.json").write_text(json.dumps(config))
    return path


def drawn(path, seed):
    """The same with weights."""
    random = hf_lib.load_model(directory(path))
    hf_lib.save_pretrained(path, random, params_lib.init(random.abstract, jax.random.key(seed)))
    return path


def model(**changes) -> decoder.Model:
    return decoder.Model(CONFIG).replace(**changes)


def params(m, seed=0):
    return params_lib.init(m.abstract, jax.random.key(seed))


def batch(rows=8, length=32, seed=0, share=0.4):
    """A packed batch with unequal documents, padding and unequal trained-token counts."""
    rng = np.random.default_rng(seed)
    out = {k: np.zeros((rows, length), np.int32) for k in ("tokens", "positions", "segments")}
    out["tokens"] = rng.integers(1, 64, (rows, length)).astype(np.int32)
    for r in range(rows):
        at, segment = 0, 1
        while at < length - rng.integers(1, 6):
            n = min(int(rng.integers(3, 14)), length - at)
            out["segments"][r, at : at + n] = segment
            out["positions"][r, at : at + n] = np.arange(n)
            at, segment = at + n, segment + 1
    out["tokens"] = np.where(out["segments"] > 0, out["tokens"], 0)
    inside = np.zeros((rows, length), bool)
    inside[:, :-1] = (out["segments"][:, 1:] == out["segments"][:, :-1]) & (out["segments"][:, :-1] > 0)
    out["targets"] = np.where(inside, np.roll(out["tokens"], -1, 1), 0).astype(np.int32)
    shares = share * rng.uniform(0, 2, (rows, 1))  # some rows train much, some little
    out["weights"] = (inside & (rng.uniform(size=inside.shape) < shares)).astype(np.float32)
    return out


def token_loss(logits, targets, label_smoothing=0.0, z_loss=0.0, real=None):
    """float32 loss of each token. logits [..., V] float32, targets int [...].

    label_smoothing spreads that share of the target mass evenly over the vocabulary; z_loss adds
    z_loss * logsumexp^2. real: bool [V], where the vocabulary has tokens; None = everywhere.
    """
    lse = jax.nn.logsumexp(logits, axis=-1, where=real)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = lse - target
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - logits.mean(-1, where=real))
    if z_loss:
        loss = loss + z_loss * lse**2
    return loss
