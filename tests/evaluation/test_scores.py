"""The table of metrics: the packages' numbers, edge cases, errors and baselines."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from sftjax.errors import ConfigError
from sftjax.evaluation import metrics
from sftjax.evaluation.metrics import (
    bootstrap,
    labels,
    multi_labels,
    numbers,
    standard_error,
    tags,
    texts,
)
from sftjax.evaluation.metrics import lead as lead_of

rng = np.random.default_rng(0)


def drawn(n, classes, seed):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(classes), n)
    return rng.integers(classes, size=n), scores.argmax(1), scores


@pytest.mark.parametrize("n, classes", [(200, 2), (200, 5), (3, 3), (1, 2)])
def test_labels_are_as_scikit_learn_says(n, classes):
    wanted, given, scores = drawn(n, classes, seed=n + classes)
    names = [f"l{i}" for i in range(classes)]
    found = labels(wanted, given, names, scores)
    options = dict(labels=range(classes), zero_division=0.0)
    expected = {
        "accuracy": sk.accuracy_score(wanted, given),
        "f1": sk.f1_score(wanted, given, average="macro", **options),
        "f1_micro": sk.f1_score(wanted, given, average="micro", **options),
        "f1_weighted": sk.f1_score(wanted, given, average="weighted", **options),
        "precision": sk.precision_score(wanted, given, average="macro", **options),
        "recall": sk.recall_score(wanted, given, average="macro", **options),
        "mcc": sk.matthews_corrcoef(wanted, given),
    }
    if len(set(wanted)) == classes:
        chosen = scores[:, 1] if classes == 2 else scores
        expected["auroc"] = sk.roc_auc_score(wanted, chosen, multi_class="ovr")
    gap = 0.0
    for low in range(10):
        sure = scores.max(1)
        some = (sure >= low / 10) & (sure < (low + 1) / 10 if low < 9 else sure <= 1)
        if some.any():
            gap += some.mean() * abs(sure[some].mean() - (given == wanted)[some].mean())
    expected["ece"] = gap
    assert found.values == pytest.approx(expected, abs=1e-9)
    assert sum(map(sum, found.tables["confusion"]["rows"])) == n
    assert sum(one["n"] for one in found.tables["per_label"].values()) == n


def test_a_classifier_that_always_says_the_same_is_its_own_baseline():
    wanted = np.array([0] * 7 + [1] * 3)
    found = labels(wanted, np.zeros(10, int), ["neg", "pos"])
    [(name, baseline)] = found.baselines.items()
    assert name == "always neg" and baseline["accuracy"] == found.values["accuracy"] == 0.7
    assert found.values["mcc"] == 0 and baseline["f1"] == pytest.approx(7 / 17)


def test_no_rows_one_class_ties_and_answers_that_are_none():
    same = labels(np.zeros(4, int), np.zeros(4, int), ["a", "b"], np.full((4, 2), 0.5))
    assert "auroc" not in same.values and same.values["ece"] == 0.5
    lost = labels(np.array([0, 1]), np.array([0, -1]), ["a", "b"])
    assert lost.values["accuracy"] == 0.5 and lost.values["not_finite"] == 1
    tied = labels(np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0]), ["a", "b"], np.full((4, 2), 0.5))
    assert tied.values["auroc"] == 0.5


@pytest.mark.parametrize("n", [1, 2, 50])
def test_numbers_are_as_scikit_learn_and_scipy_say(n):
    rng = np.random.default_rng(n)
    wanted, given = rng.normal(size=n), rng.normal(size=n).round(1)
    expected = {
        "mae": sk.mean_absolute_error(wanted, given),
        "rmse": sk.mean_squared_error(wanted, given) ** 0.5,
    }
    if n > 1:
        expected["r2"] = sk.r2_score(wanted, given)
        expected["pearson"] = stats.pearsonr(wanted, given)[0]
        expected["spearman"] = stats.spearmanr(wanted, given)[0]
    assert numbers(wanted, given).values == pytest.approx(expected, abs=1e-9)


def test_a_constant_has_no_correlation():
    found = numbers(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert set(found.values) == {"mae", "rmse", "r2"}
    assert found.baselines == {"the mean": {"mae": 0.5, "rmse": 0.5}}


TEXTS = [
    # wanted, given, exact match, EM and F1 as SQuAD's evaluation gives them
    ("The cat.", "  The cat. ", 1, 1, 1.0),
    ("The cat.", "a CAT", 0, 1, 1.0),
    ("in the year 1999", "1999", 0, 0, 0.5),
    ("", "", 1, 1, 1.0),
    ("", "x", 0, 0, 0.0),
    ("the", "an", 0, 1, 1.0),
    ("a b b c", "b b b", 0, 0, 2 / 3),
]


def test_texts_row_by_row():
    wanted, given, *expected = map(list, zip(*TEXTS, strict=True))
    found = texts(["exact_match", "squad_em", "token_f1"], wanted, given)
    for name, values in zip(found.values, expected, strict=True):
        assert found.rows[name].tolist() == pytest.approx(values), name
        assert found.values[name] == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    "pattern, wanted, given, right",
    [
        ("####", "so 7 x 2\n#### 1,400", "I say 3\n#### 1400.0", 1),
        ("####", "#### 14", "14", 0),
        ("####", "#### -0.5", "no #### 3 but #### -.5", 1),
        (r"answer is (\S+)", "the answer is 12.", "the answer is 12", 1),
        ("", "12", "first 3, then 12", 1),
        ("", "on 2023-05-01", "1", 1),
        ("", "pages 3-4", "4", 1),
        ("", "1e3", "1,000", 1),
    ],
)
def test_the_number_after_a_pattern(pattern, wanted, given, right):
    assert texts(["number"], [wanted], [given], answer=pattern).values == {"number": right}


def test_references_without_a_number_are_an_error():
    message = r"eval.answer='####': 1 of 2 references hold no number there, the first of them '72'"
    with pytest.raises(ConfigError, match=message):
        texts(["number"], ["#### 5", "72"], ["#### 5", "#### 72"], answer="####")


def test_a_function_of_the_user_s_is_loaded_once_and_not_drawn_from(tmp_path):
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('read ')\ndef f(w, g):\n    return 0.5\n"
    (tmp_path / "own.py").write_text(code)
    found = texts([f"{tmp_path / 'own.py'}:f"], ["a"] * 9, ["b"] * 9, errors=True)
    assert list(found.values.values()) == [0.5] and not found.errors
    assert log.read_text() == "read "


def test_a_pattern_that_is_none():
    with pytest.raises(ConfigError, match=r"eval.answer='\(' is no regular expression"):
        texts(["number"], ["1"], ["1"], answer="(")


WANTED = ["the cat sat on the mat", "it rains", "a dog", ""]
GIVEN = ["a cat sat on a mat", "it rained", "a dog", "x"]


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra `metrics` is not installed")
    found = texts(["bleu", "chrf"], WANTED, GIVEN, errors=True)
    assert found.values["bleu"] == sacrebleu.corpus_bleu(GIVEN, [WANTED]).score
    assert found.values["chrf"] == sacrebleu.corpus_chrf(GIVEN, [WANTED]).score
    assert set(found.errors) == {"bleu", "chrf"} and min(found.errors.values()) > 0


def test_rouge_is_googles():
    module = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra `metrics`")
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = module.RougeScorer(names, use_stemmer=True)
    found = texts(names, WANTED, GIVEN)
    for name in names:
        each = [scorer.score(w, g)[name].fmeasure for w, g in zip(WANTED, GIVEN, strict=True)]
        assert found.values[name] == pytest.approx(np.mean(each), abs=1e-9)


def test_entities_are_seqevals():
    pytest.importorskip("seqeval", reason="the extra `metrics` is not installed")
    wanted = [["B-PER", "I-PER", "O"], ["B-LOC"]]
    assert tags(wanted, wanted).values == {"seqeval_f1": 1.0}
    assert tags(wanted, [["B-PER", "O", "O"], ["B-LOC"]]).values == {"seqeval_f1": 0.5}
    assert tags([["O"]], [["O"]]).values == {"seqeval_f1": 0.0}


def test_entities_of_random_tags_are_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics", reason="the extra `metrics`")
    rng = np.random.default_rng(0)
    names = np.array(["O", "B-a", "I-a", "B-b", "I-b"])
    lengths = rng.integers(1, 9, 40)
    wanted, given = ([list(names[rng.integers(0, 5, n)]) for n in lengths] for _ in range(2))
    given = [w if i % 3 else g for i, (w, g) in enumerate(zip(wanted, given, strict=True))]
    found = tags(wanted, given, errors=True)
    lists = [[list(map(str, one)) for one in some] for some in (wanted, given)]
    assert found.values["seqeval_f1"] == pytest.approx(seqeval.f1_score(*lists), abs=1e-12)
    report = seqeval.classification_report(*lists, output_dict=True)
    for kind, one in found.tables["per_entity"].items():
        theirs = {k: report[kind][k] for k in ("precision", "recall")} | {"f1": report[kind]["f1-score"]}
        assert {k: one[k] for k in theirs} == pytest.approx(theirs, abs=1e-9)
        assert one["n"] == report[kind]["support"]
    assert 0 < found.errors["seqeval_f1"] < 0.2 and len(found.rows["accuracy"]) == 40
    assert tags(wanted, given, groups=[0] * 40, errors=True).errors == {}


def test_several_labels_are_sklearns():
    rng = np.random.default_rng(0)
    wanted, scores = rng.random((50, 4)) < 0.3, rng.random((50, 4))
    wanted[:, 3] = False  # a label that nobody has
    found = multi_labels(wanted, scores, "abcd", errors=True)
    given = scores >= 0.5
    assert found.values["accuracy"] == pytest.approx(sk.accuracy_score(wanted, given))
    for name, average in [("f1", "macro"), ("f1_micro", "micro")]:
        expected = sk.f1_score(wanted, given, average=average, zero_division=0.0)
        assert found.values[name] == pytest.approx(expected, abs=1e-12)
    assert found.values["auroc"] == pytest.approx(sk.roc_auc_score(wanted[:, :3], scores[:, :3]))
    assert found.tables["per_label"]["d"]["n"] == 0 and set(found.errors) == {*found.values} - {"auroc"}
    [(name, base)] = found.baselines.items()
    assert name == "each label's majority" and base["f1_micro"] == 0.0
    scores[7] = np.nan
    lost = multi_labels(wanted, scores, "abcd")
    assert lost.values["not_finite"] == 1.0 and "auroc" not in lost.values


def test_the_best_of_several_references_counts():
    found = texts(["exact_match", "token_f1"], [("a b", "c"), ("d",)], ["c", "e"])
    assert found.values == {"exact_match": 0.5, "token_f1": 0.5}


def test_a_users_function(tmp_path):
    (tmp_path / "m.py").write_text(
        "def longer(wanted, given):\n    return [len(g) > len(w) for w, g in zip(wanted, given)]\n"
        "def spread(wanted, given):\n    return float(len(set(given)))\n"
        "def wrong(wanted, given):\n    return [1]\nnothing = 3\n"
    )
    of = lambda name: f"{tmp_path / 'm.py'}:{name}"  # noqa: E731
    found = texts([of("longer"), of("spread")], ["a", "b"], ["aa", "b"], errors=True)
    assert list(found.values.values()) == [0.5, 2.0]
    metrics.check([of("longer"), "bleu"], "texts")
    with pytest.raises(ConfigError, match="gave 1 values for 2 rows"):
        texts([of("wrong")], ["a", "b"], ["aa", "b"])
    for name, message in [
        (of("nothing"), "has no function nothing"),
        (f"{tmp_path}/n.py:f", "is no Python file"),
        ("accuracy", "'accuracy' is no metric of texts"),
    ]:
        with pytest.raises(ConfigError, match=message):
            metrics.check([name], "texts")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: __import__("no_such"))
    with pytest.raises(ConfigError, match=r"needs sacrebleu, .* pip install 'sftjax\[metrics\]'"):
        metrics.package("sacrebleu")


# ---- standard errors -----------------------------------------------------------------------


def test_the_standard_error_of_a_mean():
    rows = rng.normal(size=400)
    assert standard_error(rows) == pytest.approx(stats.sem(rows))
    assert np.isnan(standard_error([1.0])) and np.isnan(standard_error([]))
    alone = standard_error(rows, range(400))  # each row its own group
    assert alone == pytest.approx(stats.sem(rows) * (399 / 400) ** 0.5)
    assert np.isnan(standard_error(rows, ["one"] * 400))


def test_copies_of_a_row_say_nothing_new():
    rows = rng.normal(size=100)
    once = standard_error(rows, range(100))
    assert standard_error(np.repeat(rows, 7), np.repeat(range(100), 7)) == pytest.approx(once)
    assert standard_error(np.repeat(rows, 7)) < once / 2


def test_the_bootstrap_finds_the_error_of_a_mean():
    rows = rng.normal(size=500)
    mean = lambda at: {"mean": float(rows[at].mean())}  # noqa: E731
    assert bootstrap(mean, 500)["mean"] == pytest.approx(stats.sem(rows), rel=0.25)
    again = lambda at: {"mean": float(np.repeat(rows, 4)[at].mean())}  # noqa: E731
    grouped = bootstrap(again, 2000, np.repeat(range(500), 4))["mean"]
    assert grouped == pytest.approx(stats.sem(rows), rel=0.25)
    assert bootstrap(mean, 1) == {}


def test_errors_stand_beside_every_value():
    wanted, given, scores = drawn(300, 3, seed=1)
    found = labels(wanted, given, ["a", "b", "c"], scores, errors=True)
    assert set(found.errors) == set(found.values)
    p = found.values["accuracy"]
    assert found.errors["accuracy"] == pytest.approx((p * (1 - p) / 299) ** 0.5)
    grouped = labels(wanted, given, ["a", "b", "c"], groups=np.arange(300) // 10, errors=True)
    assert 0 < grouped.errors["accuracy"] != found.errors["accuracy"]


def test_numbers_that_are_not_finite_are_counted():
    found = metrics.numbers(np.array([1.0, 2.0]), np.array([np.nan, 2.0]), errors=True)
    assert np.isnan(found.values["mae"]) and found.values["not_finite"] == 1.0


@pytest.mark.parametrize(
    "text, lead",
    [
        ("One. Two! Three? Four.", "One. Two! Three?"),
        ("No end", "No end"),
        ("It cost 3.50 euros. More", "It cost 3.50 euros. More"),
        ("", ""),
    ],
)
def test_lead_is_the_first_sentences(text, lead):
    assert lead_of(text, 3) == lead
