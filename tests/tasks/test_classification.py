"""Labels, cuts, class weights and scores of a classification."""

import numpy as np
import pytest
import tiny
from inspecting import inspect
from test_chat import make_tokenizer

from sftjax import config as config_lib
from sftjax import losses, tasks
from sftjax import params as params_lib
from sftjax.data import DataError, Rows, build_store, open_source
from sftjax.errors import ConfigError
from sftjax.tasks.classification import Classification, Labels, confusion_text

NAMES = ("negative", "positive")


def task(labels=NAMES, reads="first", **names):
    return Classification(make_tokenizer(), labels, names, reads)


def write(path, rows):
    path.write_text("\n".join(rows) + "\n")
    return str(path)


# ---- labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, value, index",
    [
        (NAMES, 1, 1),
        (NAMES, "1", 1),  # a table of text has no numbers
        (NAMES, "negative", 0),
        (NAMES, True, 1),
        (NAMES, 1.0, 1),
        (("0", "1"), "1", 1),  # a name counts before an index
        (("1", "0"), "1", 0),
        ({0: "negative", 1: "positive"}, 0, 0),
        ({0: "negative", 1: "positive"}, "1", 1),
        ({"neg": "negative", "pos": "positive", "+": "positive"}, "+", 1),
        ({"true": "yes", "false": "no"}, True, 0),
    ],
)
def test_what_a_value_in_a_file_means(given, value, index):
    assert Labels(given).index(value, "f:1") == index


@pytest.mark.parametrize("value", ["odd", 2, -1, 0.5, None, [1], {"a": 1}])
def test_an_unknown_label_names_row_value_and_what_there_is(value):
    with pytest.raises(DataError) as error:
        Labels(NAMES).index(value, "f.jsonl:7")
    assert error.value.where == "f.jsonl:7" and error.value.kind == "unknown_label"
    assert f"label {value!r} is unknown" in str(error.value) and "'positive'" in str(error.value)


@pytest.mark.parametrize("given", [("one",), ("a", "a"), ("a", ""), ("a", 1), {0: "a", 1: "a"}])
def test_labels_that_are_no_two_different_names(given):
    with pytest.raises(ConfigError, match="expected two or more different names"):
        Labels(given)


def test_the_default_config_takes_names_or_a_map():
    for given in (NAMES, {0: "negative", 1: "positive"}):
        config = config_lib.get_default()
        config.data.labels = given
        copy = config.copy_and_resolve_references()
        assert Labels(copy.data.labels).names == NAMES
        assert config_lib.to_dict(config)["data"]["labels"]
    config_lib.override(config, "data.labels", "('a', 'b')")
    assert config.data.labels == ("a", "b")


# ---- records -------------------------------------------------------------------------------


def test_fields_by_their_usual_names_or_the_first_that_a_record_has():
    usual, given = task(), task(text="sentence|content", label="gold")
    [a] = usual.examples([{"text": "a b", "label": 1}], ["f:1"])
    pair = [{"content": "a b", "gold": "positive"}, {"sentence": "a b", "gold": 1, "content": "x"}]
    b, c = given.examples(pair, ["f:1", "f:2"])
    for other in (b, c):
        for x, y in zip(a.arrays, other.arrays, strict=True):
            np.testing.assert_array_equal(x, y)
    assert given.fields_read(pair[1]) == {"sentence", "gold"}
    filled, row = task(text="{title}: {body}"), {"title": "a", "body": "b", "label": 0, "url": "x"}
    assert filled.fields_read(row) == {"title", "body", "label"}
    [example] = filled.examples([row], ["f:3"])
    assert filled.left_out(row, example) == ["field 'url' is not read"]


@pytest.mark.parametrize(
    "record, kind, message",
    [
        ({"label": 1}, "missing_field", "no text: none of the fields text | sentence"),
        ({"text": "a"}, "missing_field", "no label: none of the fields label | labels"),
        ({"text": "a", "label": None}, "null_field", "'label' is null"),
        ({"text": " ", "label": 1}, "empty_text", "'text' is ' ', expected text"),
        ({"text": 5, "label": 1}, "empty_text", "'text' is 5, expected text"),
    ],
)
def test_a_record_that_is_no_example(record, kind, message):
    with pytest.raises(DataError) as error:
        task().examples([record], ["f.jsonl:3"])
    assert error.value.kind == kind and message in str(error.value)
    assert str(error.value).startswith("f.jsonl:3: ")


@pytest.mark.parametrize("reads", ["first", "last"])
@pytest.mark.parametrize("overlong", ["truncate_end", "truncate_prompt"])
def test_a_cut_text_keeps_its_special_tokens_and_its_label(reads, overlong):
    t = task(reads=reads)
    t.__dict__["special_ends"] = (1, 1)  # as a tokenizer's [CLS] and [SEP]
    [example] = t.examples([{"text": "a b c d e f g h", "label": 1}], ["f:1"])
    n = len(example.tokens)
    assert n > 5
    [(tokens, weights, targets)] = t.cut(example, 5, overlong)
    assert len(tokens) == 5
    assert tokens[0] == example.tokens[0] and tokens[-1] == example.tokens[-1]
    inner = example.tokens[1:-1]
    kept = inner[:3] if overlong == "truncate_end" else inner[-3:]
    np.testing.assert_array_equal(tokens[1:-1], kept)
    at = 0 if reads == "first" else 4
    assert weights.tolist() == [float(i == at) for i in range(5)] and targets[at] == 1
    assert t.cut(example, 5, "drop") == []


def test_a_store_counts_labels_and_warns_of_what_is_rare(tmp_path, caplog):
    rows = ["label\ttext", *("1\tgood" for _ in range(19)), "0\tbad"]
    source = open_source(write(tmp_path / "a.tsv", rows))
    store = build_store(source, task(), 16, "truncate_end", tmp_path / "cache")
    assert store.report["labels"] == {"negative": 1, "positive": 19}
    assert "95.0% of the examples have the label positive" in caplog.text
    again = build_store(source, task(("negative", "positive", "mixed")), 16, "drop", tmp_path / "cache")
    assert "no example has the label mixed" in caplog.text and len(again) == 20


def test_other_labels_are_another_store(tmp_path):
    source = open_source(write(tmp_path / "a.jsonl", ['{"text": "a", "label": 0}']))
    folders = {
        build_store(source, t, 16, "drop", tmp_path / "cache").folder
        for t in (task(), task(NAMES[::-1]), task(reads="last"))
    }
    assert len(folders) == 3


def test_inspect_shows_the_label_and_the_token_it_is_read_from(tmp_path):
    from test_all_tasks import classes

    config = config_lib.get_default()
    classes(config, tmp_path)
    text = inspect(config, n=1, color=False)
    assert "label good" in text or "label bad" in text
    assert ("labels" in text and "good 5" in text) or "good 4" in text


# ---- packed rows, the loss and the score -----------------------------------------------------


def batches(tmp_path, packing, texts):
    rows = [f'{{"text": "{t}", "label": {i % 2}}}' for i, t in enumerate(texts)]
    store = build_store(
        open_source(write(tmp_path / "a.jsonl", rows)),
        task(reads="last"),
        32,
        "drop",
        tmp_path / "c",
    )
    layout = task().layout
    packed = Rows(store, 32, packing, shuffle=False, layout=layout)
    return packed.batch(range(len(packed))), store


def test_packed_rows_equal_padded_ones(tmp_path):
    texts = ["a b", "c", "d e f g", "h i", "j k l", "m"]
    model = tiny.model(vocab=512, vocab_multiple=1).replace(classes=2)
    params = tiny.params(model)
    found = []
    for packing in ("bfd", "none"):
        batch, _ = batches(tmp_path, packing, texts)
        logits = np.asarray(model.class_logits(params, model.hidden(params, batch)))
        at = batch["weights"] > 0
        assert at.sum() == len(texts)
        order = np.lexsort(np.round(logits[at], 4).T)
        found.append(logits[at][order])
    np.testing.assert_allclose(*found, atol=1e-5)


def test_class_weights_weigh_and_divide(tmp_path):
    model = tiny.model(vocab=512, vocab_multiple=1).replace(classes=2)
    params = tiny.params(model)
    batch, store = batches(tmp_path, "bfd", ["a b", "c", "d e f g", "h i", "j k"])
    plain = losses.classification(model)(params, batch, None)
    t = task()
    t.saw([store.report])
    balanced = t.class_weights("balanced")
    np.testing.assert_allclose(balanced, [5 / 6, 5 / 4])
    assert t.class_weights("") == () and t.class_weights("1, 2.5") == (1.0, 2.5)
    weighted = losses.classification(model, class_weights=balanced)(params, batch, None)
    np.testing.assert_allclose(weighted.weight, 3 * 5 / 6 + 2 * 5 / 4, rtol=1e-6)
    logits = model.class_logits(params, model.hidden(params, batch))
    logp = np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    each = -np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0] * batch["weights"]
    np.testing.assert_allclose(plain.sum, each.sum(), rtol=1e-5)
    factor = np.array(balanced)[batch["targets"]]
    np.testing.assert_allclose(weighted.sum, (each * factor).sum(), rtol=1e-5)


@pytest.mark.parametrize("text", ["heavy", "1", "1,2,3", "1,-1"])
def test_class_weights_that_are_none(text):
    with pytest.raises(ConfigError, match="expected 'balanced', or a number of 0 or more for each"):
        task().class_weights(text)


def test_the_score_is_scikit_learns_and_what_is_not_finite_is_wrong():
    wanted = np.array([0, 0, 0, 1, 1, 0])
    given = np.array([0, 0, 1, 1, -1, 0])
    weights = np.array([1, 1, 1, 1, 1, 0])
    chances = np.array([[0.9, 0.1]] * 6)
    found = dict(wanted=wanted, given=given, weights=weights, scores=chances)
    scores = task().score(0.0, found)
    assert scores.values["accuracy"] == pytest.approx(3 / 5)
    # negative: precision 2/2, recall 2/3; positive: precision 1/2, recall 1/2
    assert scores.values["f1"] == pytest.approx((0.8 + 0.5) / 2)
    assert scores.values["not_finite"] == 1
    table = scores.tables["confusion"]
    assert table == {"labels": list(NAMES), "rows": [[2, 1], [0, 1]]}
    lines = confusion_text(table).splitlines()
    assert lines[0].split() == list(NAMES) and lines[1].split() == ["negative", "2", "1"]


def test_logits_that_are_not_finite_are_said(tmp_path):
    model = tiny.model(vocab=512, vocab_multiple=1).replace(classes=2)
    params = tiny.params(model)
    params["score"]["w"] = params["score"]["w"].at[0].set(np.nan)
    batch, _ = batches(tmp_path, "bfd", ["a b", "c"])
    _, found = losses.classification(model, predictions=True)(params, batch, None)
    assert (np.asarray(found["given"])[batch["weights"] > 0] == -1).all()


# ---- settings that belong to another task ------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("loss.dft", "True", "loss.dft=True is not of task='classification'"),
        ("data.overlong", "split", "would give the pieces of a text its label"),
        ("data.labels", "()", "data.labels is empty, and the model names none"),
    ],
)
def test_settings_that_have_no_meaning_here(tmp_path, key, value, message):
    from test_all_tasks import classes, make

    config = config_lib.get_default()
    classes(config, tmp_path)
    config_lib.override(config, key, value)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make(config)


def test_class_weights_are_refused_of_a_language_model():
    config = config_lib.get_default()
    config.loss.class_weights = "balanced"
    with pytest.raises(ConfigError, match="'balanced' is not of task='causal_lm', of which"):
        tasks.make(config, make_tokenizer())


def test_params_of_a_head_have_a_place_in_every_rule():
    model = tiny.model().replace(classes=2)
    names = params_lib.flatten(model.abstract)
    assert "score/w" in names and "head/w" not in names
