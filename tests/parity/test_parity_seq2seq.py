"""T5 and BART against transformers: logits, gradients, generated text, files."""

import json

import jax
import numpy as np
import pytest
from families import PAIRED, write
from reference import close, close_norms, fresh, load, torch, transformers
from safetensors.numpy import load_file, save_file

import sftjax
from sftjax import losses
from sftjax import params as params_lib
from sftjax.evaluation import generation

pytestmark = pytest.mark.parity
LENGTHS, TARGETS = (24, 17, 5), (9, 4, 12)


def theirs(path):
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    # A buffer of zeros, and a table that T5 shares.
    assert {*info["missing_keys"]} <= {"final_logits_bias", "lm_head.weight"}, info
    return model.eval()


def batch(vocab, width=24, target=12):
    """Right-padded rows of a source and a target each."""
    rng = np.random.default_rng(0)
    out = {}
    for name, lengths, n in [("", LENGTHS, width), ("target_", TARGETS, target)]:
        there = np.arange(n) < np.array(lengths)[:, None]
        out[f"{name}segments"] = there.astype(np.int32)
        out[f"{name}positions"] = np.broadcast_to(np.arange(n), there.shape).astype(np.int32)
        out[name.rstrip("_") + "s" if name else "tokens"] = (rng.integers(3, vocab, there.shape) * there).astype(
            np.int32
        )
    return out | {"weights": out["target_segments"].astype(np.float32)}


def inputs(b, start):
    long = lambda x: torch.tensor(np.asarray(x), dtype=torch.long)  # noqa: E731
    shifted = np.pad(b["targets"], ((0, 0), (1, 0)), constant_values=start)[:, :-1]
    return dict(
        input_ids=long(b["tokens"]), attention_mask=long(b["segments"]),
        decoder_input_ids=long(shifted), decoder_attention_mask=long(b["target_segments"]),
    )  # fmt: skip


def packed(b):
    """The rows of a batch one after the other in one row."""
    out = {}
    for name, lengths in [("", LENGTHS), ("target_", TARGETS)]:
        places = np.concatenate([np.arange(n) for n in lengths])
        out[f"{name}positions"] = places[None].astype(np.int32)
        out[f"{name}segments"] = np.repeat(np.arange(len(lengths)) + 1, lengths)[None]
        key = "targets" if name else "tokens"
        rows = zip(b[key], lengths, strict=True)
        out[key] = np.concatenate([row[:n] for row, n in rows])[None].astype(np.int32)
    return out


# "xla" has a way of its own to know distances alone.
BACKENDS = [*((name, "blockwise") for name in PAIRED), ("t5", "xla")]


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_logits_and_gradients_equal_transformers(tmp_path, name, backend):
    path = write(name, tmp_path)
    model, params = sftjax.load_pretrained(path, attention=backend)
    reference, b = theirs(path), batch(model.config.vocab)
    out = reference(**inputs(b, model.config.start_id)).logits
    there = b["target_segments"] > 0
    hidden = jax.jit(model.hidden)(params, b)
    close(np.asarray(model.logits(params, hidden))[there], out.detach().numpy()[there], 1e-5)

    loss = torch.nn.functional.cross_entropy(
        out[torch.tensor(there)], torch.tensor(b["targets"][there], dtype=torch.long)
    )
    loss.backward()
    loss_fn = losses.causal_lm(model)

    def mean(params):
        found = loss_fn(params, b, None)
        return found.sum / found.weight

    ours, grads = jax.jit(jax.value_and_grad(mean))(params)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    expected = {k: v.grad.numpy() for k, v in reference.named_parameters()}
    found, grads = {}, params_lib.flatten(grads)
    for parameter, files, layout in sftjax.hf.names.tensors(model):
        for at, file in files.items():
            found[file] = np.empty(expected[file].shape, np.float32)
            layout.write(found[file], np.asarray(grads[parameter][at] if at else grads[parameter]))
    # A number that is added to all keys changes no softmax.
    zero = [k for k in found if k.endswith("k_proj.bias")]
    close_norms(found, {k: expected[k] for k in found}, 1e-4, zero)
    assert found.keys() | {"lm_head.weight"} == expected.keys() | {"lm_head.weight"}


@pytest.mark.parametrize("name", PAIRED)
def test_packed_pairs_are_as_alone(tmp_path, name):
    model, params = sftjax.load_pretrained(write(name, tmp_path))
    b = batch(model.config.vocab)
    alone = np.asarray(model.hidden(params, b))[b["target_segments"] > 0]
    together = np.asarray(model.hidden(params, packed(b)))[0]
    close(together, alone, 1e-5)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (4, 2.0), (2, -1.0)])
def test_text_equals_transformers(tmp_path, name, beams, penalty):
    path = write(name, tmp_path)
    model, params = sftjax.load_pretrained(path)
    reference, b = theirs(path), batch(model.config.vocab)
    prompts = [row[:n].tolist() for row, n in zip(b["tokens"], LENGTHS, strict=True)]
    config = json.loads((path / "config.json").read_text())
    # A token that is often drawn ends an answer, so that answers of several lengths compete.
    free = generation.generate(model, params, prompts, max_new_tokens=8)
    eos = free[0][5]
    options = dict(beams=beams, length_penalty=penalty)
    ours = generation.generate(model, params, prompts, stop_ids=[eos], max_new_tokens=10, **options)
    for prompt, mine in zip(prompts, ours, strict=True):
        how = transformers.GenerationConfig(
            max_new_tokens=10, num_beams=beams, length_penalty=penalty, eos_token_id=eos,
            pad_token_id=config["pad_token_id"], decoder_start_token_id=model.config.start_id,
            early_stopping=False,
        )  # fmt: skip
        out = reference.generate(torch.tensor([prompt]), generation_config=how)[0, 1:].tolist()
        out = out[: out.index(eos)] if eos in out else out
        assert mine == out[: len(mine) + 1]


@pytest.mark.parametrize("name", PAIRED)
def test_files_are_bit_equal_both_ways(tmp_path, name):
    path = write(name, tmp_path / "a")
    model, params = sftjax.load_pretrained(path)
    sftjax.save_pretrained(tmp_path / "b", model, params)
    before = load_file(path / "model.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() for k in before)
    assert theirs(tmp_path / "b") is not None
    theirs(path).save_pretrained(tmp_path / "c")  # with what transformers writes besides
    _, again = sftjax.load_pretrained(tmp_path / "c")
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))


def test_bart_with_a_logits_bias_is_refused(tmp_path):
    path = write("bart", tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"final_logits_bias": np.ones((1, 64), np.float32)}, path / "model.safetensors")
    with pytest.raises(ValueError, match="final_logits_bias is not 0"):
        sftjax.load_pretrained(path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_beams_of_a_decoder_equal_transformers(tmp_path, name):
    path = write(name, tmp_path)
    model, params = sftjax.load_pretrained(path)
    reference, prompts = load(path), [[5, 9, 33, 7, 21, 40], [11, 4]]
    eos = generation.generate(model, params, prompts, max_new_tokens=6)[0][4]
    how = dict(max_new_tokens=9, length_penalty=0.5)
    ours = generation.generate(model, params, prompts, stop_ids=[eos], beams=3, **how)
    for prompt, mine in zip(prompts, ours, strict=True):
        options = transformers.GenerationConfig(
            num_beams=3, eos_token_id=eos, pad_token_id=0, early_stopping=False, **how
        )
        out = fresh(reference).generate(torch.tensor([prompt]), generation_config=options)
        out = out[0, len(prompt) :].tolist()
        assert mine == (out[: out.index(eos)] if eos in out else out)[: len(mine) + 1]
