"""Two published story models: load, check against known outputs, fine-tune, export, reload.

    SFTJAX_FIXTURES=<directory of the models> python experiments/stories/run.py [workdir] [steps]

Every line of the table is checked; a difference stops the script. With torch installed, the
logits of both the original and the exported directory are compared with those of transformers.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import sftjax
from sftjax import config as config_lib
from sftjax.evaluation.evaluator import measure
from sftjax.evaluation.generation import generate
from sftjax.train import train

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
CONFIG = Path(__file__).parent / "config.py"
PROMPT = "Once upon a time"
# What llama2.c's own program gives for stories260K.
GREEDY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
LOGITS = {",": 17.7994, "▁there": 14.2813, "▁in": 9.7097}


def main(workdir="runs/stories", steps=40):
    workdir = Path(workdir)
    write_data(workdir / "data")
    rows = []
    for name in ("stories260K-hf", "babyllama105-hf"):
        config = config_lib.load(f"{CONFIG}:{name}")
        config.data.train = str(workdir / "data" / "train.jsonl")
        config.data.validation = str(workdir / "data" / "validation.jsonl")
        config.train.duration = f"{steps} steps"
        rows += [(name, *row) for row in check_model(config, workdir / name)]
    width = max(len(what) for _, what, _ in rows)
    print("\n" + "\n".join(f"{n:<16} {w:<{width}}  {v}" for n, w, v in rows))
    return rows


def write_data(folder):
    """The paragraphs of the text as records; every tenth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (FIXTURES / "tinystories-text" / "tinystories.txt").read_text(encoding="utf-8")
    records = [json.dumps({"text": p.strip()}) + "\n" for p in text.split("\n\n") if p.strip()]
    parts = {"validation": records[::10], "train": [r for i, r in enumerate(records) if i % 10]}
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(lines))


def check_model(config, workdir):
    """(what, value) rows of one model."""
    source, export = Path(config.model.path), workdir / "export"
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model, params = sftjax.load_pretrained(source)
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    logits = all_logits(model, params, ids)[-1]
    top = [tokenizer.convert_ids_to_tokens(int(i)) for i in np.argsort(-logits)[:3]]
    known = dict(zip(top, np.sort(logits)[:-4:-1].tolist(), strict=True))
    yield f"logits after {PROMPT!r}", ", ".join(f"{t} {v:.4f}" for t, v in known.items())
    story = greedy(model, params, tokenizer)
    yield "greedy from <s>", story.splitlines()[0]
    if "260K" in source.name:
        assert story.startswith(GREEDY), story
        np.testing.assert_allclose([known[t] for t in LOGITS], list(LOGITS.values()), atol=1e-3)
    yield "difference from transformers", against_transformers(source, model, params, ids)
    sftjax.save_pretrained(workdir / "untouched", model, params, tokenizer)
    old, new = (load_file(d / "model.safetensors") for d in (source, workdir / "untouched"))
    assert old.keys() == new.keys()
    assert all(old[k].dtype == new[k].dtype and (old[k] == new[k]).all() for k in old)
    yield "exported untouched", f"{len(old)} tensors, bit for bit"

    result = train(config, workdir)
    before, after = (result[w]["losses"]["validation/loss"] for w in ("before", "after"))
    assert after < before, (before, after)
    yield f"validation loss, {result['steps']} steps", f"{before:.4f} -> {after:.4f}"
    model, params = sftjax.load_pretrained(export)
    again = validation_loss(model, params, tokenizer, config)
    assert abs(again - after) < 1e-4, (again, after)
    yield "validation loss, reloaded", f"{again:.4f}"
    yield "reloaded, difference from transformers", against_transformers(export, model, params, ids)
    story = greedy(model, params, AutoTokenizer.from_pretrained(export, trust_remote_code=False))
    yield "reloaded, greedy from <s>", story.splitlines()[0]


def all_logits(model, params, ids):
    """float32 [n, V] for one sequence of token ids."""
    batch = sftjax.data.make_batch([(ids, np.zeros(len(ids)))])
    return np.asarray(jax.jit(model.apply)(params, batch))[0]


def greedy(model, params, tokenizer):
    prompt = [tokenizer.bos_token_id]
    stop = [tokenizer.eos_token_id]
    ids = generate(model, params, [prompt], stop_ids=stop, max_new_tokens=96)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def against_transformers(directory, model, params, ids):
    """The largest absolute difference of logits from those of transformers on torch."""
    if importlib.util.find_spec("torch") is None:
        return "not measured: torch is not installed"
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0].numpy()
    difference = float(np.abs(all_logits(model, params, ids) - theirs).max())
    assert difference < 1e-3, difference
    return f"at most {difference:.1e} in a logit"


def validation_loss(model, params, tokenizer, config):
    """The loss over the held-out records, a document a row: packing must not change it."""
    records = sftjax.data.open_source(config.data.validation)
    docs = [sftjax.data.encode(r, tokenizer) for r in records]
    docs = [(d.tokens[: config.data.max_length], d.weights[: config.data.max_length]) for d in docs]
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(lambda p, b: sftjax.eval_step(p, b, loss_fn=loss_fn))
    length = config.data.max_length
    batches = (sftjax.data.make_batch(docs[i : i + 10], length) for i in range(0, len(docs), 10))
    return measure(step, params, batches)[0]["loss"]


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
