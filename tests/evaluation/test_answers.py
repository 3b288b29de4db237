"""Answers by generation: examples before a question, scores, and the best model by them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_chat import PLAIN, TOKENIZER, assistant, system, user
from test_train import files, lines, make  # noqa: F401 (files is a fixture)

from sftjax import config as config_lib
from sftjax import evaluate, parallel, tasks
from sftjax import train as train_lib
from sftjax.data import open_source
from sftjax.data.masking.question import Question, continuations, question
from sftjax.errors import ConfigError
from sftjax.evaluation.answers import Asking, answered, with_choices
from sftjax.evaluation.likelihood import log_likelihoods
from sftjax.evaluation.sets import Sets
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.reports.status import status
from sftjax.tasks.causal_lm import CausalLM

REPO = Path(__file__).resolve().parents[2]
PAIR = {"prompt": "what is two? ", "completion": "four"}


def test_examples_are_turns_before_the_question():
    shots = [PAIR, {"messages": [system("not this"), user("the cat"), assistant("sat")]}]
    record = {"messages": [system("be short"), user("the mat"), assistant("on")]}
    asked, _ = question(record, TOKENIZER, shots=shots)
    whole = [system("be short"), user(PAIR["prompt"]), assistant("four")]
    whole += [user("the cat"), assistant("sat"), user("the mat")]
    expected = TOKENIZER.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(asked.prompt) == asked.text == expected and asked.answer == "on"
    assert asked.asked == "the mat" and asked.lead == 0


def test_examples_of_texts_stand_apart():
    asked, _ = question(PAIR, PLAIN, shots=[{"prompt": "the cat ", "completion": "sat"}])
    # The blank before the answer is one token with it.
    assert PLAIN.decode(asked.prompt) == "the cat sat\n\nwhat is two?" and asked.answer == "four"
    assert asked.asked == "what is two? "


def test_an_answer_to_a_text_ends_before_a_next_example(monkeypatch):
    task = CausalLM(PLAIN)
    asked = task.questions(Listed([PAIR]), lambda i, record: [PAIR])
    said = PLAIN("\n four\n\nwhat is", add_special_tokens=False).input_ids
    monkeypatch.setattr("sftjax.evaluation.generation.generate", lambda *_, **__: [said])
    assert task.answers(None, None, asked)["answers"] == ["four"]
    assert task.questions(Listed([PAIR])) and not task.cut_at


def asks(answer, asked="the cat", choices=()):
    return Question(np.array([5]), answer, asked, asked, 0, (), choices)


class Listed(list):
    def where(self, i):
        return f"file:{i + 1}"


def sets_of(config, tmp_path):
    task = tasks.make(config, load_tokenizer(config))
    return Sets(config, task, tmp_path / "cache", parallel.make_mesh({"fsdp": -1}))


def test_examples_are_drawn_by_the_seed_from_training_rows(files, tmp_path):  # noqa: F811
    train = [json.loads(x) for x in (files / "train.jsonl").read_text().splitlines()]
    drawn = []
    for seed in (0, 0, 1):
        sets = sets_of(make(files, eval__shots=4, seed=seed), tmp_path)
        sets.records = [open_source(str(files / "train.jsonl"))]
        drawn.append(sets.shots())
    first, again, other = ([d(i, {}) for i in range(20)] for d in drawn)
    assert first == again != other and first[0] != first[1]
    assert all(len(shots) == 4 and all(x in train for x in shots) for shots in first)
    assert all(len({json.dumps(x) for x in shots}) == 4 for shots in first)
    assert sets_of(make(files), tmp_path).shots() is None
    with pytest.raises(ConfigError, match=r"eval.shots=4 takes its examples from data.train"):
        sets_of(make(files, eval__shots=4, data__train=""), tmp_path).shots()
    for i in range(20):  # a question is no example of itself
        own = drawn[0](i, first[i][0])
        assert len(own) == 4 and first[i][0] not in own
    sets.config.eval.shots = 200
    with pytest.raises(ConfigError, match=r"eval.shots=200: data.train has 200 rows, and takes"):
        sets.shots()


def test_answers_that_are_labels_have_a_confusion_matrix(monkeypatch):
    wanted = ["good", "bad"] * 6
    said = ["good"] * 11 + ["the film"]
    task = CausalLM(TOKENIZER, asking=Asking(("exact_match", "token_f1")))
    tokens = [TOKENIZER(text, add_special_tokens=False).input_ids for text in said]
    monkeypatch.setattr("sftjax.evaluation.generation.generate", lambda *_, **__: tokens)
    found = task.answers(None, None, [asks(text) for text in wanted])
    assert found["exact_match"] == 0.5 and found["no_label"] == pytest.approx(1 / 12)
    # good: precision 6/11, recall 6/6; bad: none is found
    assert found["f1"] == pytest.approx((2 * 6 / 17) / 2)
    assert found["tables"]["confusion"] == {"labels": ["bad", "good"], "rows": [[0, 5], [0, 6]]}
    assert found["baselines"]["always good"]["exact_match"] == 0.5
    assert found["errors"]["exact_match"] == pytest.approx((0.25 / 11) ** 0.5)
    assert found["rows"]["exact_match"].tolist() == [1.0, 0.0] * 5 + [1.0, 0.0]
    many = [asks(str(i)) for i in range(12)]
    assert "f1" not in task.answers(None, None, many)


def test_several_draws_count_as_one_row_each(monkeypatch):
    said = ["four", "four", "two", "four", "two", "two"]
    tokens = [TOKENIZER(text, add_special_tokens=False).input_ids for text in said]
    monkeypatch.setattr("sftjax.evaluation.generation.generate", lambda *_, **__: tokens)
    asked = [asks("four"), asks("two"), asks("two")]
    found = CausalLM(TOKENIZER, asking=Asking(draws=2)).answers(None, None, asked)
    assert found["exact_match"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["rows"]["exact_match"].tolist() == [1.0, 0.5, 1.0]
    assert found["answers"] == [["four", "four"], ["two", "four"], ["two", "two"]]
    rows = np.array([1.0, 0.5, 1.0]) - 2.5 / 3
    assert found["errors"]["exact_match"] == pytest.approx(np.sqrt((rows**2).sum()) / 3)


def test_groups_widen_an_error(monkeypatch):
    said = ["four"] * 6 + ["two"] * 6
    tokens = [TOKENIZER(text, add_special_tokens=False).input_ids for text in said]
    monkeypatch.setattr("sftjax.evaluation.generation.generate", lambda *_, **__: tokens)
    task, asked = CausalLM(TOKENIZER), [asks("four")] * 12
    alone = task.answers(None, None, asked)["errors"]["exact_match"]
    shared = task.answers(None, None, asked, [i // 3 for i in range(12)])["errors"]["exact_match"]
    assert alone == pytest.approx((0.25 / 11) ** 0.5)
    assert shared == pytest.approx((4 * 1.5**2) ** 0.5 / 12)


def test_what_was_asked_is_a_baseline_of_metrics_of_overlap(monkeypatch):
    monkeypatch.setattr("sftjax.evaluation.generation.generate", lambda *_, **__: [[5], [5]])
    text = "The cat sat. It saw a mat! Was it two? It was four."
    asked = [asks("The cat sat.", text), asks("It saw a mat", text)]
    task = CausalLM(TOKENIZER, asking=Asking(("token_f1",)))
    found = task.answers(None, None, asked)["baselines"]
    assert set(found) == {"copy", "lead-3"}
    # "a" and "the" do not count: "cat sat" of 11 words, "it saw mat" of them; of 8 in the lead.
    assert found["copy"]["token_f1"] == pytest.approx((4 / 13 + 6 / 14) / 2)
    assert found["lead-3"]["token_f1"] == pytest.approx((4 / 10 + 6 / 11) / 2)
    assert not CausalLM(TOKENIZER).answers(None, None, asked)["baselines"]


def test_log_likelihoods_are_sums_of_log_probabilities():
    model = tiny.model()
    params = tiny.params(model)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 60, n), rng.integers(1, 60, m)) for n, m in [(1, 3), (70, 2), (5, 9)]]
    sums, greedy = log_likelihoods(model, params, pairs, batch_size=2)
    for (context, rest), found in zip(pairs, sums, strict=True):
        logits = model.apply(params, {"tokens": np.array([[*context, *rest]], np.int32)})[0]
        right = jax.nn.log_softmax(logits)[len(context) - 1 : -1]
        assert found == pytest.approx(float(right[np.arange(len(rest)), rest].sum()), rel=1e-5)
    assert not greedy.any()
    best = int(np.argmax(logits[len(context) - 1]))
    assert log_likelihoods(model, params, [(context, [best])])[1].all()


def test_a_choice_is_the_likeliest_text(monkeypatch):
    texts = ["two", "four", "the cat"]
    asked = [asks("four", "what is two? ", texts), asks("two", "what is two? ", texts[:2])]
    asked = [q._replace(prompt=np.array([7]), lead=1) for q in asked]
    seen = []

    def likely(model, params, pairs, **options):
        seen.extend(pairs)
        return np.array([-2.0, -1.0, -9.0, -2.0, -1.0]), None

    monkeypatch.setattr("sftjax.evaluation.answers.log_likelihoods", likely)
    found = answered(None, None, asked, Asking(("choice",)), PLAIN)
    assert found["choice"] == 0.5 and found["answers"] == ["four", "four"]
    assert found["errors"]["choice"] == 0.5 and found["rows"]["choice"].tolist() == [1.0, 0.0]
    assert [PLAIN.decode(before[1:]) for before, _ in seen] == ["what is two?"] * 5
    assert [PLAIN.decode(after).strip() for _, after in seen] == texts + texts[:2]
    ended = continuations(PLAIN, asked[1]._replace(ends=[3]))
    assert [after[-1] for _, after in ended] == [3, 3] and ended[0][1][:-1] == seen[3][1]
    assert continuations(PLAIN, asked[1]) == seen[3:]


def test_choices_come_from_a_field_or_are_all_references():
    asked = [asks("yes"), asks("no"), asks("yes ")]
    wheres = ["f:1", "f:2", "f:3"]
    found = with_choices(asked, Asking(("choice",)), [], wheres)
    assert [q.choices for q in found] == [["no", "yes"]] * 3
    found = with_choices([asks(" yes"), asks(" no")], Asking(("choice",)), [], wheres)
    assert [q.choices for q in found] == [[" no", " yes"]] * 2  # as they are trained
    with pytest.raises(ConfigError, match="name a field that lists each row's candidates"):
        with_choices([asks(str(i)) for i in range(21)], Asking(("choice",)), [], wheres)
    own = Asking(("choice",), choices="options")
    found = with_choices(asked[:1], own, [["maybe", "yes"]], wheres[:1])
    assert found[0].choices == ["maybe", "yes"]
    for wrong in (["yes"], "yes no", ["maybe", "no"], {"yes": 1}, ["yes", ""]):
        with pytest.raises(ConfigError, match=r"f:1: eval.choices='options' is .*'yes' among them"):
            with_choices(asked[:1], own, [wrong], wheres[:1])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(draws=2), r"eval.draws=2: with generate.temperature=0 all of them are equal"),
        (dict(metrics=()), r"eval.metrics is empty; name one metric of answers or more"),
        (dict(answer="####"), r"eval.answer='####' is of the metric 'number', which eval.metrics"),
        (dict(choices="options"), r"eval.choices='options' is of the metric 'choice'"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(files, changes, message):  # noqa: F811
    config = make(files, **{f"eval__{k}": v for k, v in changes.items()})
    with pytest.raises(ConfigError, match=message):
        tasks.make(config, load_tokenizer(config))


def test_a_choice_is_not_drawn(files):  # noqa: F811
    config = make(files, eval__draws=2, eval__metrics=("choice",), generate__temperature=1.0)
    with pytest.raises(ConfigError, match="eval.draws=2: choice draws nothing"):
        tasks.make(config, load_tokenizer(config))


@pytest.mark.parametrize("key, value", [("shots", 2), ("draws", 3), ("metrics", ("bleu",))])
def test_a_task_that_generates_nothing_has_no_answers_to_measure(key, value):
    config = config_lib.get_default()
    config.task = str(REPO / "experiments/custom_task/task.py") + ":Regression"
    config.eval[key] = value
    with pytest.raises(ConfigError, match=rf"eval.{key}=.* is of answers that are generated, and"):
        tasks.make(config, None)


def test_a_set_called_answers_and_one_called_test(files, tmp_path):  # noqa: F811
    text = (files / "train.jsonl").read_text()
    for name in ("answers", "test"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    sets = sets_of(make(files), tmp_path)
    with pytest.raises(ConfigError, match="a set called 'answers' would stand under the name"):
        sets.open(str(tmp_path / "answers.jsonl"), "")
    sets.config.eval.test_limit = 3
    sets.open(str(tmp_path / "test.jsonl"), str(tmp_path / "test.jsonl"))
    rows = {name: facts["rows"] for name, facts in sets.facts["evaluation"].items()}
    assert rows == {"test": 200, "answers": 3}


@pytest.mark.slow
def test_examples_without_a_question_are_refused(files, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="eval.shots=2 stand before questions, and data.test"):
        train_lib.train(make(files, eval__shots=2, data__test=""), tmp_path / "run")


@pytest.mark.slow
def test_the_best_model_by_its_answers(files, tmp_path, capfd):  # noqa: F811
    best = dict(eval__best="answers/token_f1", eval__metrics=("exact_match", "token_f1"))
    config = make(files, **best, eval__patience=2, eval__shots=1, train__keep=1)
    result = train_lib.train(config, tmp_path / "run")
    measured = {x["step"]: x["answers/token_f1"] for x in lines(tmp_path / "run") if "lr" not in x}
    assert set(measured) == {6, 12} and "testing 6/6" in capfd.readouterr().err
    kept = status(tmp_path / "run")["checkpoints"]
    assert kept["best"] == max(measured, key=lambda step: (measured[step], step))
    run = [f"--model={tmp_path / 'run'}", f"--data={config.data.test}", "--step=best", "--json"]
    evaluate.main(run)
    found = json.loads(capfd.readouterr().out)
    assert found["step"] == kept["best"] and found["n"] == 6
    assert found["metrics"]["token_f1"] == measured[kept["best"]]
    assert set(result["after"]["errors"]) >= {"answers/token_f1", "answers/exact_match"}


def test_a_metric_of_answers_that_is_not_there(files, tmp_path):  # noqa: F811
    config = make(files, eval__best="answers/rouge1")
    with pytest.raises(ConfigError, match=r"eval.best='answers/rouge1' is not measured; there is"):
        train_lib.train(config, tmp_path)
