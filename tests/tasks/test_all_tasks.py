"""What every task inherits, asked of all of them: schema, resumption, meshes, bad records, export.

A new row of TASKS needs a case here; `test_every_task_has_a_case` says so.
"""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from inspecting import inspect
from picturing import LLAVA, RESNET, SIGLIP, VIT, squares
from test_reports import check_self_contained
from transformers import AutoTokenizer

import sftjax
from sftjax import config as config_lib
from sftjax import evaluate, optim, parallel, tasks
from sftjax import train as train_lib
from sftjax.data import DataError, open_source
from sftjax.errors import DivergenceError, Stopped
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.plan import compile as plan
from sftjax.plan import hardware as targets
from sftjax.reports.run import number
from sftjax.reports.status import status
from sftjax.training import build
from sftjax.training import data as feed_lib
from sftjax.training.stops import Stop

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = REPO / "experiments" / "quickstart"
CUSTOM = REPO / "experiments" / "custom_task"
WORDS = {"good": ("fine", "glad", "warm"), "bad": ("dull", "sour", "cold")}
LABELS = tuple(WORDS)
LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
BERT = dict(
    model_type="bert", architectures=["BertModel"], vocab_size=512, hidden_size=32,
    intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
    hidden_dropout_prob=0.1, initializer_range=0.1,
)  # fmt: skip


def model(where, config=None):
    """A tiny random model's directory, with the quickstart's tokenizer."""
    where.mkdir()
    for file in (QUICKSTART / "base_model").iterdir():
        if file.suffix != ".safetensors":
            (where / file.name).write_bytes(file.read_bytes())
    own = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config or own | LLAMA))
    return str(where)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def reviews(n, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = LABELS[rng.integers(2)]
        words = [WORDS[label][rng.integers(3)], *rng.choice(["a", "film", "of", "day"], i % 9 + 1)]
        rows.append({"text": " ".join(words), "label": label, "extra": i})
    return rows


def causal(c, where):
    c.model.path, c.model.init = model(where / "model"), "random"
    for name, n in {"train": 60, "validation": 21, "test": 3}.items():
        lines = (QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines()[:n]
        c.data[name] = write(where / f"{name}.jsonl", map(json.loads, lines))


def classes(c, where, config=None):
    c.task, c.data.labels = "classification", LABELS
    c.model.path, c.model.init = model(where / "model", config), "random"
    c.data.train = write(where / "train.jsonl", reviews(120))
    c.data.validation = write(where / "validation.jsonl", reviews(21, seed=1))


def custom(c, where):
    c.task = f"{CUSTOM / 'task.py'}:Regression"
    rng = np.random.default_rng(0)
    for name, n in {"train": 60, "validation": 11}.items():
        x = rng.normal(size=(n, 10))
        rows = [dict(features=f.tolist(), target=f[:3].sum(), extra=0) for f in x]
        c.data[name] = write(where / f"{name}.jsonl", rows)


def of_reviews(c, where, task, change, **data):
    """A task that reads the reviews, each changed into a record of its own."""
    c.task = task
    c.model.path, c.model.init = model(where / "model", BERT), "random"
    c.data.tokenizer = masking(where)
    c.data.update(data)
    for name, n in {"train": 120, "validation": 21}.items():
        rows = [change(row, i) | {"extra": i} for i, row in enumerate(reviews(n, seed=n))]
        c.data[name] = write(where / f"{name}.jsonl", rows)


def masking(where):
    """The quickstart's tokenizer, with a mask and the special tokens of a BERT."""
    tokenizer = AutoTokenizer.from_pretrained(model(where / "tokenizer"))
    tokenizer.mask_token = tokenizer.eos_token
    tokenizer.save_pretrained(where / "tokenizer")
    return str(where / "tokenizer")


def several(row, i):
    return {"text": row["text"], "label": [row["label"]] * (i % 3 > 0) + ["long"] * (i % 9 > 4)}


def numbers(row, i):
    return {"text": row["text"], "label": 100.0 + 5 * (row["label"] == "good") + i % 3}


def tagged(row, i):
    words = row["text"].split()
    return {
        "tokens": words,
        "tags": ["B-x" if w in sum(WORDS.values(), ()) else "O" for w in words],
    }


def asked(row, i):
    word, context = row["text"].split()[0], f"day {row['text']}"
    answers = {"text": [word], "answer_start": [4]} if i % 5 else {"text": [], "answer_start": []}
    return {"question": "Which?", "context": context, "answers": answers}


def spans(c, where):
    of_reviews(c, where, f"{REPO / 'experiments' / 'xquad' / 'task.py'}:ExtractiveQA", asked)
    rows = [asked(row, i) | {"extra": i} for i, row in enumerate(reviews(7, seed=2))]
    c.data.test = write(where / "test.jsonl", rows)
    c.eval.metrics = ("squad_em", "token_f1")


T5 = dict(
    model_type="t5", architectures=["T5ForConditionalGeneration"], vocab_size=512, d_model=32,
    d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.1, pad_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
)  # fmt: skip


def pairs(c, where):
    """Sources of several words, and their first word as the target."""
    c.task, c.data.max_target_length = "seq2seq", 24
    c.model.path, c.model.init = model(where / "model", T5), "random"
    for name, n in {"train": 200, "validation": 21, "test": 3}.items():
        rows = [{"text": r["text"], "target": r["text"].split()[0]} for r in reviews(n, seed=n)]
        c.data[name] = write(where / f"{name}.jsonl", [r | {"extra": 1} for r in rows])


def images(c, where, config=RESNET):
    """Squares that are brighter on one side, as data URLs."""
    c.task, c.data.labels, c.data.augment = "image_classification", LABELS, ("crop", "mixup")
    c.model.path, c.model.init = str(where / "model"), "random"
    (where / "model").mkdir()
    (where / "model" / "config.json").write_text(json.dumps(config))
    for name, n in {"train": 120, "validation": 21}.items():
        rows = [{"image": url, "label": LABELS[i % 2], "extra": i} for i, url in enumerate(squares(n))]
        c.data[name] = write(where / f"{name}.jsonl", rows)


def pictures(c, where):
    """A question about a square, and some without one; the reserved token is an image's."""
    c.task, c.model.path, c.model.init = "image_text", model(where / "model"), "random"
    own = json.loads((where / "model" / "config.json").read_text())
    token = AutoTokenizer.from_pretrained(where / "model").convert_tokens_to_ids("<|reserved_0|>")
    own = LLAVA | dict(text_config=own, vision_config=SIGLIP, image_token_index=token)
    (where / "model" / "config.json").write_text(json.dumps(own))
    for name, n in {"train": 120, "validation": 21, "test": 3}.items():
        rows = []
        for i, url in enumerate(squares(n)):
            mark, images = ("", []) if i % 5 == 4 else ("<image>", [url])
            said = [("user", f"{mark} which?"), ("assistant", LABELS[i % 2])]
            rows.append({"messages": [dict(role=r, content=x) for r, x in said], "images": images, "extra": i})
        c.data[name] = write(where / f"{name}.jsonl", rows)


# case -> (what it sets in a config, a record that is none, what the error names)
CASES = {
    "multi_label": (
        functools.partial(of_reviews, task="multi_label", change=several, labels=(*LABELS, "long")),
        {"text": "a", "label": ["odd"]},
        "odd",
    ),
    "regression": (
        functools.partial(of_reviews, task="regression", change=numbers),
        {"text": "a", "label": "nan"},
        "label",
    ),
    "token_labels": (
        functools.partial(of_reviews, task="token_labels", change=tagged, labels=("O", "B-x")),
        {"tokens": ["a", "b"], "tags": ["O"]},
        "2 words, and 1 labels",
    ),
    "custom, of spans": (
        spans,
        {"question": "a", "context": "b", "answers": [{"text": "c", "answer_start": 0}]},
        "'c'",
    ),
    "masked_lm": (
        functools.partial(of_reviews, task="masked_lm", change=lambda row, i: {"text": row["text"]}),
        {"text": " "},
        "text",
    ),
    "seq2seq": (pairs, {"text": "", "target": "a"}, "text"),
    "image_classification": (images, {"image": "no.png", "label": "bad"}, "no.png is not there"),
    "image_classification vit": (
        functools.partial(images, config=VIT),
        {"image": "data:image/png;base64,AAAA", "label": "bad"},
        "the image cannot be read",
    ),
    "image_text": (pictures, {"prompt": "<image> a", "completion": "b"}, "a place for image 1"),
    "causal_lm": (causal, {"prompt": "a", "completion": ""}, "completion"),
    "classification": (classes, {"text": "a", "label": "odd"}, "odd"),
    "classification bert": (functools.partial(classes, config=BERT), {"label": "bad"}, "text"),
    "custom": (custom, {"features": [1], "target": 0.0}, "features"),
}


# As the others go, so do these.
SLOW = tuple("multi_label masked_lm regression token_labels classification".split())
SLOW += ("custom, of spans", "image_classification vit", "image_text")
# And what these show besides, their own tests do.
LONG = ("masked_lm", "multi_label", "token_labels", "custom, of spans")
LONG += ("image_classification vit",)
MARKS = {x: pytest.mark.long if x in LONG else pytest.mark.slow for x in SLOW}
PARAMS = [pytest.param(x, marks=MARKS[x]) if x in MARKS else x for x in CASES]


@pytest.fixture(scope="module", params=PARAMS)
def case(request, tmp_path_factory):
    """(name, config): six steps of eight rows, a checkpoint after every third."""
    where = tmp_path_factory.mktemp("case")
    c = config_lib.get_default()
    c.model.dtype, c.data.max_length = "float32", 64
    c.train.batch_size = c.eval.batch_size = 8
    c.train.duration, c.train.log_every, c.train.checkpoint_every = "6 steps", "1", "3 steps"
    c.optim.lr, c.optim.warmup, c.eval.every = 3e-3, "0 steps", "3 steps"
    c.generate.max_new_tokens = 2
    CASES[request.param][0](c, where)
    return request.param, c


@pytest.fixture(scope="module")
def ran(case, tmp_path_factory):
    """(workdir, result) of the whole run."""
    workdir = tmp_path_factory.mktemp("ran") / "run"
    return workdir, train_lib.train(case[1], workdir)


def make(config):
    return tasks.make(config, load_tokenizer(config))


def test_every_task_has_a_case():
    assert {name.split()[0] for name in CASES} - {"custom", "custom,"} == set(tasks.TASKS)


def test_batches_are_as_the_spec_says(case, tmp_path):
    config, task = case[1], make(case[1])
    feed = feed_lib.Feed(config, task, tmp_path, parallel.make_mesh({"fsdp": -1}))
    spec = feed.spec(8, 64)
    for batch in (next(feed.batches(0)), next(feed.eval_batches(feed.sets["validation"]))):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (f.shape, np.dtype(f.dtype)) for k, f in spec.items()
        }
        assert all(len(f.axes) == len(f.shape) and f.axes[0] == "batch" for f in spec.values())
    abstract = feed.abstract_batch()
    assert {k: (v.shape, v.sharding) for k, v in abstract.items()} == {
        k: (v.shape, v.sharding) for k, v in next(feed.batches(0)).items()
    }


def losses(workdir):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: (x["loss"], x["grad_norm"]) for x in lines if "loss" in x}


def test_what_is_measured_is_what_the_task_promises(case, ran):
    task, result = make(case[1]), ran[1]
    assert set(result["after"]["losses"]) >= {f"validation/{k}" for k in ("loss", *task.metrics)}
    assert json.loads((ran[0] / "result.json").read_text())["after"]["losses"]
    logged = {k for x in (ran[0] / "metrics.jsonl").read_text().splitlines() for k in json.loads(x)}
    assert logged >= {f"{k}_per_s" for k in task.counts}
    assert all(np.isfinite(v).all() for v in losses(ran[0]).values())


def test_a_run_cut_off_resumes_bit_equal(case, ran, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(ran[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    again = train_lib.train(case[1], workdir)
    assert losses(workdir) == losses(ran[0])
    assert again["after"] == ran[1]["after"]


def test_evaluate_measures_a_checkpoint_as_the_run_did(case, ran, capsys):
    config, (workdir, result) = case[1], ran
    evaluate.main([f"--model={workdir}", f"--data={config.data.validation}", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = Path(config.data.validation).read_text().count("\n")
    assert (found["n"], found["step"]) == (rows, 6)
    for name, value in result["after"]["losses"].items():
        assert found["metrics"][name.removeprefix("validation/")] == pytest.approx(value, abs=1e-12)


def test_the_report_and_the_card_hold_what_was_measured(case, ran):
    workdir, result = ran
    page = check_self_contained((workdir / "report.html").read_text(), pictures=True)
    text = " ".join(page.texts)
    for name, value in result["after"]["losses"].items():
        assert name in text and number(name, value) in text
    assert f"--workdir={workdir}" in text and "jax" in text and "img" in page.tags
    rows = result["after"].get("rows", {})
    for name, found in rows.items():
        lengths = {len(v) for key, v in found.items() if key != "about"}
        assert lengths == {result["after"]["n"][name]} and found["about"]["of"]
    if rows:
        assert json.loads((workdir / "rows.json").read_text()) == rows
    if not (workdir / "export").exists():
        return
    card = ModelCard.load(workdir / "export" / "README.md")
    assert card.data.tags == ["sftjax", "sft"]
    for name, value in result["after"]["losses"].items():
        assert re.search(rf"{name} .*{re.escape(number(name, value))}", card.text)


class Asked(Stop):
    """A run that is asked to stop while it does its fourth step."""

    def due(self, step):
        if step == 4:
            self.ask("SIGTERM")
        return super().due(step)


@pytest.mark.slow
def test_a_stopped_run_with_a_damaged_checkpoint_resumes_bit_equal(case, ran, tmp_path, caplog):
    workdir = tmp_path / "run"
    with pytest.raises(Stopped, match="by SIGTERM after step 4 of 6"):
        train_lib.train(case[1], workdir, Asked())
    found = status(workdir)
    assert (found["state"], found["checkpoints"]["steps"]) == ("stopped", [3, 4])
    largest = max((workdir / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    again = train_lib.train(case[1], workdir)
    assert "checkpoints/4 is damaged" in caplog.text.replace(str(workdir) + "/", "")
    assert losses(workdir) == losses(ran[0])
    assert again["after"] == ran[1]["after"]


@pytest.mark.slow
@pytest.mark.parametrize("name, lr", [("adamw", 1e30), pytest.param("sgd", 1e25, marks=pytest.mark.long)])
def test_a_run_that_diverges_is_an_error_and_exports_nothing(case, tmp_path, name, lr):
    config = case[1].copy_and_resolve_references()
    config.optim.name, config.optim.lr = name, lr
    with pytest.raises(DivergenceError, match="is not finite in"):
        train_lib.train(config, tmp_path)
    assert not (tmp_path / "export").exists() and not (tmp_path / "result.json").exists()
    found = [json.loads(x) for x in (tmp_path / "suspects.jsonl").read_text().splitlines()]
    read = {str(config.data.train)}
    assert found and {p.rpartition(":")[0] for x in found for p in x["documents"]} == read
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(case, tmp_path):
    config, found = case[1].copy_and_resolve_references(), []
    config.optim.name = "sgd"  # Adam would make a step of the noise of a gradient that is 0
    for devices in (1, 8):
        task = make(config)
        mesh = parallel.make_mesh({"fsdp": -1}, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            feed = feed_lib.Feed(config, task, tmp_path, mesh)
            net, trainable = build.make_model(config, task)
            lr = build.make_schedule(config.optim, 6)
            tx = optim.make(config.optim, lr, net.abstract, trainable)
            target = build.abstract_state(config.model, net, trainable, tx, mesh)
            state = build.first_state(config.model, net, trainable, tx, target, mesh)
            loss_fn = task.loss_fn(net, config.loss.to_dict())
            step = functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx)
            run, some = jax.jit(step), []
            for _, batch in zip(range(2), feed.batches(0), strict=False):
                state, metrics = run(state, batch)
                some += [float(metrics["loss"]), float(metrics["grad_norm"])]
            some += [float(np.abs(x).sum()) for x in jax.tree.leaves(state.model_state)]
        found.append(some)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


def test_a_bad_record_is_refused_by_file_row_and_field(case, tmp_path):
    name, config = case
    task, (_, record, names) = make(config), CASES[name]
    path = write(tmp_path / "bad.jsonl", [record])
    source = open_source(path)
    with pytest.raises(DataError, match=names) as error:
        task.examples([source[0]], [source.where(0)])
    assert str(error.value).startswith(f"{path}:1: ")


def test_a_stream_has_documents_or_is_refused(case, tmp_path):
    config = config_lib.ConfigDict(case[1].to_dict())
    config.data.streaming, config.train.duration = True, "2 steps"
    mesh = parallel.make_mesh(dict(data=1), jax.devices()[:1])
    if case[0] == "image_text" or not hasattr(make(case[1]).layout, "document"):
        with pytest.raises(config_lib.ConfigError, match="data.streaming"):
            feed_lib.Feed(config, make(config), tmp_path, mesh)
        return
    task = make(config)
    batch = next(iter(feed_lib.Feed(config, task, tmp_path, mesh).batches(0)))
    assert set(task.layout.spec(1, 8)) <= set(batch)
    assert float(batch["weights"].sum()) > 0


def test_fields_that_are_read_are_known(case):
    task, source = make(case[1]), open_source(case[1].data.train)
    read = task.fields_read(source[0])
    assert read and read < set(source[0])
    left = {k: v for k, v in source[0].items() if k in read}
    pairs = task.examples([source[0], left], ["a:1", "a:2"])
    for a, b in zip(*(e.arrays for e in pairs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_plan_and_inspect_work(case, capsys):
    config = case[1]
    text = inspect(config, n=2, color=False)
    assert str(config.data.train) in text
    if config.model.path:
        found = plan.plan(config, targets.resolve("here"))
        assert found.total > 0 and found.hardware_flops > 0


@pytest.mark.slow
def test_the_export_is_measured_as_the_run_was_or_said_to_be_missing(case, ran, capsys):
    config, export = case[1], ran[0] / "export"
    if not config.model.path:
        assert not export.exists()
        return
    data = f"--data={config.data.validation}"
    same = ["--config.data.max_length=64", "--config.generate.max_new_tokens=2"]
    same += [f"--config.task={config.task}"] * (":" in config.task)
    evaluate.main([f"--model={export}", data, "--json", *same])
    found = json.loads(capsys.readouterr().out)["metrics"]
    values = dict(ran[1]["after"]["losses"])
    if config.task == "regression":  # an export's loss is in the numbers' own units
        del values["validation/loss"]
    for name, value in values.items():
        assert found[name.removeprefix("validation/")] == pytest.approx(value, rel=1e-5), name


def test_nobody_asks_for_a_task_by_name():
    """The run, the evaluator, the planner and the report ask the task, never its name."""
    names = "|".join([*tasks.TASKS, "CausalLM", "Classification"])
    branch = re.compile(rf"(==|!=|\bin\b|isinstance).*\b({names})\b|config\.task\b(?!\))")
    for file in (REPO / "sftjax").rglob("*.py"):
        if "tasks" not in file.parts:
            for n, line in enumerate(file.read_text().splitlines(), 1):
                assert not branch.search(line), f"{file}:{n}: {line}"


@pytest.mark.parametrize(
    "name, message",
    [
        ("causal_ml", "did you mean 'causal_lm'"),
        ("nowhere.py:Task", "nowhere.py is no Python file, NAME.py, that is there"),
        (f"{CUSTOM.parents[1] / 'README.md'}:Task", "README.md is no Python file"),
        (f"{CUSTOM / 'task.py'}:Nothing", "no class Nothing derived from sftjax.tasks.Task"),
    ],
)
def test_a_task_that_is_not_there(name, message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        tasks.find(name)
