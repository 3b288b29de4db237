"""transformers and torch as the reference of the parity tests.

Without torch they are skipped; SFTJAX_REQUIRE_PARITY=1 makes that a failure.
"""

import copy
import json
import os

import numpy as np
import pytest

from sftjax import params as params_lib

if os.environ.get("SFTJAX_REQUIRE_PARITY") == "1":
    import torch
else:
    torch = pytest.importorskip("torch")
import torch.nn.functional as F
import transformers
from loop_reference import Loop

torch.set_num_threads(1)  # its threads only wait for each other on models this small


def load(path, dtype=None):
    """transformers' model of a directory, every tensor of it used and none missing."""
    hf = json.loads((path / "config.json").read_text())
    config = None
    if hf["model_type"] == "iquestloopcoder":
        return Loop.from_pretrained(path, dtype).eval()
    if hf["model_type"] == "iquestcoder":  # a Llama by another name
        config = transformers.LlamaConfig.from_dict(hf | {"model_type": "llama"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype or "auto",
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model.eval()


def fresh(model):
    """A copy: dynamic rotary embeddings remember the longest row they have seen."""
    return copy.deepcopy(model)


def run(model, tokens):
    """(float32 logits [B, S, V] of int [B, S], a mixture's experts [B, S, layers, k], sorted)."""
    model, experts = fresh(model), []

    def keep(router, args, out):
        experts.append(out[2].sort(-1).values.numpy().reshape(*tokens.shape, -1))

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(keep)
    with torch.no_grad():
        out = model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()
    return out, np.stack(experts, 2) if experts else None


def logits(model, tokens):
    return run(model, tokens)[0]


def greedy(model, prompt, new, stop=None):
    """The tokens that transformers generates after a list of tokens."""
    model = fresh(model)
    model.generation_config.eos_token_id = None  # generate() would take it from there
    config = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=stop)
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), generation_config=config)
    return out[0, len(prompt) :].tolist()


def loss(model, batch, **how):
    """Mean cross-entropy over the trained targets; the rest is torch's ignore_index."""
    mask = torch.tensor(batch["segments"], dtype=torch.long)
    out = model(torch.tensor(batch["tokens"], dtype=torch.long), attention_mask=mask).logits
    labels = torch.tensor(np.where(batch["weights"] > 0, batch["targets"], -100), dtype=torch.long)
    return F.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=-100, **how)


def random_tokens(vocab, rows=4, length=48, seed=0):
    return np.random.default_rng(seed).integers(1, vocab, (rows, length)).astype(np.int32)


def padded(rng, vocab, lengths, width=40):
    """A Batch of one right-padded document a row, a prompt of a third of it masked."""
    tokens = rng.integers(1, vocab, (len(lengths), width)).astype(np.int32)
    at, lengths = np.arange(width), np.array(lengths)[:, None]
    segments = (at < lengths).astype(np.int32)
    weights = ((at >= lengths // 3) & (at < lengths - 1)).astype(np.float32)
    return {
        "tokens": tokens * segments,
        "targets": np.roll(tokens, -1, 1) * (at < lengths - 1),
        "weights": weights,
        "positions": at * segments,
        "segments": segments,
    }


def close(ours, expected, tolerance):
    """max |difference| / max |expected| is at most `tolerance`."""
    assert ours.shape == expected.shape
    error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, error


def close_norms(ours, expected, tolerance, zero=()):
    """The same in norm, for each leaf of two trees. zero: names of leaves that only rounding makes
    other than 0; the tolerance is there a share of the whole tree's norm."""
    ours, expected = params_lib.flatten(ours), params_lib.flatten(expected)
    assert ours.keys() == expected.keys()
    norms = {name: np.linalg.norm(x) for name, x in expected.items()}
    whole = np.linalg.norm(list(norms.values()))
    for name, x in ours.items():
        norm = whole if name in zero else norms[name]
        assert norm > 0, name
        error = np.linalg.norm(np.asarray(x) - np.asarray(expected[name])) / norm
        assert error <= tolerance, f"{name}: {error}"
