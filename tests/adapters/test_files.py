"""PEFT's directories: what has no such form is said, and not written."""

import json

import jax
import pytest
import tiny
from safetensors.numpy import load_file

from sftjax import config as config_lib
from sftjax import hf
from sftjax import params as params_lib
from sftjax.adapters import files, lora
from sftjax.errors import ModelError
from sftjax.parallel import make_mesh

LLAMA = dict(attention_bias=True, tie_word_embeddings=True)


def saved(where, rules, targets=("attention",), changes=LLAMA, **kwargs):
    """Write the adapters of a small model of which `rules` are trained besides; the tensors' names."""
    where.mkdir(exist_ok=True)
    path = tiny.directory(where / "model")
    own = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(own))
    base = hf.load_model(path)
    hf.save_pretrained(path, base, params_lib.init(base.abstract, jax.random.key(0)))
    base, params = hf.load_pretrained(path, **kwargs)
    section = config_lib.get_default().adapter
    section.kind, section.rank, section.targets = "lora", 2, targets
    model = lora.adapt(section, base)
    kinds = params_lib.map_named(lambda _, p: "float32", model.abstract)
    params = lora.begun(model, params, kinds, make_mesh({}, jax.devices()[:1]), 0)
    trainable = params_lib.match_rules(lora.rules((*rules, (".*", False)), model), model.abstract, "x")
    files.save(where / "adapter", model, params, trainable)
    return load_file(where / "adapter" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize(
    "rules, message",
    [
        ((("embed/w", True),), "the embedding is trained, which is the head too"),
        (((".*attn/q/b", True),), "self_attn.q_proj has an adapter, and a bias that is trained beside it"),
    ],
)
def test_what_peft_could_not_load(rules, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        saved(tmp_path, rules)
    assert not (tmp_path / "adapter").exists()


def test_parts_of_one_tensor_that_are_trained_otherwise(tmp_path):
    phi = dict(model_type="phi3", architectures=["Phi3ForCausalLM"], tie_word_embeddings=False)
    with pytest.raises(ModelError, match="qkv_proj.weight holds layers/0-1/attn/k/w, which is trained whole"):
        saved(tmp_path / "a", ((".*attn/k/w", True),), (".*attn/q/w",), phi)
    names = saved(tmp_path / "b", ((".*attn/k/w", True),), ("mlp",), phi)  # all of the tensor is written
    assert "base_model.model.model.layers.0.self_attn.qkv_proj.weight" in names


def test_norms_and_heads_stand_beside_adapters(tmp_path):
    names = saved(tmp_path / "a", (("norm/scale", True),))
    assert "base_model.model.model.norm.weight" in names
    how = dict(labels=("a", "b"), seed=3)  # the head is drawn, and frozen by the rules
    assert "base_model.model.score.weight" in saved(tmp_path / "b", (("norm/scale", True),), **how)


def test_new_tokens_are_not_the_base_s(tmp_path, monkeypatch):
    path = tiny.directory(tmp_path / "model")
    model = hf.load_model(path)
    model = model.replace(vocab=model.config.vocab + 1)
    with pytest.raises(ModelError, match="the base has 112 rows for tokens, and this model 113"):
        files.save(tmp_path / "adapter", model, {}, {})
