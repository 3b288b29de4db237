"""Adapters as weight nodes: what is computed, what is not, meshes, rules, bad input, a run that is resumed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adapted import adapted, close, config, losses_of, section, step
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from sftjax import config as config_lib
from sftjax import evaluate, losses, parallel
from sftjax import params as params_lib
from sftjax import train as train_lib
from sftjax.adapters import lora
from sftjax.errors import CheckpointError, ConfigError
from sftjax.ops import weight
from sftjax.training import build

KINDS = ("lora", "rslora", "dora", "pissa", "olora")
MOE = dict(experts=4, experts_per_token=2)
SLOW = pytest.mark.slow


# ---- the node --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(MOE, marks=SLOW), pytest.param({"split": (1,)}, marks=SLOW)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind, changes):
    targets = ("attention",) if kind == "dora" and "experts" in changes else ("all_linear",)
    model, params, _ = adapted(section(kind, targets=targets), **changes)
    batch = tiny.batch(rows=2)
    plain, added = lora.merged(model, params)
    assert not any(map(weight.is_node, jax.tree.leaves(added, is_leaf=weight.is_node)))
    close(jax.jit(model.apply)(params, batch), jax.jit(plain.apply)(added, batch))


def test_a_head_takes_an_adapter():
    model, params, _ = adapted(section(targets=("head/w", "mlp")))
    plain, added = lora.merged(model, params)
    close(model.apply(params, tiny.batch(rows=2)), plain.apply(added, tiny.batch(rows=2)))


@SLOW
def test_slices_of_an_mlp(monkeypatch):
    monkeypatch.setattr("sftjax.models.layer.SLICE", 16)
    for kind in ("lora", "pissa"):
        model, params, _ = adapted(section(kind), remat="full")
        plain, added = lora.merged(model, params)
        close(model.apply(params, tiny.batch(rows=2)), plain.apply(added, tiny.batch(rows=2)))
    model, params, _ = adapted(section("dora"), remat="full")
    with pytest.raises(ConfigError, match="adapter.kind='dora' with model.remat full or offload: leave mlp/down out"):
        model.apply(params, tiny.batch(rows=2))


def compiled(model, params, trainable, batch):
    trained, frozen = params_lib.partition(params, trainable)

    def loss(trained, frozen, batch):
        return losses.causal_lm(model)(params_lib.combine(trained, frozen), batch, None).sum

    return jax.jit(jax.grad(loss)).lower(trained, frozen, batch).compile()


BIG = dict(width=512, heads=8, kv_heads=8, head_dim=64, mlp=2048, layers=2, scan=False)


def test_the_gradient_of_the_base_is_not_computed():
    """Four of the six products of full fine-tuning are left, and what the factors cost."""
    model, params, trainable = adapted(section(rank=4), **BIG)
    whole = tiny.model(**BIG)
    batch = {k: jnp.asarray(v) for k, v in tiny.batch(rows=4, length=64).items()}
    with_adapters = compiled(model, params, trainable, batch).cost_analysis()["flops"]
    every = tiny.params(whole)
    full = compiled(whole, every, jax.tree.map(lambda _: True, every), batch).cost_analysis()["flops"]
    assert with_adapters <= 0.70 * full, with_adapters / full
    of = model.train_flops(trainable)(256, 100, lambda window: 0)
    assert of <= 0.70 * whole.train_flops(jax.tree.map(lambda _: True, every))(256, 100, lambda window: 0)


@SLOW
def test_dropout_is_of_the_training_loss_alone_and_keeps_the_mean():
    model, params, _ = adapted(section(dropout=0.5))
    batch, loss_fn = tiny.batch(rows=2), losses.causal_lm(model)
    loss = lambda rng: float(jax.jit(lora.seeded(loss_fn))(params, batch, rng).sum)  # noqa: E731
    plain = float(loss_fn(params, batch, None).sum)
    assert loss(None) == pytest.approx(plain, rel=1e-6)
    drawn = [loss(jax.random.key(i)) for i in range(3)]
    assert len(set(drawn)) == 3 and loss(jax.random.key(0)) == drawn[0]
    assert abs(np.mean(drawn) / plain - 1) < 0.2
    x = jnp.ones((4, 64, 32))
    node = lora.LoRA(jnp.zeros((32, 8)), jnp.eye(32, 8), jnp.eye(8), dims="io", rate=0.5)
    y = node.replace(seed=jnp.array([1, 2], jnp.uint32)).einsum("bsd,df->bsf", x)
    assert set(np.unique(y)) == {0, 2} and abs(float(y.mean()) - 1) < 0.1


# ---- a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=SLOW), pytest.param("pissa", marks=SLOW)])
def test_the_base_stays_and_has_no_moments(kind):
    before, after, _ = step(section(kind))
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    names = params_lib.flatten(after.params)
    assert names and all(name.endswith(("/w/a", "/w/b", "/w/magnitude")) for name in names)
    for name, x in names.items():
        assert not np.array_equal(x, params_lib.flatten(before.params)[name]), name
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == params_lib.count(after.params)


@SLOW
@pytest.mark.parametrize(
    ("kind", "sizes", "changes"),
    [
        ("lora", {"data": 2, "fsdp": 2, "tensor": 2}, {}),
        ("dora", {"fsdp": 4, "tensor": 2}, {}),
        ("pissa", {"fsdp": 4, "context": 2}, {"split": (2,)}),
        ("rslora", {"data": 2, "fsdp": 2, "expert": 2}, MOE),
    ],
    ids=str,
)
def test_eight_devices_are_one(kind, sizes, changes):
    _, one, expected = step(section(kind), **changes)
    _, many, found = step(section(kind), parallel.make_mesh(sizes), **changes)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)
    close(many.params, one.params, 1e-4)
    name = next(iter(many.params["layers"]))
    assert many.params["layers"][name]["attn"]["q"]["w"].a.sharding.spec == P(None, "fsdp", None)


@SLOW
def test_dropout_is_that_of_one_device_on_shards_of_rows():
    _, _, expected = step(section(dropout=0.3))
    _, _, found = step(section(dropout=0.3), parallel.make_mesh({"fsdp": 8}))
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


# ---- what is trained, bad input ----------------------------------------------------------------


def test_rules_beside_adapters():
    model, _, trainable = adapted(section(targets=("attention",)))
    given = (("norm/scale", True), (".*", False))
    on = params_lib.match_rules(lora.rules(given, model), model.abstract, "trainable")
    default, on = params_lib.flatten(trainable), params_lib.flatten(on)
    assert {name for name, x in on.items() if x} - {name for name, x in default.items() if x} == {"norm/scale"}
    assert not on["layers/0-3/attn/q/w/base"] and on["layers/0-3/attn/q/w/a"] and not on["layers/0-3/mlp/up/w"]


BAD = {
    "rank": (dict(rank=33), "adapter.rank=33: layers/0-3/attn/k/w is a matrix of 32 x 16, expected 1 to 16; lower it"),
    "unknown": (
        dict(targets=("layers/0-3/attn/qq/w",)),
        "adapter.targets: 'layers/0-3/attn/qq/w' matches no weight .*; the nearest are layers/0-3/attn/q/w, ",
    ),
    "none": (dict(targets=()), "adapter.targets: '' matches no weight that takes an adapter, expected all_linear, "),
    "regex": (dict(targets=("(",)), r"adapter.targets: '\(' is not a regular expression"),
    "norm": (dict(targets=("norm/scale",)), "adapter.targets: 'norm/scale' matches no weight that takes an adapter"),
    "ranks": (dict(ranks=(("cross", 2),)), "adapter.ranks: rule 'cross' matches no parameter"),
    "embedding": (dict(targets=("mlp", "embed/w")), "adapter.targets: 'embed/w' matches no weight that takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    values, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        adapted(section(**values))


def test_bad_values_of_the_config():
    for key, value, message in [
        ("rank", 0, "adapter.rank=0: expected a number from 1"),
        ("kind", "lorra", r"adapter.kind='lorra': expected '' \| lora .*did you mean lora"),
        ("dropout", 1.0, "adapter.dropout=1.0: expected a number from 0 to 0.99"),
        ("ranks", (("mlp", 2.5),), r"adapter.ranks: \('mlp', 2.5\): expected \(regex, a whole number from 1 on\)"),
        ("ranks", (("mlp", 0),), r"adapter.ranks: \('mlp', 0\): expected \(regex, a whole number from 1 on\)"),
    ]:
        c = config_lib.get_default()
        c.adapter[key] = value
        with pytest.raises(ConfigError, match=message):
            config_lib.check(c)
    c = config_lib.get_default()
    config_lib.override(c, "adapter.targets", "attention,layers/.*/mlp/up/w")
    assert c.adapter.targets == ("attention", "layers/.*/mlp/up/w")


def test_lengths_are_as_exact_in_bfloat16_as_what_is_learned():
    """At step 0 DoRA is the base, and a length that grows by a thousandth shows, where steps near 1 are larger."""
    model, params, _ = adapted(section("dora"))
    low, batch = model.replace(dtype="bfloat16"), tiny.batch(rows=2)
    start = params_lib.map_named(lambda n, x: 0 * x if n.endswith("/b") else x, params)
    start = jax.tree.map(lambda w: w.started() if weight.is_node(w) else w, start, is_leaf=weight.is_node)
    plain = lora.plain(start)
    exact = lora.without(model).apply(plain, batch)
    own, base = (jnp.linalg.norm(x - exact) for x in (low.apply(start, batch), lora.without(low).apply(plain, batch)))
    assert own < 1.3 * base
    node = jax.tree.map(lambda x: x[0], start["layers"]["0-3"]["attn"]["q"]["w"])
    x = jax.random.normal(jax.random.key(0), (2, 64, 32), jnp.bfloat16)
    longer = dataclasses.replace(node, magnitude=1.001 * node.magnitude)
    changed = node.einsum("bsd,dnh->bsnh", x) != longer.einsum("bsd,dnh->bsnh", x)
    assert 0.1 < float(jnp.mean(changed)) < 0.6
    axes = dict(w=("embed", "heads", None))
    kept = weight.gather_for_use({"w": longer}, axes, jnp.bfloat16)["w"]
    assert (kept.magnitude.dtype, kept.a.dtype) == (jnp.float32, jnp.bfloat16)


def test_a_learning_rate_that_is_set_stays():
    c = config_lib.get_default()
    assert config_lib.settle(c) == (c, "")
    c.adapter.rank = 8
    with pytest.raises(ConfigError, match="adapter.rank=8 is read with adapter.kind"):
        config_lib.settle(c)
    c.adapter.kind = "lora"
    raised, text = config_lib.settle(c)
    assert "ten times" in text and raised.optim.lr == pytest.approx(2e-4)
    assert c.optim.lr == 2e-5  # the caller's own, with which a next run may train all
    assert config_lib.settle(raised) == (raised, "")
    for value in ("2e-5", "1e-3"):
        c = config_lib.get_default()
        c.adapter.kind = "lora"
        config_lib.override(c, "optim.lr", value)
        assert config_lib.settle(c)[0].optim.lr == float(value)


def test_the_table_of_weights():
    model, _, _ = adapted(section(targets=("layers/.*/attn/[qv]/w",)))
    lines = lora.table(model).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["layers/0-3/attn/q/w", "4", "32", "32", "4", "1,024"],
        ["layers/0-3/attn/v/w", "4", "32", "16", "4", "768"],
    ]


# ---- a run ---------------------------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_a_run_resumes_bit_equal_and_its_checkpoints_hold_no_base(files, tmp_path, kind, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    result = train_lib.train(config(files, kind), whole)
    said = capsys.readouterr().out
    assert "layers/0-1/mlp/up/w" in said and "ten times its default" in said
    assert losses_of(whole)[1][2] == pytest.approx(2e-4)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "6")
    shutil.rmtree(part / "export")
    again = train_lib.train(config(files, kind), part)
    assert losses_of(part) == losses_of(whole) and again["after"]["losses"] == result["after"]["losses"]
    for name in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        one, two = (load_file(where / name) for where in (whole, part))
        assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    table = (whole / "checkpoints/6/state/_METADATA").read_text()
    assert "params/layers/0-1/attn/q/w/a" in table and "frozen" not in table and "base" not in table
    found = evaluate.evaluate(config(files, kind), str(files / "validation.jsonl"), whole)
    assert found["metrics"]["loss"] == pytest.approx(result["after"]["losses"]["validation/loss"], rel=1e-5)
    exported = config_lib.get_default()
    exported.model.path, exported.model.dtype, exported.data.max_length = str(whole / "export"), "float32", 96
    found = evaluate.evaluate(exported, str(files / "validation.jsonl"))
    assert found["metrics"]["loss"] == pytest.approx(result["after"]["losses"]["validation/loss"], rel=1e-5)


@pytest.mark.slow
def test_what_is_no_adapter_leaves_none_of_an_earlier_run(files, tmp_path):
    c = config(files, train__duration="1 steps", train__checkpoint_every="0")
    train_lib.train(c, tmp_path / "run")
    assert (tmp_path / "run/adapter/adapter_config.json").exists() and c.optim.lr == 2e-5
    c = config(files, kind="", train__duration="1 steps", train__checkpoint_every="0")
    c.adapter = config_lib.get_default().adapter
    shutil.rmtree(tmp_path / "run/export")
    for name in ("config.json", "result.json"):
        (tmp_path / "run" / name).unlink()
    train_lib.train(c, tmp_path / "run")
    assert not (tmp_path / "run/adapter").exists() and (tmp_path / "run/export").exists()


def test_adafactor_and_heads_take_no_adapter(files):
    c = config(files, optim__name="adafactor")
    with pytest.raises(ConfigError, match="optim.name='adafactor' would leave adapters"):
        build.make_model(c, train_lib.tasks.make(c, train_lib.load_tokenizer(c)))
    c = config(files, adapter__targets="score/w")
    with pytest.raises(ConfigError, match="adapter.targets: 'score/w' matches no weight"):
        build.make_model(c, train_lib.tasks.make(c, train_lib.load_tokenizer(c)))


@pytest.mark.slow
def test_a_run_of_a_version_without_adapters_is_resumed(files, tmp_path):
    c = config(files, kind="", train__duration="2 steps", train__checkpoint_every="1 steps")
    c.adapter = config_lib.get_default().adapter
    train_lib.train(c, tmp_path)
    file = tmp_path / "config.json"
    old = json.loads(file.read_text())
    del old["adapter"]
    file.write_text(json.dumps(old))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    train_lib.train(c, tmp_path)
    assert json.loads(file.read_text())["adapter"]["rank"] == 16


@SLOW
def test_a_changed_base_is_refused(files, tmp_path):
    shutil.copytree(files, tmp_path / "files")
    one = config(tmp_path / "files", train__duration="3 steps")
    train_lib.train(one, tmp_path / "run")
    file = tmp_path / "files/model/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"the base of the adapters \(model.path\), or their kind or scale is another"
    ):
        train_lib.train(config(tmp_path / "files", train__duration="3 steps"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds adapters of another base than model.path has now"):
        evaluate.evaluate(one, str(files / "validation.jsonl"), tmp_path / "run")
    scaled = config(tmp_path / "files", adapter__alpha=64.0)
    with pytest.raises(CheckpointError, match="or of another kind or scale"):
        evaluate.evaluate(scaled, str(files / "validation.jsonl"), tmp_path / "run")
    with pytest.raises(ConfigError, match="adapter.rank: 4 there, 8 now"):
        train_lib.train(config(tmp_path / "files", adapter__rank=8), tmp_path / "run")


@SLOW
@pytest.mark.parametrize(
    "name", ["causal_lm", "classification bert", "seq2seq", "regression", "image_classification vit", "image_text"]
)
def test_every_body_trains(name, tmp_path):
    """A decoder, encoders, an encoder-decoder, an image encoder: the loss falls, and the export is what was trained."""
    from test_all_tasks import CASES

    c = config_lib.get_default()
    c.model.dtype, c.data.max_length = "float32", 64
    c.train.batch_size = c.eval.batch_size = 8
    c.train.checkpoint_every = "0"
    c.optim.lr, c.optim.warmup, c.eval.every = 1e-3, "0 steps", "0"
    c.generate.max_new_tokens = 2
    c.adapter.kind, c.adapter.rank = "lora", 4
    CASES[name][0](c, tmp_path)
    c.data.validation, c.train.duration = c.data.train, "20 steps"  # whether it learns these rows, no more
    result = train_lib.train(c, tmp_path / "run")
    [(before, after)] = [
        (result["before"]["losses"][k], v) for k, v in result["after"]["losses"].items() if k.endswith("/loss")
    ]
    assert after < before
    said = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert said["r"] == 4 and said["target_modules"]
    found, whole = (
        load_file(tmp_path / "run" / x) for x in ("adapter/adapter_model.safetensors", "export/model.safetensors")
    )
    second = {k for k, x in found.items() if k.endswith("lora_B.weight") and not x.any()}
    assert not {k for k in second if "encoder.layers.1" not in k}  # of a tower's last layer, which is not run
    for key, x in found.items():  # what is trained whole, as a head, is that of the export: in its units
        name = key.removeprefix("base_model.model.")
        if name in whole and "lora_" not in key:
            np.testing.assert_array_equal(x, whole[name], err_msg=key)


@SLOW
def test_a_plan_counts_the_base_as_frozen(files):
    from sftjax.plan import compile as compile_lib
    from sftjax.plan import hardware

    program = compile_lib.build(config(files), hardware.resolve("here"))
    assert params_lib.count(program.state.params) < params_lib.count(program.state.frozen)
    assert all("/w/base" not in name for name in params_lib.flatten(program.state.params))
