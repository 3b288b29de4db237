"""The task of experiments/ranking: losses and metrics beside plain ones, packed rows, a run."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import test_all_tasks as every
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score
from test_texts import Head

from sftjax import config as config_lib
from sftjax import params as params_lib
from sftjax import tasks
from sftjax import train as train_lib
from sftjax.data import DataError
from sftjax.data.packing.pack import blank_batch
from sftjax.errors import ConfigError
from sftjax.files import load_python
from sftjax.hf.tokenizer import load_tokenizer

FOLDER = every.REPO / "experiments" / "ranking"
task_lib = load_python(str(FOLDER / "task.py"), "task")
RNG = np.random.default_rng(0)


# ---- losses --------------------------------------------------------------------------------


def plain(kind, s, y):
    """The loss of one query in float64; None where it has none."""
    if kind == "pairwise":
        pairs = [(i, j) for i, j in itertools.permutations(range(len(s)), 2) if y[i] > y[j]]
        return np.mean([np.log1p(np.exp(s[j] - s[i])) for i, j in pairs]) if pairs else None
    p, q = (np.exp(x) / np.exp(x).sum() for x in (y, s))
    return -(p * np.log(q)).sum()


def drawn(rows=((3, 5, 2), (4,), (2, 2, 6)), width=40, level=()):
    """(batch, logits [B, S, 1], [(relevances, scores) of each query]); 2 tokens a candidate."""
    shape = (len(rows), width)
    batch = {k: np.zeros(shape, np.int32) for k in ("segments", "groups")}
    batch |= {k: np.zeros(shape, np.float32) for k in ("weights", "targets", "overlap")}
    logits, queries = RNG.normal(size=(*shape, 1)) * 2, []
    for r, sizes in enumerate(rows):
        at = segment = 0
        for group, k in enumerate(sizes, 1):
            places = at + 2 * np.arange(k)
            y = np.ones(k) if len(queries) in level else RNG.integers(0, 4, k).astype(float)
            if len(queries) not in level:
                y[0] = 5.0  # so that there is a pair
            batch["groups"][r, at : at + 2 * k] = group
            batch["segments"][r, at : at + 2 * k] = segment + np.repeat(np.arange(1, k + 1), 2)
            batch["weights"][r, places], batch["targets"][r, places] = 1.0, y
            queries.append((y, logits[r, places, 0]))
            at, segment = at + 2 * k, segment + k
    return batch, logits, queries


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_losses_beside_plain_ones_in_float64(kind):
    batch, logits, queries = drawn(level=(1,))
    expected = [plain(kind, s, y) for y, s in queries]
    counted = [x for x in expected if x is not None]
    assert len(counted) == len(queries) - (kind == "pairwise")
    loss_fn = task_lib.ranking(Head(logits), kind)
    loss = jax.jit(loss_fn)(1.0, batch, None)
    np.testing.assert_allclose(loss.sum, np.sum(counted), rtol=1e-5)
    assert float(loss.weight) == len(counted)
    assert float(loss.metrics["trained_tokens"][0]) == sum(len(y) for y, _ in queries)
    # The derivative by a factor of all scores, beside a difference in float64.
    slope = jax.grad(lambda p: loss_fn(p, batch, None).sum)(1.0)
    up, down = (sum(v for y, s in queries if (v := plain(kind, s * p, y)) is not None) for p in (1 + 1e-6, 1 - 1e-6))
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_large_scores_and_padding_give_no_nan(kind):
    batch, logits, _ = drawn(rows=((3,), (2,)))
    blank = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()}
    loss_fn = task_lib.ranking(Head(np.concatenate([logits, logits[:1]])), kind)
    for scale in (0.0, 1.0, 1e4):
        value, slope = jax.value_and_grad(lambda p: loss_fn(p, blank, None).sum)(scale)
        assert np.isfinite(value) and np.isfinite(slope)
    same = task_lib.ranking(Head(logits), kind)(1.0, batch, None)
    np.testing.assert_allclose(loss_fn(1.0, blank, None).sum, same.sum, rtol=1e-6)
    empty = jax.tree.map(np.zeros_like, blank)
    assert float(loss_fn(1.0, empty, None).sum) == float(loss_fn(1.0, empty, None).weight) == 0.0


# ---- metrics -------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_ndcg_is_scikit_learns(ties):
    for _ in range(300):
        n = int(RNG.integers(2, 25))
        y = RNG.integers(0, 4, n).astype(float) * RNG.integers(0, 2, n)
        s = RNG.integers(0, 4, n).astype(float) if ties else RNG.normal(size=n)
        for k in (1, 3, 10):
            assert abs(task_lib.ndcg(y, s, k) - ndcg_score([y], [s], k=k)) < 1e-9
    assert task_lib.ndcg([0, 0], [1, 2]) == 0.0


def test_reciprocal_rank():
    for _ in range(200):
        n = int(RNG.integers(2, 12))
        y, s = np.zeros(n), RNG.normal(size=n)
        y[RNG.integers(n)] = 1  # of one relevant candidate and no ties they are the same
        expected = label_ranking_average_precision_score([y], [s])
        assert abs(task_lib.reciprocal_rank(y, s) - expected) < 1e-12
    for _ in range(40):  # ties: the mean over all orders of equal scores
        y, s = RNG.integers(0, 2, 5), RNG.integers(0, 3, 5)
        found = []
        for order in itertools.permutations(range(5)):
            ranked = sorted(order, key=lambda i: -s[i])  # stable
            found.append(next((1 / r for r, i in enumerate(ranked, 1) if y[i]), 0.0))
        assert abs(task_lib.reciprocal_rank(y, s) - np.mean(found)) < 1e-12


def test_scores_of_a_set_by_query():
    task = task_lib.Listwise(None)
    batch, logits, queries = drawn()
    _, found = task_lib.ranking(Head(logits), "listwise", predictions=True)(1.0, batch, None)
    found = {k: np.asarray(v) for k, v in found.items()}
    scores = task.score(0.0, found, errors=True)
    each = [ndcg_score([y], [s], k=10) for y, s in queries]
    np.testing.assert_allclose(scores.rows["ndcg10"], each, rtol=1e-6)
    assert scores.values["ndcg10"] == pytest.approx(np.mean(each))
    assert scores.errors["ndcg10"] == pytest.approx(np.std(each, ddof=1) / len(each) ** 0.5)
    lost = found["given"].copy()
    lost[0, 0] = np.nan  # the one that is most relevant
    worse = task.score(0.0, found | {"given": lost})
    assert worse.values["not_finite"] == 1.0
    flat = {k: v.reshape(-1) for k, v in found.items()}  # as the evaluator joins unequal widths
    assert task.score(0.0, flat).values == scores.values
    orders = itertools.permutations(range(4))
    y = queries[3][0]
    chance = np.mean([ndcg_score([y], [list(order)], k=10) for order in orders])
    assert task_lib.ndcg(y, np.zeros(4)) == pytest.approx(chance)
    chances = [task_lib.ndcg(y, 0 * y) for y, _ in queries]
    assert scores.baselines["random order"]["ndcg10"] == pytest.approx(np.mean(chances))


def test_overlap_of_words():
    assert task_lib.word_overlap("Who wrote it, who?", "It was wrote by WHO") == 1.0
    assert task_lib.word_overlap("Who wrote it?", "They wrote") == pytest.approx(1 / 3)
    assert task_lib.word_overlap("?", "They wrote") == 0.0


# ---- records and rows ----------------------------------------------------------------------


def ranked(n, seed=0):
    """Queries whose good reviews are relevant, the second and fourth more than the others."""
    out = []
    for i in range(n):
        some = every.reviews(2 + i % 3, seed=seed + i)
        some[0] = {"text": f"a {every.WORDS['good'][i % 3]} film", "label": "good"}
        relevance = [float(r["label"] == "good") * (1 + j % 2) for j, r in enumerate(some)]
        row = {"query": f"film {i % 7} of a day", "candidates": [r["text"] for r in some]}
        out.append(row | {"relevance": relevance, "extra": i})
    return out


def setting(c, where, kind="Listwise"):
    c.task = f"{FOLDER / 'task.py'}:{kind}"
    c.model.path, c.model.init = every.model(where / "model", every.BERT), "random"
    c.data.tokenizer = every.masking(where)
    c.model.dtype, c.data.max_length, c.eval.every = "float32", 160, "0"
    c.train.batch_size = c.eval.batch_size = 8
    c.train.tensorboard = False
    for name, n in {"train": 120, "validation": 21}.items():
        c.data[name] = every.write(where / f"{name}.jsonl", ranked(n, seed=1000 * n))
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, its task)."""
    config = setting(config_lib.get_default(), tmp_path_factory.mktemp("ranking"))
    return config, tasks.make(config, load_tokenizer(config))


def packed(task, examples, rows, width):
    """A batch whose rows hold the examples of these indices."""
    batch = blank_batch(len(rows), width, layout=task.layout)
    arrays = [e.arrays for e in examples]
    for r, own in enumerate(rows):
        pieces = [(i, 0, len(examples[i].tokens)) for i in own]
        task.layout.fill({k: v[r] for k, v in batch.items()}, arrays, pieces)
    return batch


def test_each_candidate_is_a_segment_with_positions_and_types_of_its_own(made):
    _, old = made
    tokenizer = load_tokenizer(made[0])
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = task_lib.Pairwise(tokenizer)
    records = ranked(2)
    examples = task.examples(records, ["f:1", "f:2"])
    lengths = [[len(tokenizer(r["query"], c)["input_ids"]) for c in r["candidates"]] for r in records]
    [row] = [{k: v[0] for k, v in packed(task, examples, [[0, 1]], 160).items()}]
    k, n = len(lengths[0]), sum(lengths[0])
    sizes = [*lengths[0], *lengths[1]]
    total = sum(sizes)
    np.testing.assert_array_equal(row["segments"][:total], np.repeat(np.arange(1, len(sizes) + 1), sizes))
    np.testing.assert_array_equal(row["positions"][:total], np.concatenate([np.arange(s) for s in sizes]))
    np.testing.assert_array_equal(row["groups"][:total], np.repeat([1, 2], [n, total - n]))
    assert not row["segments"][total:].any() and not row["groups"][total:].any()
    assert row["weights"].sum() == len(sizes)
    read = row["weights"] > 0
    wanted = [x for r in records for x in r["relevance"]]
    np.testing.assert_array_equal(row["targets"][read], wanted)
    np.testing.assert_array_equal(np.flatnonzero(read), np.cumsum(sizes) - sizes)
    second = row["segments"] == k + 1
    text = tokenizer.decode(row["tokens"][second & (row["token_types"] == 1)]).strip()
    assert text.replace(tokenizer.eos_token or "\0", "").strip() == records[1]["candidates"][0]
    assert set(old.layout.spec(1, 8)) == {*row} - {"token_types"}


@pytest.mark.parametrize("kind", ["Pairwise", "Listwise"])
def test_queries_in_one_row_are_as_each_alone(made, kind):
    config, task = made
    task = getattr(task_lib, kind)(task.tokenizer)
    model = task.load_model(config.model, dtype="float32", attention="xla")
    params = params_lib.init(model.abstract, jax.random.key(0))
    examples = task.examples(ranked(4), [f"f:{i}" for i in range(4)])
    evaluate = jax.jit(task.eval_fn(model, {}))
    width = sum(len(e.tokens) for e in examples)
    together, found = evaluate(params, packed(task, examples, [[0, 1, 2, 3]], width))
    alone, single = evaluate(params, packed(task, examples, [[3], [1], [0], [2]], width))
    np.testing.assert_allclose(together.sum, alone.sum, rtol=1e-5)
    assert float(together.weight) == float(alone.weight) > 0
    scores, order = (np.asarray(x["given"])[np.asarray(x["weights"]) > 0] for x in (found, single))
    sizes = [len(e.wanted) for e in examples]
    parts = np.split(order, np.cumsum([sizes[i] for i in (3, 1, 0)]))
    np.testing.assert_allclose(scores, np.concatenate([parts[i] for i in (2, 1, 3, 0)]), atol=1e-5)


def test_long_candidates_are_cut_and_the_query_is_not(made):
    _, task = made
    words = [" ".join(["day"] * n) for n in (22, 3, 26)]
    record = {"query": "which film is it", "candidates": words, "relevance": [0, 1, 0]}
    [one] = task.examples([record], ["f:1"])
    whole = np.bincount(one.candidates)[1:]
    most = int(whole.sum()) - 40
    [piece] = task.cut(one, most, "truncate_end")
    sizes = np.bincount(piece[3])[1:]
    assert most - 2 <= sizes.sum() <= most and sizes[1] == whole[1] and sizes[0] == sizes[2]
    np.testing.assert_array_equal(piece[2][piece[1] > 0], record["relevance"])
    [short] = task.examples([record | {"candidates": ["day"] * 3}], ["f:1"])
    first = short.tokens[(short.candidates == 1) & ~short.inner]
    for i in (1, 2, 3):
        assert set(first) <= set(piece[0][piece[3] == i])
    assert task.cut(one, most, "drop") == [] and task.cut(one, 12, "truncate_end") == []
    assert len(task.cut(one, 0, "drop")[0][0]) == whole.sum()


GOOD = {"query": "a", "candidates": ["b", "c"], "relevance": [1, 0]}
BAD = [
    ({"query": " "}, "field 'query' is ' ', expected text"),
    ({"candidates": "b"}, "field 'candidates' is 'b', expected a list of two or more texts"),
    ({"candidates": ["b"]}, "expected a list of two or more texts"),
    ({"candidates": ["b", None]}, "field 'candidates': candidate 1 is None, expected text"),
    ({"relevance": [1]}, "field 'relevance' is .1., expected a list of 2 numbers, one for each"),
    ({"relevance": [1, -1]}, "field 'relevance': number 1 is -1, expected one of 0 or more"),
    ({"relevance": [True, 0]}, "number 0 is True, expected one of 0 or more"),
    ({"relevance": [0, float("nan")]}, "number 1 is nan, expected one of 0 or more"),
    ({"candidates": ["b", "day " * 200]}, "the query with candidate 1 has .* 128 positions"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_a_bad_record_is_refused_with_its_row(made, change, message):
    assert made[1].examples([GOOD], ["f:1"])
    with pytest.raises(DataError, match=f"^f:1: .*{message}"):
        made[1].examples([GOOD | change], ["f:1"])


def test_a_missing_field_names_the_key_to_set(made):
    record = {k: v for k, v in GOOD.items() if k != "query"}
    with pytest.raises(DataError, match="f:1: no prompt.*set data.fields.prompt"):
        made[1].examples([record], ["f:1"])
    assert made[1].fields_read(GOOD | {"extra": 1}) == set(GOOD)


def test_queries_of_one_relevance_are_counted(made):
    task = made[1]
    tally = task.tally(160, "truncate_end")
    rows = [GOOD, GOOD | {"relevance": [1, 1]}, GOOD | {"relevance": [0, 0]}]
    tally.count(tally.fit(list(enumerate(task.examples(rows, ["f:1", "f:2", "f:3"])))))
    assert ["2 of 3 queries" in line for line in task.warnings(tally.report({}))] == [True]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.streaming", "True", "data.streaming: a row's segments are candidates"),
        ("data.overlong", "truncate_prompt", "would cut the query"),
        ("data.overlong", "split", "data.overlong='split'"),
        ("data.fields.pair", "x", "data.fields.pair is nothing"),
        ("loss.kind", "mse", "loss.kind='mse' is not of task="),
        ("model.path", str(every.QUICKSTART / "base_model"), "read by an encoder such as BERT"),
    ],
)
def test_settings_that_would_do_harm(made, key, value, message):
    config = made[0].copy_and_resolve_references()
    config_lib.override(config, key, value)
    with pytest.raises(ConfigError, match=message):
        tasks.make(config, load_tokenizer(config))


# ---- runs ----------------------------------------------------------------------------------


def lines(workdir):
    found = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: (x["loss"], x["grad_norm"]) for x in found if "grad_norm" in x}


@pytest.mark.slow
def test_a_run_learns_and_resumes_bit_equal(made, tmp_path):
    config = made[0].copy_and_resolve_references()
    config.train.duration, config.train.log_every = "30 steps", "1"
    config.train.checkpoint_every, config.optim.lr = "20 steps", 3e-3
    config.eval.group = "extra"
    config.task = config.task.replace("Listwise", "Pairwise")
    result = train_lib.train(config, tmp_path / "run")
    before, after = (result[k]["losses"] for k in ("before", "after"))
    assert after["validation/loss"] < before["validation/loss"] - 0.05
    assert after["validation/ndcg10"] > before["validation/ndcg10"] + 0.05
    assert after["validation/mrr"] > 0.95 and result["after"]["errors"]["validation/ndcg10"] > 0
    assert result["after"]["n"]["validation"] == 21
    assert len(result["after"]["rows"]["validation"]["ndcg10"]) == 21
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "30")
    again = train_lib.train(config, tmp_path / "again")
    assert lines(tmp_path / "again") == lines(tmp_path / "run")
    assert again["after"]["losses"] == after


def test_the_config_is_short_and_names_both_tasks():
    assert len((FOLDER / "config.py").read_text().splitlines()) <= 40
    for kind in ("Listwise", "Pairwise"):
        config = config_lib.load(f"{FOLDER / 'config.py'}:{kind}")
        config_lib.check(config)
        assert config.task == f"experiments/ranking/task.py:{kind}"
        assert task_lib.LOSSES[getattr(task_lib, kind).kind]


@pytest.mark.fixtures
def test_prepared_data(fixtures, tmp_path, monkeypatch):
    prepare = load_python(str(FOLDER / "prepare.py"), "prepare")
    monkeypatch.setattr(prepare, "FIXTURES", fixtures)
    found = prepare.main(tmp_path)
    assert found["random order"]["mrr"] == pytest.approx(sum(1 / r for r in range(1, 9)) / 8)
    assert found["word overlap"]["ndcg10"] > 0.85
    read = lambda name: [json.loads(x) for x in (tmp_path / f"{name}.jsonl").open()]  # noqa: E731
    train, test, shuffled = map(read, ("train", "test", "shuffled"))
    assert (len(train), len(test)) == (742, 228)
    assert not {r["article"] for r in train} & {r["article"] for r in test}
    for row in [*train, *test]:
        assert sorted(row["relevance"]) == [0] * 7 + [1] and len(set(row["candidates"])) == 8
        assert max(len(text.split()) for text in row["candidates"]) <= 60
    data = json.loads((fixtures / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    answers = {
        q["question"]: q["answers"][0]["text"]
        for a in data for p in a["paragraphs"] for q in p["qas"]
    }  # fmt: skip
    right = [answers[r["query"]] in r["candidates"][r["relevance"].index(1)] for r in [*train, *test]]
    assert np.mean(right) > 0.97  # the others' answers go over a passage's end
    assert [r["candidates"] for r in shuffled] == [r["candidates"] for r in train]
    share = np.mean([a["relevance"] == b["relevance"] for a, b in zip(train, shuffled, strict=True)])
    assert 0.08 < share < 0.18  # one in eight by chance
