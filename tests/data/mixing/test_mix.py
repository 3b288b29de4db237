"""Mixtures: shares, counts, replay, phases, positions; the loss of each source."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_pipeline import Documents, tokens_of
from test_train import QUICKSTART, files, lines, make  # noqa: F401 (files is a fixture)
from tiny import token_loss

from sftjax import config as config_lib
from sftjax import losses
from sftjax import train as train_lib
from sftjax.config import ConfigError
from sftjax.data import Mixture, Rows, loader, pack
from sftjax.data.mixing import mixture as mixture_lib
from sftjax.data.mixing import spec as mix
from sftjax.data.packing.pack import CAUSAL
from sftjax.ops.cross_entropy import linear_cross_entropy
from sftjax.step import TrainState, train_step


class Store(Documents):
    """Documents whose tokens say which they are: `base` + the document's number."""

    def __init__(self, n, longest, base=0, seed=0):
        super().__init__(np.random.default_rng(seed).integers(2, longest, n))
        self.docs = [(np.full(k, base + i), np.ones(k)) for i, k in enumerate(self.lengths)]

    def __len__(self):
        return len(self.lengths)


STORES = dict(a=Store(500, 40), b=Store(80, 60, 1000, 1), c=Store(300, 20, 2000, 2))


def config(*entries, **data):
    c = config_lib.get_default()
    c.data.sources = tuple(entries)
    for key, value in data.items():
        c.data[key] = value
    return c


def mixture(*entries, packing="bfd", seed=3, total=None, ends=(), stores=STORES, **data):
    """Of entries without a path: the stores of these names."""
    c = config(*[dict(path=f"{e['name']}.jsonl") | e for e in entries], **data)
    sources = mix.sources(c)
    stores = {s.name: stores[s.name] for s in sources}
    phases = mix.phases(c, sources, list(stores.values()))
    rows = Mixture(stores, 64, packing, seed, phases=phases, ends=ends)
    rows.total = total or rows.total
    return rows


def names(*given, **more):
    return [dict(name=name) for name in given] + [dict(name=n, **v) for n, v in more.items()]


def tokens_by_source(rows, start, stop):
    batch = rows.batch(range(start, stop))
    inside = batch["segments"] > 0
    assert (batch["sources"][inside] == batch["tokens"][inside] // 1000).all()
    return np.bincount(batch["sources"][inside], minlength=len(rows.names))


def documents(rows, indices):
    """The documents of rows, by their numbers in `Store`, in order."""
    batch = rows.batch(indices)
    first = (batch["positions"] == 0) & (batch["segments"] > 0)
    return batch["tokens"][first].tolist()


# --- shares ---


def test_weights_are_shares_of_tokens():
    weights = dict(a=0.5, b=0.3, c=0.2)
    rows = mixture(*[dict(name=n, weight=w) for n, w in weights.items()], total=3000)
    got = tokens_by_source(rows, 0, 3000)
    np.testing.assert_allclose(got / got.sum(), list(weights.values()), atol=0.01)
    assert rows.describe() == ["a 50.0%, b 30.0%, c 20.0% of the tokens"]
    # Already in the first cycle, not only in the long run.
    got = tokens_by_source(rows, 0, rows.per_epoch)
    np.testing.assert_allclose(got / got.sum(), list(weights.values()), atol=0.01)


def test_without_weights_an_epoch_is_every_document_once():
    rows = mixture(*names("a", "b", "c"))
    everything = sorted(t[0][0] for store in STORES.values() for t in store.docs)
    n = rows.per_epoch
    rows.total = 3 * n
    for epoch in range(3):
        assert sorted(documents(rows, range(epoch * n, (epoch + 1) * n))) == everything
    assert documents(rows, range(n)) != documents(rows, range(n, 2 * n))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e6])
def test_temperature_flattens_the_sizes(temperature):
    rows = mixture(*names("a", "b", "c"), total=2000, temperature=temperature)
    sizes = np.array([store.lengths.sum() for store in STORES.values()], float)
    expected = sizes ** (1 / temperature)
    got = tokens_by_source(rows, 0, 2000)
    np.testing.assert_allclose(got / got.sum(), expected / expected.sum(), atol=0.01)


def test_replay_is_a_share_of_the_whole_and_the_others_keep_their_proportions():
    entries = [dict(name="a", weight=3), dict(name="b", weight=1), dict(name="c", replay=0.1)]
    got = tokens_by_source(mixture(*entries, total=2000), 0, 2000)
    np.testing.assert_allclose(got / got.sum(), [0.675, 0.225, 0.1], atol=0.01)


def test_counts_are_documents_of_a_cycle():
    entries = [dict(name="a", count=120), dict(name="b", count=200), dict(name="c", replay=0.5)]
    rows = mixture(*entries)
    given = list(rows.position(rows.per_epoch).values())
    assert given[:2] == [120, 200]  # more than b has: it comes more than twice
    got = tokens_by_source(rows, 0, rows.per_epoch)
    assert abs(got[2] / got.sum() - 0.5) < 0.01
    counts = np.bincount(documents(rows, range(rows.per_epoch)), minlength=1080)
    assert set(counts[1000:1080]) == {2, 3} and counts[:1000].max() == 1


def test_counts_beside_weights():
    rows = mixture(dict(name="a", count=50), dict(name="b"), dict(name="c"))
    assert rows.position(rows.per_epoch) == {"a": 50, "b": 80, "c": 300}


# --- the rows ---


def test_one_source_gives_the_rows_of_before():
    """The rows of an epoch, spelled out: shuffled, packed, and the rows shuffled."""
    store, seed = STORES["a"], 5
    rows = Rows(store, 64, "bfd", seed, epochs=2)
    for epoch in range(2):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        order = rng.permutation(len(store))
        packed = pack(store.lengths[order], 64)
        for r, row in enumerate(rng.permutation(len(packed))):
            expected = [t for doc, *_ in packed[row] for t in store[order[doc]][0]]
            assert tokens_of(rows, [epoch * rows.per_epoch + r]) == [expected]


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped", "none"])
def test_a_source_gives_each_document_once_before_any_again(packing):
    entries = [dict(name="a", weight=0.2), dict(name="b", weight=0.8)]
    rows = mixture(*entries, packing=packing, total=3000)
    for stop in (rows.per_epoch, rows._cycle(2 * rows.per_epoch + 20).first):  # ends of cycles
        pieces = [piece for r in range(stop) for piece in rows.pieces(r)]
        counts = np.bincount([doc for doc, start, _ in pieces if start == 0], minlength=580)
        assert rows.position(stop) == {"a": counts[:500].sum(), "b": counts[500:].sum()}
        for count in (counts[:500], counts[500:]):
            assert count.max() - count.min() == 1


def test_any_row_can_be_read_first(monkeypatch):
    entries = [dict(name="a", weight=0.2), dict(name="b", weight=0.8)]
    phases = (dict(until="x", weights=dict(a=1)), dict(weights=dict(b=1, a=1)))
    fresh = lambda: mixture(*entries, total=600, phases=phases, ends=[217])  # noqa: E731
    straight = fresh().batch(range(600))
    rows = fresh()
    for indices in ([599], [3, 216, 217, 218], [0], range(300, 340)):
        batch = rows.batch(indices)
        for key, value in batch.items():
            np.testing.assert_array_equal(value, straight[key][list(indices)])
    monkeypatch.setattr(mixture_lib, "KEPT", 100)  # early cycles are forgotten, and made again
    rows = fresh()
    for r in (599, 5, 450, 218):
        np.testing.assert_array_equal(rows[r]["tokens"], straight["tokens"][r])
    assert len(rows._cycles) == 2 and not rows[600]["segments"].any()
    copy = pickle.loads(pickle.dumps(rows))
    assert not copy._cycles
    np.testing.assert_array_equal(copy[450]["sources"], straight["sources"][450])


def test_phases_begin_at_their_rows_and_lose_no_document():
    entries = names("a", "b", c=dict(replay=0.1))
    phases = (
        dict(until="1", weights=dict(a=1)),
        dict(until="2", weights=dict(a=0.3, b=0.7)),
        dict(weights=dict(b=1)),
    )
    ends = [57, 401]  # less than a cycle; several cycles and a part
    rows = mixture(*entries, phases=phases, ends=ends, total=700)
    shares = [(0.9, 0, 0.1), (0.27, 0.63, 0.1), (0, 0.9, 0.1)]
    for start, stop, share in zip([0, *ends], [*ends, 700], shares, strict=True):
        got = tokens_by_source(rows, start, stop)
        np.testing.assert_allclose(got / got.sum(), share, atol=0.015)
        assert all(got[i] == 0 for i, s in enumerate(share) if s == 0)
    # Counted up to a border, no document has come twice while another one waits.
    for end in ends:
        counts = np.bincount(documents(rows, range(end)), minlength=2300)
        for name, (low, high) in dict(a=(0, 500), b=(1000, 1080), c=(2000, 2300)).items():
            count = counts[low:high]
            assert count.max() - count.min() <= 1
            assert count.sum() == rows.position(end)[name]


def test_positions_add_up_row_by_row():
    rows = mixture(dict(name="a", weight=1), dict(name="b", weight=1), total=200)
    for r in (0, 1, 2, 57, 199, 200):
        seen = np.array(documents(rows, range(r)), int)
        assert rows.position(r) == {"a": (seen < 1000).sum(), "b": (seen >= 1000).sum()}
    assert rows.position(300) == rows.position(200)


def test_what_a_source_gives_depends_on_its_name_not_on_the_others():
    def order(*entries):
        rows = mixture(*entries, packing="none", total=100)
        return [d for d in documents(rows, range(100)) if d < 1000]

    # One document a row; within a cycle the rows are shuffled, so compare what a cycle has.
    one = order(dict(name="a", count=20), dict(name="b", count=5))
    two = order(dict(name="a", count=20), dict(name="c", count=5))
    for cycle in range(4):
        part = slice(20 * cycle, 20 * cycle + 20)
        assert sorted(one[part]) == sorted(two[part])


def test_hosts_and_resumption():
    rows = mixture(dict(name="a", weight=0.2), dict(name="b", weight=0.8), total=300)
    straight = [b["tokens"].tolist() for b in loader(rows, 6)]
    for k in (0, 1, 17, 49):
        fresh = mixture(dict(name="a", weight=0.2), dict(name="b", weight=0.8), total=300)
        assert [b["tokens"].tolist() for b in loader(fresh, 6, start_step=k)] == straight[k:]
    parts = [list(loader(rows, 6, local=local)) for local in ([0, 1, 2], [3, 4, 5])]
    for whole, left, right in zip(loader(rows, 6), *parts, strict=True):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([left[key], right[key]]))


def test_means_over_rows_are_those_of_the_rows():
    phases = (dict(until="x", weights=dict(a=1)), dict(weights=dict(b=1)))
    rows = mixture(*names("a", "b"), phases=phases, ends=[800], total=2000)
    filled = (rows.batch(range(2000))["segments"] > 0).sum() / 2000
    assert abs(rows.mean(rows.store.lengths) / filled - 1) < 0.01
    assert rows.efficiency == rows.mean(rows.store.lengths) / 64


# --- what the config says ---


@pytest.mark.parametrize(
    "entries, data, message",
    [
        ([dict(path="x", wieght=1)], {}, r"sources\[0\] has an unknown key 'wieght'; did you mean"),
        ([dict(name="x")], {}, r"data.sources\[0\] has no 'path'"),
        ([dict(path=0.5)], {}, r"data.sources\[0\]: path=0.5; expected text"),
        ([dict(path="x", name=3)], {}, r"data.sources\[0\]: name=3; expected text"),
        ([{"path": "x", 3: 4}], {}, r"data.sources\[0\] has an unknown key 3; the keys are"),
        ([dict(path="x", weight=float("nan"))], {}, "weight=nan; expected a number"),
        ([dict(path="x", count=10**400)], {}, "count=1000.*; expected a number"),
        (["x.jsonl"], {}, r"data.sources\[0\] is 'x.jsonl'; expected a dict with path, name, weig"),
        ([dict(path="*.jsonl")], {}, r"set a 'name' of letters, digits, _ and -; '\*' is none"),
        ([dict(path="d/x.jsonl"), dict(path="x.json")], {}, "two are called 'x'; set their 'name'"),
        ([dict(path="x", weight=-1)], {}, r"weight=-1; expected a number, 0 or more"),
        ([dict(path="x", weight=1, count=3)], {}, "has weight and count; a source has one of them"),
        ([dict(path="x", replay=0.6), dict(path="y", replay=0.4)], {}, "add up to 1 or more"),
        ([dict(path="x", fields=dict(promt="q"))], {}, r"sources\[0\]: .*'promt'; did you mean"),
        ([dict(path="x", limit="many")], {}, r"data.limit=many: expected int"),
        ([dict(path="x")], dict(train="y"), "data.train and data.sources are both set"),
        ([], {}, "data.train is empty"),
        ([dict(path="x", count=3)], {}, "phases, temperature, count and replay mix sev"),
        ([dict(path="x")], dict(temperature=2.0), "mix several data.sources, but there is one"),
    ],
)  # fmt: skip
def test_wrong_sources(entries, data, message):
    with pytest.raises(ConfigError, match=message):
        mix.sources(config(*entries, **data))


@pytest.mark.parametrize(
    "entries, data, message",
    [
        (names("a", b=dict(weight=1)), {}, "data.sources: 'a' has no weight, but others do"),
        (names(a=dict(weight=1), b=dict(weight=1)), dict(temperature=2.0), "but data.sources sets"),
        (names(a=dict(weight=0), b=dict(weight=0)), {}, "no source but those for replay gives any"),
        (names("a", "b"), dict(phases=(dict(until="3"),)), r"phases\[0\]: every phase but the la"),
        (names("a", "b"), dict(phases=({}, {})), r"phases\[0\]: every phase but the last has an"),
        (names("a", "b"), dict(phases=(dict(weights=dict(x=1)),)), "has an unknown key 'x'"),
        (
            names("a", "b"),
            dict(phases=(dict(weights=dict(a=1), counts=dict(a=3)),)),
            "'a' has a weight and a count; keep one of them",
        ),
        (names("a", "b"), dict(phases=(dict(weights=dict(a="x")),)), "a='x'; expected a number"),
        (names("a", "b"), dict(phases=(dict(weights=["a"]),)), "weights=.'a'.; expected {source"),
    ],
)  # fmt: skip
def test_wrong_shares(entries, data, message):
    with pytest.raises(ConfigError, match=message):
        mixture(*entries, **data)


def test_every_key_of_data_is_a_sources_own_or_the_runs():
    """A new key of config.data has to be put on one side."""
    run = {
        "train", "sources", "temperature", "phases", "streaming", "shuffle_window", "validation",
        "test", "tokenizer", "add_tokens", "template", "max_length", "max_target_length", "packing",
        "eval_packing", "buckets", "cache_dir", "workers", "prefetch", "labels",
    }  # fmt: skip
    assert set(config_lib.get_default().data) == run | set(config_lib.OWN)
    assert not run & set(config_lib.OWN)


# --- the loss of each source ---


def with_sources(batch, n=3, seed=0):
    rng = np.random.default_rng(seed)
    return batch | {"sources": rng.integers(0, n, batch["tokens"].shape).astype(np.int32)}


@pytest.mark.parametrize("chunk_tokens", [12, 10_000])
def test_group_sums_equal_separate_losses_in_float64(chunk_tokens):
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(4, 33, 16)), rng.normal(size=(70, 16))
    targets, groups = rng.integers(0, 70, (4, 33)), rng.integers(0, 3, (4, 33)).astype(np.int32)
    weights = ((rng.uniform(size=(4, 33)) < 0.4) * rng.uniform(0.5, 2, (4, 33))).astype(np.float32)
    with jax.enable_x64(True):
        loss = token_loss(jnp.einsum("bsd,vd->bsv", h, w), targets, 0.1) * weights
        expected = [float(jnp.sum(loss * (groups == g))) for g in range(3)]
    options = dict(chunk_tokens=chunk_tokens, label_smoothing=0.1)

    def total(h, w, **more):
        return linear_cross_entropy(h, w, targets, weights, **options, **more)

    h, w = np.float32(h), np.float32(w)
    with_groups = lambda h, w: total(h, w, groups=groups, n_groups=3)  # noqa: E731
    value, hits, sums = with_groups(h, w)
    np.testing.assert_allclose(sums, expected, rtol=2e-6)
    np.testing.assert_allclose([value, hits], total(h, w), rtol=1e-6)
    grads = jax.jit(jax.grad(lambda h, w: with_groups(h, w)[0], (0, 1)))(h, w)
    plain = jax.jit(jax.grad(lambda h, w: total(h, w)[0], (0, 1)))(h, w)
    for a, b in zip(grads, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_reports_each_source_and_trains_as_without(micro_batches):
    import optax

    model, batch = tiny.model(), with_sources(tiny.batch())
    params, tx = tiny.params(model), optax.sgd(0.1)
    batch["sources"][:] = np.minimum(batch["sources"], 1)  # the third source has no token
    names = ("a", "b", "empty")
    results = []
    for sources in (names, ()):
        state = TrainState.create(params=params, tx=tx)
        loss_fn = losses.causal_lm(model, sources=sources)
        b = batch if sources else {k: v for k, v in batch.items() if k != "sources"}
        results.append(train_step(state, b, loss_fn=loss_fn, tx=tx, micro_batches=micro_batches))
    (state, metrics), (plain_state, plain) = results
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, state.params, plain_state.params)
    assert {k for k in metrics if "/" not in k} == set(plain)
    for i, name in enumerate(names):
        only = batch | {"weights": batch["weights"] * (batch["sources"] == i)}
        alone = losses.causal_lm(model)(params, only, None)
        np.testing.assert_allclose(metrics[f"loss/{name}"], alone.sum / alone.weight if alone.weight else 0, rtol=1e-5)
        assert metrics[f"trained_tokens/{name}"] == (only["weights"] != 0).sum()
    assert sum(metrics[f"trained_tokens/{n}"] for n in names) == metrics["trained_tokens"]


# --- a run ---


KINDS = ("json", "sort_digits", "count_items", "compare")


@pytest.fixture(scope="module")
def kinds(files, tmp_path_factory):  # noqa: F811
    """The quickstart's rows of four kinds, a file each; the last with other field names."""
    where = tmp_path_factory.mktemp("kinds")
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "train.jsonl").open()]
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind][:100]
        if kind == "compare":
            own = [{"q": row["prompt"], "a": row["completion"]} for row in own]
        (where / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return where


def mixed(files, kinds, **overrides):  # noqa: F811
    c = make(files, data__train="", data__test="", **overrides)
    c.data.sources = (
        dict(path=str(kinds / "json.jsonl"), limit=60),
        dict(path=str(kinds / "sort_digits.jsonl"), train_on="all"),
        dict(path=str(kinds / "count_items.jsonl")),
        dict(
            path=str(kinds / "compare.jsonl"),
            name="general",
            replay=0.1,
            fields=dict(prompt="q", completion="a"),
        ),
    )
    c.data.phases = (
        dict(until="25%", weights=dict(json=1, sort_digits=1)),
        dict(until="9 steps", weights=dict(sort_digits=1, count_items=3)),
        dict(weights=dict(count_items=1)),
    )
    return c


@pytest.mark.slow
def test_a_curriculum_runs_logs_each_source_and_resumes(files, kinds, tmp_path, capsys):  # noqa: F811
    config = mixed(files, kinds)
    train_lib.train(config, tmp_path / "straight")
    said = capsys.readouterr().out
    assert "json: 60 examples" in said and "phase 2, until 9 steps: sort_digits 22." in said
    log = {x["step"]: x for x in lines(tmp_path / "straight") if "loss" in x}
    names = ("json", "sort_digits", "count_items", "general")
    for step, phase in {1: 0, 3: 0, 4: 1, 9: 1, 10: 2, 12: 2}.items():
        given = {name for name in names if log[step][f"trained_tokens/{name}"]}
        wanted = ({"json", "sort_digits"}, {"sort_digits", "count_items"}, {"count_items"})[phase]
        assert wanted <= given <= wanted | {"general"}
        assert {name for name in names if f"loss/{name}" in log[step]} == given
    for line in log.values():
        pairs = [(line.get(f"loss/{n}", 0), line[f"trained_tokens/{n}"]) for n in names]
        total = sum(count for _, count in pairs)
        np.testing.assert_allclose(sum(v * n for v, n in pairs) / total, line["loss"], rtol=1e-5)
    assert log[12]["documents/json"] == log[3]["documents/json"] > 0
    assert log[12]["epochs/json"] == log[12]["documents/json"] / 60
    # The steps after the last checkpoint but one, once more.
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    train_lib.train(config, tmp_path / "again")
    timed = ("step_time", "_per_s", "data_wait", "peak_memory", "mfu")
    same = lambda x: {k: v for k, v in x.items() if not k.endswith(timed)}  # noqa: E731
    again = {x["step"]: x for x in lines(tmp_path / "again") if "loss" in x}
    assert {k: same(v) for k, v in again.items()} == {k: same(v) for k, v in log.items()}
    saved = json.loads((tmp_path / "again" / "checkpoints" / "9" / "extra" / "metadata").read_text())
    assert saved["data"] == {k: v for k, v in log[9].items() if k.startswith(("doc", "epochs"))}


def make_feed(config, workdir):
    from sftjax import parallel, tasks
    from sftjax.hf.tokenizer import load_tokenizer
    from sftjax.training import data as feed

    task = tasks.make(config, load_tokenizer(config))
    return feed.Feed(config, task, workdir, parallel.make_mesh({"fsdp": -1}))


def test_each_source_has_its_own_fields_masks_and_limits(files, kinds, tmp_path):  # noqa: F811
    config = mixed(files, kinds)
    config.data.split.share = 0.2
    config.data.validation = ""
    feed = make_feed(config, tmp_path)
    reports = dict(zip(feed.names, (s.report for s in feed.stores), strict=True))
    assert reports["json"]["examples"] + len(feed.sets["validation_json"]) == 60
    assert reports["sort_digits"]["trained_fraction"] > 0.9 > reports["json"]["trained_fraction"]
    assert set(feed.sets) == {f"validation_{name}" for name in feed.names}
    assert set(feed.abstract_batch()) == {*feed_keys(), "sources"}
    batch = next(feed.batches(0))
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(feed.abstract_batch(), (8, 96))
    with pytest.raises(ConfigError, match="the data stood at .*'documents/json': 3.* at step 3"):
        next(feed.batches(3, {"documents/json": 3}))


def feed_keys():
    return CAUSAL.spec(1, 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(train__duration="1 epoch"), "train.duration='1 epoch': epochs has no meaning here"),
        (dict(train__duration="8 steps"), r"data.phases end at the steps \[2, 9\] of 8: each must"),
    ],
)
def test_phases_need_a_run_of_steps(files, kinds, tmp_path, overrides, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        make_feed(mixed(files, kinds, **overrides), tmp_path)
