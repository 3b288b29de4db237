"""Tasks of texts: what of a record stands at which token, losses beside plain ones, exports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_all_tasks as every
import tiny
from test_chat import make_tokenizer

from sftjax import config as config_lib
from sftjax import losses, tasks
from sftjax import params as params_lib
from sftjax import train as train_lib
from sftjax.data import DataError, open_source
from sftjax.errors import ConfigError
from sftjax.files import load_python
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.tasks.classification import Classification, MultiLabel
from sftjax.tasks.masked_lm import MaskedLM
from sftjax.tasks.regression import Regression
from sftjax.tasks.token_labels import TokenLabels

qa = load_python(str(every.REPO / "experiments" / "xquad" / "task.py"), "task")
IN_SPAN, SPAN_START, SPAN_END = qa.IN_SPAN, qa.SPAN_START, qa.SPAN_END
LABELS = ("red", "green", "blue")


class Head:
    """A stand-in for a body: the hidden states are given, and are the logits."""

    def __init__(self, logits):
        self.given = jnp.asarray(logits, jnp.float32)

    def outputs(self, params, batch, rng=None):
        return self.given * params, None

    def class_logits(self, params, hidden, rng=None, segments=None):
        return hidden


def batch(weights, targets, segments):
    weights = np.array(weights, np.float32)
    return dict(weights=weights, targets=np.array(targets), segments=np.array(segments))


RNG = np.random.default_rng(0)
SEGMENTS = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
READ = [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]


# ---- losses --------------------------------------------------------------------------------


def test_focal_is_cross_entropy_weighed_by_what_is_missing():
    logits, targets = RNG.normal(size=(2, 6, 3)), RNG.integers(0, 3, (2, 6))
    given, read = batch(READ, targets, SEGMENTS), np.array(READ) > 0
    p = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), targets[..., None], -1)[..., 0]
    loss = losses.classification(Head(logits), kind="focal", focal_gamma=1.5)(1.0, given, None)
    np.testing.assert_allclose(loss.sum, ((1 - p) ** 1.5 * -np.log(p))[read].sum(), rtol=1e-5)
    plain = losses.classification(Head(logits), kind="focal", focal_gamma=0.0)(1.0, given, None)
    np.testing.assert_allclose(plain.sum, -np.log(p)[read].sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["", "focal"])
def test_several_labels_beside_the_loss_of_each_alone(kind):
    logits = RNG.normal(size=(2, 6, 3))
    # Documents: {0, 2}, {1}, none; a label's index + 1 at tokens from the first on.
    given = batch(READ, [[1, 3, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]], SEGMENTS)
    wanted = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], np.float32)
    read = logits[np.array(READ) > 0]
    of = optax.sigmoid_binary_cross_entropy
    of = (lambda x, t: optax.sigmoid_focal_loss(x, t, gamma=2.0)) if kind else of
    expected = np.asarray(of(jnp.float32(read), wanted)).mean(1)
    loss, found = losses.multi_label(Head(logits), kind=kind, predictions=True)(1.0, given, None)
    np.testing.assert_allclose(loss.sum, expected.sum(), rtol=1e-5)
    assert float(loss.weight) == 3.0
    np.testing.assert_array_equal(np.asarray(found["wanted"])[np.array(READ) > 0], wanted)


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
def test_numbers_are_learned_in_units_of_their_spread(kind):
    logits, targets = RNG.normal(size=(2, 6, 1)), RNG.normal(7, 3, (2, 6)).astype(np.float32)
    read = np.array(READ) > 0
    state = {"mean": jnp.float32(7.0), "std": jnp.float32(3.0)}
    loss_fn = losses.regression(Head(logits), kind=kind, predictions=True)
    loss, found = loss_fn(1.0, batch(READ, targets, SEGMENTS), None, state)
    off = np.abs(logits[..., 0] - (targets - 7) / 3)[read]
    huber = np.where(off < 1, off**2 / 2, off - 0.5)
    expected = {"mse": off**2, "mae": off, "huber": huber}[kind]
    np.testing.assert_allclose(loss.sum, expected.sum(), rtol=1e-5)
    assert loss.state is state
    given = np.asarray(found["given"])[read]
    np.testing.assert_allclose(given, (logits[..., 0] * 3 + 7)[read], rtol=1e-5)
    with pytest.raises(ConfigError, match="loss.kind='bce': of this task it is one of mse, mae, h"):
        losses.regression(Head(logits), kind="bce")


def test_a_span_is_chosen_among_the_tokens_of_its_own_document():
    logits = RNG.normal(size=(2, 6, 2))
    both = IN_SPAN | SPAN_START | SPAN_END
    first = [IN_SPAN, 0, both, both, IN_SPAN, 0]
    second = [IN_SPAN, 0, IN_SPAN, IN_SPAN | SPAN_START, IN_SPAN | SPAN_END, 0]
    targets = np.array([first, second])
    given = batch(READ, targets, SEGMENTS)
    expected = 0.0
    for row, places, start, end in [(0, [0, 2], 2, 2), (0, [3, 4], 3, 3), (1, [0, 2, 3, 4], 3, 4)]:
        z = logits[row]
        lse = np.log(np.exp(z[places]).sum(0))
        expected += (lse[0] - z[start, 0] + lse[1] - z[end, 1]) / 2
    loss = qa.span(Head(logits))(1.0, given, None)
    np.testing.assert_allclose(loss.sum, expected, rtol=1e-5)
    grad = jax.grad(lambda p: qa.span(Head(logits))(p, given, None).sum)(1.0)
    assert np.isfinite(grad)


def test_hidden_tokens_are_chosen_anew_in_training_and_by_a_hash_in_evaluation():
    model, seen = tiny.model(), []

    class Seen:
        config = model.config

        def outputs(self, params, batch, rng=None):
            seen.append(np.asarray(batch["tokens"]))
            return model.outputs(params, batch)

        head, logit_options = model.head, model.logit_options

    params = tiny.params(model)
    n = 2000
    tokens = RNG.integers(5, model.config.vocab, (4, n // 4))
    given = dict(tokens=tokens, weights=np.ones(tokens.shape, np.float32),
                 segments=np.ones(tokens.shape, int),
                 positions=np.broadcast_to(np.arange(n // 4), tokens.shape))  # fmt: skip
    loss_fn = losses.masked_lm(Seen(), mask_id=3, mask_rate=0.3)
    trained = [float(loss_fn(params, given, jax.random.key(i)).weight) for i in (0, 1)]
    measured = [float(loss_fn(params, given, None).weight) for _ in range(2)]
    assert trained[0] != trained[1] and measured[0] == measured[1]
    assert all(0.25 * n < x < 0.35 * n for x in trained + measured)
    np.testing.assert_array_equal(seen[2], seen[3])
    hidden, other = (seen[0] == 3).mean(), ((seen[0] != tokens) & (seen[0] != 3)).mean()
    assert 0.2 < hidden < 0.28 and 0.01 < other < 0.05
    # What is hidden follows from token and position, not from the row or what stands beside it.
    turned = {k: v[::-1] for k, v in given.items()}
    loss_fn(params, turned, None)
    np.testing.assert_array_equal(seen[4], seen[3][::-1])


# ---- what of a record stands at which token ------------------------------------------------


def test_a_pair_is_joined_with_its_token_types():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = Classification(tokenizer, LABELS, {"pair": "other"})
    [one] = task.examples([{"text": "a b", "other": "c", "label": "blue"}], ["f:1"])
    assert len(one.arrays) == 4 and "token_types" in task.layout.spec(1, 4)
    assert list(task.columns) == ["tokens", "weights", "targets", "types"]
    assert tokenizer.decode(one.tokens[one.types == 1]).strip() == "c"
    with pytest.raises(DataError, match="field 'other' is ' ', expected text"):
        task.examples([{"text": "a", "other": " ", "label": 0}], ["f:1"])


def test_labels_of_a_text_that_has_several():
    task = MultiLabel(make_tokenizer(), LABELS)
    rows = [{"text": "a b c", "label": x} for x in (["blue", "red"], "green, red", [], "")]
    wanted = [one.wanted for one in task.examples(rows, [f"f:{i}" for i in range(4)])]
    assert wanted == [(0, 2), (0, 1), (), ()]
    with pytest.raises(DataError, match="f:1: the labels are 3, expected a list of them"):
        task.examples([{"text": "a", "label": 3}], ["f:1"])
    with pytest.raises(DataError, match="name one twice; a 0 or 1 for each label is not read"):
        task.examples([{"text": "a b c", "label": [0, 1, 0]}], ["f:1"])
    with pytest.raises(DataError, match="label 'pink' is unknown"):
        task.examples([{"text": "a", "label": ["pink"]}], ["f:1"])
    with pytest.raises(DataError, match="3 labels for a text of 1 tokens"):
        task.examples([{"text": "a", "label": list(LABELS)}], ["f:1"])


@pytest.mark.parametrize("value", ["x", None, True, float("nan"), "inf", [1], 1e60])
def test_a_number_that_is_none(value):
    task = Regression(make_tokenizer())
    with pytest.raises(DataError, match="^f:1: field .*"):
        task.examples([{"text": "a", "label": value}], ["f:1"])


def test_each_label_stands_at_its_words_first_token():
    task = TokenLabels(make_tokenizer(), ("O", "B-x"))
    words = ["alpha", "be", "gamma"]
    [one] = task.examples([{"tokens": words, "tags": ["O", "B-x", 0]}], ["f:1"])
    places = np.flatnonzero(one.weights)
    assert len(places) == 3 and one.targets[places].tolist() == [0, 1, 0]
    assert one.note == "be/B-x"
    for record, message in [
        ({"tokens": ["a"], "tags": []}, "1 words, and 0 labels in 'tags'"),
        ({"tokens": "a b", "tags": ["O"]}, "field 'tokens' is 'a b', expected a list of words"),
        ({"tokens": ["a"], "tags": ["I-y"]}, "label 'I-y' is unknown"),
    ]:
        with pytest.raises(DataError, match=message):
            task.examples([record], ["f:1"])


def report_of(task, rows):
    tally = task.tally(64, "truncate_end")
    examples = task.examples(rows, [f"f:{i}" for i in range(len(rows))])
    tally.count(tally.fit([("f:1", one) for one in examples]))
    return tally.report({})


def test_shares_are_of_what_is_labelled():
    words = TokenLabels(make_tokenizer(), ("O", "B-x"))
    rows = [{"tokens": ["a", "b", "c", "d"], "tags": ["O", "O", "O", "B-x"]}] * 3
    assert words.facts(report_of(words, rows)) == {"labels": "O 75.0%, B-x 25.0%"}
    several = MultiLabel(make_tokenizer(), LABELS)
    rows = [{"text": "a b c", "label": ["red", "blue"]}, {"text": "a b c", "label": ["red"]}]
    found = several.facts(report_of(several, rows))
    assert found == {"labels": "red 100.0%, green 0.0%, blue 50.0%"}


def test_parts_of_speech_are_no_entities():
    task = TokenLabels(make_tokenizer(), ("NOUN", "VERB"))
    first = np.array([True, False, True])
    given = dict(first=first, weights=np.ones(3), wanted=np.array([0, 1, 0]), given=np.array([0, 1, -1]))
    found = task.score(0.0, given, errors=True)
    assert task.metrics == ("accuracy", "f1_words") and "seqeval_f1" not in found.values
    assert found.values["accuracy"] == pytest.approx(2 / 3) and found.values["not_finite"] == 1.0
    entities = TokenLabels(make_tokenizer(), ("O", "B-x"))
    given = dict(first=first, weights=np.ones(3), wanted=np.array([0, 1, 0]), given=np.zeros(3, int))
    assert entities.score(0.0, given, errors=True).baselines["always O"] == {
        "accuracy": pytest.approx(2 / 3), "f1_words": pytest.approx(0.4), "seqeval_f1": 0.0,
    }  # fmt: skip


def test_a_long_text_is_cut_into_pieces_where_all_of_it_is_read():
    task = MaskedLM(make_tokenizer())
    [one] = task.examples([{"text": " ".join(f"w{i}" for i in range(20))}], ["f:1"])
    pieces = task.cut(one, 16, "split")
    assert len(pieces) > 2 and all(len(p[0]) <= 16 for p in pieces)
    np.testing.assert_array_equal(np.concatenate([p[0] for p in pieces]), one.tokens)


@pytest.mark.parametrize(
    "task, key, value, message",
    [
        ("regression", "data.packing", "wrapped", "cut a text in two"),
        ("token_labels", "data.fields.pair", "other", "data.fields.pair is nothing that task='to"),
        ("masked_lm", "data.fields.label", "label", "data.fields.label is nothing that task='mas"),
        ("regression", "loss.focal_gamma", "1.0", "loss.focal_gamma is of loss.kind='focal'"),
        ("multi_label", "loss.chunk_tokens", "8", "loss.chunk_tokens=8 is not of task='multi_lab"),
    ],
)
def test_settings_that_would_do_nothing_or_harm(tmp_path, task, key, value, message):
    config = config_lib.get_default()
    every.CASES[task][0](config, tmp_path)
    config_lib.override(config, key, value)
    with pytest.raises(ConfigError, match=message):
        tasks.make(config, load_tokenizer(config))


def asked(context, answers, question="which ?"):
    return {"question": question, "context": context, "answers": answers}


def test_an_answer_is_pointed_to_in_every_window_that_has_it():
    task = qa.ExtractiveQA(make_tokenizer())
    context = " ".join(f"w{i}" for i in range(12))
    start = context.index("w10")
    given = asked(context, {"text": ["w10"], "answer_start": [start]})
    [one] = task.examples([given], ["f:1"])
    inside = (one.targets & IN_SPAN) > 0
    n, (first, stop) = len(one.tokens), one.wanted.context
    assert inside.sum() == stop - first + (first > 0)
    decode = lambda at: task.tokenizer.decode(one.tokens[at])  # noqa: E731
    span = np.arange(one.wanted.first, one.wanted.last + 1)
    assert decode(span).strip() == "w10"
    pieces = task.cut(one, n - 9, "split")
    assert len(pieces) > 1 and all(len(p[0]) <= n - 9 for p in pieces)
    with_it = [p for p in pieces if not p[2][0] & SPAN_START]
    assert with_it and len(with_it) < len(pieces)
    for tokens, _, targets in with_it:
        a, b = (int(np.flatnonzero(targets & bit)[0]) for bit in (SPAN_START, SPAN_END))
        assert task.tokenizer.decode(tokens[a : b + 1]).strip() == "w10"
    assert sum(len(task.cut(one, n - 9, how)) for how in ("truncate_end", "truncate_prompt")) == 1
    assert task.cut(one, n - 9, "drop") == []


@pytest.mark.parametrize(
    "answers, message",
    [
        ({"text": ["c"], "answer_start": [0]}, "the answer 'c' is not at character 0 .* 'a' stand"),
        ({"text": ["c"], "answer_start": ["x"]}, "the answer 'c' is not at character 'x'"),
        ({"text": ["a"]}, "expected lists 'text' and 'answer_start'"),
        ("a", "field 'answers' is 'a', expected lists 'text' and 'answer_start'"),
        (["a"], "expected lists"),
    ],
)
def test_an_answer_that_is_not_where_it_should_be(answers, message):
    with pytest.raises(DataError, match=message):
        qa.ExtractiveQA(make_tokenizer()).examples([asked("a b", answers)], ["f:1"])


def test_a_masked_language_model_hides_no_special_token_and_takes_an_encoder(tmp_path):
    config = config_lib.get_default()
    every.CASES["masked_lm"][0](config, tmp_path)
    task = tasks.make(config, load_tokenizer(config))
    [one] = task.examples([{"text": "a film"}], ["f:1"])
    before, after = task.special_ends
    assert one.weights.sum() == len(one.tokens) - before - after
    assert isinstance(task, MaskedLM) and task.load_model(config.model).config.head == "vocabulary"
    config.model.path = every.model(tmp_path / "decoder")
    with pytest.raises(ConfigError, match="task='masked_lm' takes an encoder"):
        task.load_model(config.model)


@pytest.mark.slow
def test_an_export_of_a_regression_gives_numbers_in_their_own_units(tmp_path):
    config = config_lib.get_default()
    every.CASES["regression"][0](config, tmp_path)
    config.model.dtype, config.data.max_length = "float32", 64
    config.train.duration, config.optim.lr, config.eval.every = "40 steps", 1e-3, "0"
    result = train_lib.train(config, tmp_path / "run")
    before, after = (result[k]["losses"] for k in ("before", "after"))
    assert after["validation/mae"] < before["validation/mae"]
    assert after["validation/mae"] < 3 < np.std([100, 105]) * 2
    import sftjax

    model, params = sftjax.load_pretrained(tmp_path / "run" / "export")
    assert model.source.config["problem_type"] == "regression"
    task = tasks.make(config, load_tokenizer(config))
    source = open_source(config.data.validation)
    found = []
    for i in range(5):
        [one] = task.examples([source[i]], [source.where(i)])
        given = {"tokens": one.tokens[None], "segments": np.ones((1, len(one.tokens)), np.int32)}
        hidden = model.hidden(params, given)
        logits = model.class_logits(params, hidden, segments=given["segments"])
        found.append(float(logits[0, 0, 0]))
    assert all(95 < x < 112 for x in found)
    # A run that begins with this head goes on in the same units.
    config.model.path, config.model.init = str(tmp_path / "run" / "export"), "pretrained"
    config.train.duration, config.train.export = "1 steps", False
    again = train_lib.train(config, tmp_path / "again")
    for name in ("mae", "rmse"):
        value = again["before"]["losses"][f"validation/{name}"]
        assert value == pytest.approx(after[f"validation/{name}"], rel=1e-3)


@pytest.mark.parametrize("body, mean", [(every.BERT, 100.0), (None, 0.0)], ids=["bert", "decoder"])
def test_an_export_loses_no_mean_that_its_head_cannot_hold(tmp_path, body, mean):
    """A decoder's head has no bias: its numbers are divided by the deviation alone."""
    config = config_lib.get_default()
    every.CASES["regression"][0](config, tmp_path)
    config.model.path = every.model(tmp_path / "body", body)
    task = tasks.make(config, load_tokenizer(config))
    model = task.load_model(config.model)
    task.saw([{"numbers": [10, 1000.0, 100_040.0]}])  # mean 100, standard deviation 2
    state = params_lib.init(model.state, jax.random.key(0))
    assert (float(state["mean"]), float(state["std"])) == (mean, pytest.approx(2.0))
    params = params_lib.init(model.abstract, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(1, 1, model.config.width)).astype(np.float32)
    given = model.class_logits(params, x) * state["std"] + state["mean"]
    exported = model.class_logits(task.exported(params, state), x)
    np.testing.assert_allclose(exported, given, rtol=1e-5)
