"""A vocabulary that grows, and one that is padded: known answers, meshes, files, a whole run."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from families import write
from safetensors.numpy import load_file

import sftjax
from sftjax import config as config_lib
from sftjax import hf as hf_lib
from sftjax import parallel, tasks
from sftjax import params as params_lib
from sftjax import train as train_lib
from sftjax.evaluation.generation import generate
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.models import vocab
from sftjax.parallel import mesh as mesh_lib
from sftjax.training import build

OLD = 67


def small(tied=False, multiple=1, seed=0):
    """(model, params) whose rows have a mean and a covariance of their own, the padding huge."""
    model = tiny.model(vocab=OLD, width=8, tied=tied, vocab_multiple=multiple)
    params = tiny.params(model)
    rng = np.random.default_rng(seed)
    for name in {"embed", "head"} & params.keys():
        x = rng.normal(size=(OLD, 8)) @ rng.normal(size=(8, 8)) + 3 * rng.normal(size=8)
        padding = np.full((model.config.rows - OLD, 8), 1e3)
        params[name] = {"w": jnp.float32(np.concatenate([x, padding]))}
    return model, params


def tables(params):
    return {n: np.asarray(params[n]["w"]) for n in ("embed", "head") if n in params}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- new rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_new_rows_follow_from_seed_table_and_token(tied):
    model, params = small(tied)
    grown, after = vocab.grow(model, params, 75, seed=3)
    assert grown.config.vocab == grown.config.rows == 75 and model.config.vocab == OLD
    assert tables(after).keys() == ({"embed"} if tied else {"embed", "head"})
    for name, table in tables(after).items():
        old = tables(params)[name].astype(np.float64)
        same(table[:OLD], tables(params)[name])
        key = jax.random.fold_in(jax.random.key(3), zlib.crc32(name.encode()))
        z = [jax.random.normal(jax.random.fold_in(key, i), (OLD,)) for i in range(OLD, 75)]
        expected = old.mean(0) + np.float64(z) @ (old - old.mean(0)) / np.sqrt(OLD - 1)
        np.testing.assert_allclose(table[OLD:], expected, atol=1e-5)
    assert {k: v for k, v in after.items() if k not in tables(after)} == {
        k: v for k, v in params.items() if k not in tables(params)
    }
    same(tables(vocab.grow(model, params, 75, seed=3)[1]), tables(after))
    other = tables(vocab.grow(model, params, 75, seed=4)[1])
    assert (other["embed"][OLD:] != tables(after)["embed"][OLD:]).all()
    more = tables(vocab.grow(model, params, 80, seed=3)[1])  # a token's row is its own
    np.testing.assert_allclose(more["embed"][:75], tables(after)["embed"], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_many_new_rows_have_the_mean_and_covariance_of_the_old(tied):
    """Each entry within five standard errors of a sample of n normal rows."""
    n = 4000
    model, params = small(tied)
    _, after = vocab.grow(model, params, OLD + n)
    for name, table in tables(after).items():
        old, new = np.float64(table[:OLD]), np.float64(table[OLD:])
        cov = np.cov(old.T)
        assert (np.abs(new.mean(0) - old.mean(0)) < 5 * np.sqrt(np.diag(cov) / n)).all()
        spread = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
        assert (np.abs(np.cov(new.T) - cov) < 5 * spread).all()
        assert (np.abs(np.triu(cov, 1)) > 10 * spread).any(), name  # a diagonal would not pass


@pytest.mark.parametrize("multiple", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_new_rows_do_not_depend_on_the_padding(multiple):
    _, expected = vocab.grow(*small(), 140)
    model, after = vocab.grow(*small(multiple=multiple), 140)
    for name, table in tables(after).items():
        assert len(table) == model.config.rows == {64: 192, 128: 256}[multiple]
        np.testing.assert_allclose(table[:140], tables(expected)[name], atol=1e-5)


def test_tokens_may_take_rows_that_are_in_reserve():
    model, params = small()
    params["embed"]["w"] = params["embed"]["w"].at[60:].set(1e3)  # no token's: not in the mean
    grown, after = vocab.grow(model, params, 64, first=60)
    assert grown.config.vocab == OLD
    before, table = tables(params)["embed"], tables(after)["embed"]
    assert (table != before).any(1).tolist() == [60 <= i < 64 for i in range(OLD)]
    assert np.abs(table[60:64]).max() < 100
    grown, after = vocab.grow(model, params, 70, first=60)
    assert grown.config.vocab == 70 and np.abs(tables(after)["embed"][60:]).max() < 100
    assert vocab.grow(model, params, OLD)[1] is params  # nothing to do


def test_the_dtype_is_kept_and_the_arithmetic_is_float32():
    model, params = small()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, after = vocab.grow(model, half, 80)
    _, expected = vocab.grow(model, jax.tree.map(lambda x: x.astype(jnp.float32), half), 80)
    assert after["embed"]["w"].dtype == jnp.bfloat16
    same(tables(after)["embed"], tables(expected)["embed"].astype(jnp.bfloat16))


@pytest.mark.parametrize(("size", "first"), [(OLD - 1, None), (80, OLD + 1), (80, 0), (60, 61), (0, None)])
def test_a_vocabulary_does_not_shrink_and_has_no_gap(size, first):
    with pytest.raises(ValueError, match=rf"vocab.grow: .* to {size - 1} for a model of 67 tokens"):
        vocab.grow(*small(), size, first=first)


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [2, 128])
def test_a_vocabulary_grows_on_a_mesh(multiple):
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    model, params = small(multiple=multiple)
    _, expected = vocab.grow(model, params, 139)
    layout = parallel.param_shardings(mesh, model.abstract)
    grown, after = vocab.grow(model, jax.device_put(params, layout), 139)
    assert jax.tree.map(lambda x: x.sharding, after) == parallel.param_shardings(mesh, grown.abstract)
    for name, table in tables(after).items():
        np.testing.assert_allclose(table[:139], tables(expected)[name][:139], atol=1e-5)


def test_an_odd_vocabulary_on_a_mesh_needs_padding():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    message = (
        "embed/w: dimension vocab=67 does not divide over mesh axis tensor=2; .*, or set"
        " model.vocab_multiple to a multiple of 2"
    )
    with pytest.raises(parallel.MeshError, match=message):
        parallel.param_shardings(mesh, small()[0].abstract)


# ---- padding -------------------------------------------------------------------------------


def load(path, multiple, mesh=None):
    return sftjax.load_pretrained(path, vocab_multiple=multiple, mesh=mesh)


def objective(model):
    """jitted params, batch -> (loss, accuracy), gradients; with every term that sums over V."""
    loss_fn = sftjax.losses.causal_lm(model, label_smoothing=0.1, z_loss=0.01, accuracy=True)

    def mean(params, batch):
        out = loss_fn(params, batch, None)
        return out.sum / out.weight, out.metrics["accuracy"]

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


@pytest.mark.parametrize(
    ("name", "multiple", "rows"),
    [
        pytest.param("llama-odd", 64, 128, marks=pytest.mark.long, id="untied"),
        pytest.param("qwen3-odd", 128, 128, id="tied"),
        pytest.param("gemma2", 96, 96, marks=pytest.mark.long, id="soft-capped"),
    ],
)
@pytest.mark.slow
def test_padding_changes_nothing(name, multiple, rows, tmp_path):
    path, batch = write(name, tmp_path / "in"), tiny.batch()
    plain, params = load(path, 1)
    model, padded = load(path, multiple)
    n = plain.config.vocab
    assert {len(t) for t in tables(padded).values()} == {rows}
    logits = plain.apply(params, batch)
    np.testing.assert_allclose(model.apply(padded, batch), logits, atol=1e-5)
    (loss, hits), grads = objective(plain)(params, batch)
    (value, share), found = objective(model)(padded, batch)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert share == hits
    for key, table in tables(found).items():
        assert np.abs(table[:n]).max() > 0 and not table[n:].any()
        found[key] = {"w": table[:n]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, grads)
    sftjax.save_pretrained(tmp_path / "out", model, padded)
    same(*(load_file(d / "model.safetensors") for d in (tmp_path / "out", path)))
    configs = [json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", path)]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_padding_is_never_generated(tmp_path):
    path, prompts = write("llama-odd", tmp_path), [[1, 5, 9], [7] * 20]
    model, params = load(path, 128)
    params["head"]["w"] = params["head"]["w"].at[67:].set(params["head"]["w"][:61] * 10)
    for temperature in (0.0, 1.0):
        how = dict(max_new_tokens=16, temperature=temperature)
        text = generate(model, params, prompts, **how)
        assert text == generate(*load(path, 1), prompts, **how)


@pytest.mark.slow
def test_an_odd_vocabulary_trains_on_a_mesh(tmp_path):
    path, batch = write("llama-odd", tmp_path / "in"), tiny.batch()
    plain, params = load(path, 1)
    tx = optax.sgd(0.1)

    def step(model, params, batch):
        state = sftjax.TrainState.create(params=params, tx=tx)
        loss_fn = sftjax.losses.causal_lm(model, label_smoothing=0.1, z_loss=0.01)
        run = jax.jit(lambda s, b: sftjax.train_step(s, b, loss_fn=loss_fn, tx=tx))
        state, metrics = run(state, batch)
        return state.all_params, metrics

    expected, metrics = step(plain, params, batch)
    mesh = parallel.make_mesh({"data": 4, "tensor": 2})
    # One key/value head does not divide over two devices; the heads stay whole here.
    rules = parallel.RULES | {"heads": None, "kv_heads": None, "mlp": None}
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(mesh_lib, "RULES", rules)
        model, sharded = load(path, 128, mesh)
        assert sharded["head"]["w"].sharding.shard_shape((128, 27)) == (64, 27)
        after, found = step(model, sharded, parallel.put_batch(mesh, batch, 8))
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key], metrics[key], rtol=1e-5)
    sftjax.save_pretrained(tmp_path / "out", model, after)
    again = sftjax.load_pretrained(tmp_path / "out")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), again, expected)


# ---- tokenizer and model -------------------------------------------------------------------

NEW = ("<think>", "</think>")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model with the quickstart's tokenizer, and chats that use the new tokens."""
    where = tmp_path_factory.mktemp("files")
    tiny.drawn(where / "model", 7)
    chats = [{"prompt": f"{i}+1=", "completion": f"<think>{i}</think>{i + 1}"} for i in range(40)]
    (where / "train.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    return where


def make(files, **changes):
    c = config_lib.get_default()
    c.model.path, c.model.dtype = str(files / "model"), "float32"
    c.data.train, c.data.max_length, c.data.add_tokens = str(files / "train.jsonl"), 64, NEW
    c.train.batch_size, c.train.duration, c.train.tensorboard = 8, "2 steps", False
    c.mesh.tensor, c.optim.lr, c.optim.warmup = 2, 1e-2, "0"
    for key, value in changes.items():
        config_lib.override(c, key.replace("__", "."), str(value))
    return c


def test_the_tokenizer_keeps_each_new_token_whole(files, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(make(files))
    tokenizer.save_pretrained(tmp_path)
    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert t("<think>1</think>", add_special_tokens=False).input_ids[::2] == [112, 113]
        assert t.decode([112, 113], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("<|user|>",), "'<|user|>' is token 5 already, and the model has a row for it; leave it"),
        (("",), "data.add_tokens has ''; expected strings"),
        ((5,), "data.add_tokens has 5; expected strings"),
    ],
)
def test_tokens_that_cannot_be_added(files, tokens, message):
    config = make(files)
    config.data.add_tokens = tokens
    with pytest.raises(config_lib.ConfigError) as e:
        load_tokenizer(config)
    assert message in str(e.value)


def test_a_tokenizer_that_does_not_fit_the_model(files, tmp_path):
    extended = tmp_path / "tokenizer"  # as somebody saved it, without growing the model
    load_tokenizer(make(files)).save_pretrained(extended)
    config = make(files, data__tokenizer=extended, data__add_tokens="('</think>',)")
    message = (
        r"the tokenizer has 114 tokens, the model's embedding only 112 rows; without a row:"
        r" '<think>'. Take .* \(data.tokenizer\), or list .* in data.add_tokens"
    )
    with pytest.raises(config_lib.ConfigError, match=message):
        build.make_model(config, tasks.make(config, load_tokenizer(config)))
    config.data.add_tokens = NEW
    model, _ = build.make_model(config, tasks.make(config, load_tokenizer(config)))
    assert (model.config.vocab, model.config.rows) == (114, 128)
    config.data.add_tokens, config.data.tokenizer = (), ""
    model, _ = build.make_model(config, tasks.make(config, load_tokenizer(config)))
    assert model.config.vocab == 112


def first_params(config):
    tokenizer = load_tokenizer(config)
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        model, trainable = build.make_model(config, tasks.make(config, tokenizer))
        tx = optax.adamw(1e-3)
        target = build.abstract_state(config.model, model, trainable, tx, mesh)
        new = tokenizer.convert_tokens_to_ids(list(config.data.add_tokens))
        how = dict(seed=config.seed, new=new)
        state = build.first_state(config.model, model, trainable, tx, target, mesh, **how)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), target
    )
    return model, state.all_params


def test_the_first_state_has_the_files_rows_and_new_ones(files, capsys):
    config = make(files)
    config.data.add_tokens = NEW[::-1]  # in the order given
    model, params = first_params(config)
    assert model.config.vocab == 114 and params["embed"]["w"].shape == (128, 32)
    loaded = load(files / "model", 1)
    _, expected = vocab.grow(*loaded, 114, seed=config.seed)
    np.testing.assert_allclose(params["embed"]["w"][:114], expected["embed"]["w"], atol=1e-6)
    same(params["embed"]["w"][:112], loaded[1]["embed"]["w"])

    assert "tokens    2 added, 112 to 113 of 114\n" in capsys.readouterr().out

    config.model.init = "random"
    config.optim.trainable = (("embed/w", False), (".*", True))
    _, params = first_params(config)
    assert "of 114; in embed/w they stay as drawn: frozen" in capsys.readouterr().out
    config.data.add_tokens = ()
    _, plain = first_params(config)
    same(params["embed"]["w"][:112], plain["embed"]["w"][:112])
    assert np.std(params["embed"]["w"][112:114]) > 0.01


def test_new_tokens_take_the_rows_that_a_checkpoint_has_in_reserve(files, tmp_path):
    """As Qwen's have: more rows than the tokenizer has tokens."""
    model = hf_lib.load_model(files / "model").replace(vocab=120)
    params = params_lib.init(model.abstract, jax.random.key(8))
    sftjax.save_pretrained(tmp_path, model, params)
    model, after = first_params(make(files, model__path=tmp_path, data__tokenizer=files / "model"))
    assert model.config.vocab == 120
    new = (after["embed"]["w"][:120] != params["embed"]["w"]).any(1)
    assert np.flatnonzero(new).tolist() == [112, 113]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = make(files)
    return workdir, config, train_lib.train(config, workdir)


def test_a_run_that_adds_tokens_trains_and_exports_them(run, files):
    from transformers import AutoTokenizer

    workdir, config, result = run
    export = workdir / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == [112, 113] and len(tokenizer) == 114
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 114
    stored = load_file(export / "model.safetensors")
    assert stored["model.embed_tokens.weight"].shape == (114, 32)
    model, params = sftjax.load_pretrained(export)
    _, first = first_params(make(files))
    moved = np.abs(np.asarray(params["embed"]["w"]) - first["embed"]["w"][:114]).max(1)
    assert moved[112] > 1e-3 and moved[113] > 1e-3
    prompt = tokenizer("1+1=<think>").input_ids
    assert len(generate(model, params, [prompt], max_new_tokens=4)[0]) == 4
    again = train_lib.train(config, workdir)  # restores the grown shapes
    assert again["steps"] == result["steps"] == 2


@pytest.mark.parity
def test_transformers_loads_what_a_run_with_new_tokens_exports(run):
    pytest.importorskip("torch")
    import reference

    export = run[0] / "export"
    theirs = reference.load(export)  # no key is missing, and none of another size
    assert theirs.get_input_embeddings().num_embeddings == 114
    model, params = sftjax.load_pretrained(export)
    tokens = np.random.default_rng(0).integers(0, 114, (4, 48)).astype(np.int32)
    tokens[:, :2] = [112, 113]
    reference.close(model.apply(params, {"tokens": tokens}), reference.logits(theirs, tokens), 1e-5)
    prompt = [1, 112, 20, 21]
    ours = generate(model, params, [prompt], max_new_tokens=32)
    assert ours[0] == reference.greedy(theirs, prompt, 32)
