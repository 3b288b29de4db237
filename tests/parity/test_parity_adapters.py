"""Adapters against PEFT: logits, twenty steps of AdamW, directories in both directions."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from families import CASES, write
from reference import close, fresh, padded, random_tokens, torch

import sftjax
from experiments.adapters.read_peft import load
from sftjax import config as config_lib
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.adapters import files
from sftjax.adapters import lora as targets
from sftjax.errors import WeightsError

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

KINDS = {
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
}
RANK, ALPHA = 4, 8.0


def adapted(path, kind, wanted=("all_linear",), rank=RANK):
    """(model, parameters at step 0, tree of what is trained) of a directory with adapters."""
    section = config_lib.get_default().adapter
    section.kind, section.rank, section.alpha, section.targets = kind, rank, ALPHA, wanted
    base, params = sftjax.load_pretrained(path)
    model = targets.adapt(section, base)
    kinds = params_lib.map_named(lambda name, p: jnp.dtype(jnp.float32), model.abstract)
    mesh = parallel.make_mesh({}, jax.devices()[:1])
    rules = targets.rules(((".*", True),), model)
    trainable = params_lib.match_rules(rules, model.abstract, "trainable")
    return model, targets.begun(model, params, kinds, mesh, 0), trainable


def moved(params, size=0.05):
    """The parameters with their adapters moved away from the start."""

    def one(name, x):
        if not name.endswith(("/w/a", "/w/b", "/w/magnitude")):
            return x
        noise = np.random.default_rng(len(name)).normal(size=x.shape)
        return x + size * jnp.asarray(noise, x.dtype)

    return params_lib.map_named(one, params)


def theirs(path, kind, modules=None):
    base = reference.load(path)
    modules = modules or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM", **KINDS[kind])
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


def logits(model, tokens):
    with torch.no_grad():
        return fresh(model)(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("llama"))


# ---- the same numbers ----------------------------------------------------------------------


def test_the_first_factor_is_drawn_from_the_range_of_pefts(llama):
    _, params, _ = adapted(llama, "lora")
    for name, node in targets.nodes_of(params).items():
        bound = 1 / np.sqrt(node.fan_in)
        assert 0.9 * bound < np.abs(node.a).max() <= bound and not np.any(node.b), name
    weights = theirs(llama, "lora").state_dict()
    largest = max(x.abs().max() * x.shape[1] ** 0.5 for k, x in weights.items() if "lora_A" in k)
    assert 0.9 < largest <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_twenty_steps(llama, kind, tmp_path):
    other = theirs(llama, kind)
    if kind in ("pissa", "olora"):  # its start is no part of a directory
        model, params, trainable = adapted(llama, kind)
    else:
        with torch.no_grad():
            for name, x in other.named_parameters():
                if "lora_B" in name or "magnitude" in name:
                    x += 0.1 * torch.randn_like(x)
        other.save_pretrained(tmp_path)
        model, params = load(tmp_path, *sftjax.load_pretrained(llama))
        rules = targets.rules(((".*", True),), model)
        trainable = params_lib.match_rules(rules, model.abstract, "trainable")
    tokens = random_tokens(64)
    close(model.apply(params, {"tokens": tokens}), logits(other, tokens), 1e-5)

    batch = padded(np.random.default_rng(1), 64, [40, 7, 23, 31])
    tx = optax.adamw(1e-3, weight_decay=0.01)
    state = sftjax.TrainState.create(params=params, tx=tx, trainable=trainable)
    loss_fn = sftjax.losses.causal_lm(model)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx))
    adamw = torch.optim.AdamW([x for x in other.parameters() if x.requires_grad], 1e-3, weight_decay=0.01)
    for _ in range(20):
        state, metrics = step(state, batch)
        adamw.zero_grad()
        loss = reference.loss(other, batch)
        loss.backward()
        adamw.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
    close(model.apply(state.all_params, {"tokens": tokens}), logits(other, tokens), 1e-4)
    frozen = params_lib.partition(params, trainable)[1]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


# ---- directories -----------------------------------------------------------------------------

CAUSAL = {
    "llama": ("q_proj", "o_proj"),
    "llama-biases": ("gate_proj",),
    "phi3": ("qkv_proj", "gate_up_proj"),  # fused in the files
    "gpt2": ("c_attn", "c_fc"),  # matrices the other way round
    "gpt_neox": ("query_key_value",),  # fused by heads
}


def test_the_families_named_here_are_there():
    assert {*CAUSAL} <= {*CASES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_peft_loads_what_we_write(name, kind, tmp_path):
    path = write(name, tmp_path / "base")
    model, params, trainable = adapted(path, kind)
    params = moved(params)
    files.save(tmp_path / "adapter", model, params, trainable)
    other = peft.PeftModel.from_pretrained(reference.load(path), tmp_path / "adapter")
    tokens = random_tokens(64)
    ours = model.apply(params, {"tokens": tokens})
    close(ours, logits(other, tokens), 1e-5)
    plain, added = targets.merged(model, params)
    close(plain.apply(added, {"tokens": tokens}), ours, 1e-5)
    back = load(tmp_path / "adapter", *sftjax.load_pretrained(path))
    close(back[0].apply(back[1], {"tokens": tokens}), ours, 1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", CAUSAL)
def test_we_load_what_peft_writes(name, kind, tmp_path):
    path = write(name, tmp_path / "base")
    other = theirs(path, kind, list(CAUSAL[name]))
    with torch.no_grad():
        for key, x in other.named_parameters():
            if "lora_B" in key:
                x += 0.1 * torch.randn_like(x)
    other.save_pretrained(tmp_path / "adapter")
    model, params = load(tmp_path / "adapter", *sftjax.load_pretrained(path))
    tokens = random_tokens(64)
    close(model.apply(params, {"tokens": tokens}), logits(other, tokens), 1e-5)


def test_ranks_and_alphas_by_module_are_read(llama, tmp_path):
    how = dict(rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 6}, alpha_pattern={"q_proj": 3, "v_proj": 12})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], use_rslora=True, **how)
    other = peft.get_peft_model(reference.load(llama), config)
    with torch.no_grad():
        for key, x in other.named_parameters():
            if "lora_B" in key:
                x += 0.1 * torch.randn_like(x)
    other.save_pretrained(tmp_path)
    model, params = load(tmp_path, *sftjax.load_pretrained(llama))
    tokens = random_tokens(64)
    close(model.apply(params, {"tokens": tokens}), logits(other, tokens), 1e-5)


def test_an_adapter_of_another_base_is_refused(llama, tmp_path):
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj"])
    peft.get_peft_model(reference.load(write("gpt2", tmp_path / "b")), peft.LoraConfig(r=2)).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="are not of this model"):
        load(tmp_path, *sftjax.load_pretrained(llama))
    other = write("llama-odd", tmp_path / "c")
    peft.get_peft_model(reference.load(other), config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"expected shape \(4, 32\), found \(4, 27\); is it of another base"):
        load(tmp_path, *sftjax.load_pretrained(llama))


def test_a_classifier_and_its_head(tmp_path):
    path = write("bert-classes", tmp_path / "base")
    from transformers import AutoModelForSequenceClassification as Auto

    model, params, trainable = adapted(path, "lora")
    on = params_lib.map_named(lambda name, x: x or name.startswith("score/"), trainable)
    params = moved(params) | {"score": jax.tree.map(lambda x: x + 0.1, params["score"])}
    files.save(tmp_path / "adapter", model, params, on)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    other = peft.PeftModel.from_pretrained(Auto.from_pretrained(path).eval(), tmp_path / "adapter").eval()
    tokens = random_tokens(model.config.vocab)
    hidden = model.hidden(params, {"tokens": tokens})
    ours = model.class_logits(params, hidden)[:, 0]
    with torch.no_grad():
        expected = other(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    close(ours, expected, 1e-5)
    model, params = load(tmp_path / "adapter", *sftjax.load_pretrained(path))
    close(model.class_logits(params, model.hidden(params, {"tokens": tokens}))[:, 0], expected, 1e-5)


def test_an_encoder_decoder(tmp_path):
    from test_parity_seq2seq import batch, inputs
    from test_parity_seq2seq import theirs as whole

    path = write("t5", tmp_path / "base")
    model, params, trainable = adapted(path, "lora")
    params = moved(params)
    files.save(tmp_path / "adapter", model, params, trainable)
    other = peft.PeftModel.from_pretrained(whole(path), tmp_path / "adapter").eval()
    b = batch(model.config.vocab)
    with torch.no_grad():
        expected = other(**inputs(b, model.config.start_id)).logits.numpy()
    there = b["target_segments"] > 0
    close(np.asarray(model.logits(params, model.hidden(params, b)))[there], expected[there], 1e-5)


def test_peft_loads_weights_of_several_ranks(llama, tmp_path):
    section = config_lib.get_default().adapter
    section.kind, section.rank, section.ranks = "rslora", RANK, (("attention", 2), (".*/down/w", 7))
    base, params = sftjax.load_pretrained(llama)
    model = targets.adapt(section, base)
    kinds = params_lib.map_named(lambda name, p: jnp.dtype(jnp.float32), model.abstract)
    params = moved(targets.begun(model, params, kinds, parallel.make_mesh({}, jax.devices()[:1]), 0))
    ranks = {name: node.a.shape[-1] for name, node in targets.nodes_of(params).items()}
    assert {n: 2 if "attn" in n else 7 if "down" in n else RANK for n in ranks} == ranks and len(
        set(ranks.values())
    ) == 3
    on = params_lib.match_rules(targets.rules(((".*", True),), model), model.abstract, "trainable")
    files.save(tmp_path, model, params, on)
    other = peft.PeftModel.from_pretrained(reference.load(llama), tmp_path)
    tokens = random_tokens(64)
    close(model.apply(params, {"tokens": tokens}), logits(other, tokens), 1e-5)


def test_pissa_that_was_not_converted_is_refused(llama, tmp_path):
    theirs(llama, "pissa").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="init_lora_weights='pissa' is not read"):
        load(tmp_path, *sftjax.load_pretrained(llama))
