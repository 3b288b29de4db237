"""Texts with images: forms of records, errors, cuts, batches, questions."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny
from image_records import MARKER, MOST, TOKEN, chat, counted, file, make, turn, url, write

from sftjax import config as config_lib
from sftjax import generate, hf, tasks
from sftjax import params as params_lib
from sftjax.config import ConfigError
from sftjax.data import DataError, Rows, build_store, open_source
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.training import build

# ---- forms of records ----------------------------------------------------------------------


def forms(base):
    """One record in many forms: an image, a question, an image, a question; only the last line has other words."""
    a, b = "0.png", "1.png"
    text = [{"type": "text", "text": "which?"}]
    say = lambda content: {"messages": [turn("user", content), turn("assistant", "cat")]}  # noqa: E731
    return {
        "marks in a text": chat("<image>which?<image>", a, b),
        "data URLs": chat("<image>which?<image>", url(base, 0), url(base, 1)),
        "bytes as datasets has them": chat(
            "<image>which?<image>", {"bytes": file(base, 0), "path": None}, {"bytes": None, "path": b}
        ),
        "parts whose images are listed": say([{"type": "image"}, *text, {"type": "image"}]) | {"images": [a, b]},
        "parts with paths": say([{"type": "image", "image": a}, *text, {"type": "image", "url": b}]),
        "parts with URLs": say(
            [
                {"type": "image_url", "image_url": {"url": url(base, 0)}},
                *text,
                {"type": "input_image", "image_url": url(base, 1)},
            ]
        ),
        "a part and a mark": say([{"type": "image", "path": a}, {"type": "text", "text": "which?<image>"}])
        | {"images": [b]},
        "a pair": {"prompt": "<image>which?<image>", "completion": "cat", "images": [a, b]},
        "a pair of messages": {
            "prompt": [turn("user", "<image>which?<image>")],
            "completion": [turn("assistant", "cat")],
            "images": [a, b],
        },
        "from and value": {
            "conversations": [
                {"from": "human", "value": "<image>which?<image>"},
                {"from": "gpt", "value": "cat"},
            ],
            "images": [a, b],
        },
        "instruction": {"instruction": "<image>which?<image>", "output": "cat", "images": [a, b]},
        "with a type of its own": chat("<image>which?<image>", a, b) | {"type": "image", "meta": {"type": "image"}},
    }


def test_forms_of_records_are_one_example(base, config):
    task, found = make(config), {}
    for name, record in forms(base).items():
        [found[name]] = task.examples([record], [f"{base}/data.jsonl:1"])
    for name, e in found.items():
        assert e.images == [file(base, 0), file(base, 1)], name
        np.testing.assert_array_equal(e.tokens, found["marks in a text"].tokens, err_msg=name)
        assert e.text == f"<bos><|user|>{MARKER}which?{MARKER}<|end|>\n<|assistant|>cat<|end|>\n", name
        assert e.tokens[2:6].tolist() == [TOKEN] * MOST and (e.tokens == TOKEN).sum() == 2 * MOST
        assert not e.weights[e.tokens == TOKEN].any()
        assert task.tokenizer.decode(e.tokens[e.weights > 0]) == "cat<|end|>"
        assert e.image[[1, 2, 5, 6]].tolist() == [0, 1, 1, 0] and sorted(set(e.image)) == [0, 1, 2]
        assert [len(x) for x in e.arrays] == [len(e.tokens)] * 2 + [sum(map(len, e.images)), 2]


def test_one_image_and_none_and_a_field_of_another_name(base, config):
    task, where = make(config), f"{base}/data.jsonl:1"
    one = {"messages": chat("<image>which?")["messages"], "image": "0.png"}
    none = [{"messages": chat("which?")["messages"]}, chat("which?"), chat("which?") | {"images": None}]
    [e, *rest] = task.examples([one, *none], [where] * 4)
    assert e.images == [file(base, 0)] and all(r.images == [] and TOKEN not in r.tokens for r in rest)
    assert task.fields_read(one | {"extra": 1}) == {"messages", "image"}
    config.data.fields.image = "pictures"
    named = make(config)
    record = {"messages": one["messages"], "pictures": ["0.png"], "images": "not read"}
    [e] = named.examples([record], [where])
    assert e.images == [file(base, 0)] and named.fields_read(record) == {"messages", "pictures"}


def test_images_of_answers_and_of_several_turns_are_in_the_order_of_the_text(base, config):
    record = {"messages": [turn("user", "<image>a"), turn("assistant", "b<image>"), turn("user", "c <image>d"),
                           turn("assistant", "e")], "images": ["2.png", "0.png", "1.png"]}  # fmt: skip
    [e] = make(config).examples([record], [f"{base}/x.jsonl:1"])
    assert e.images == [file(base, 2), file(base, 0), file(base, 1)]
    assert not e.weights[e.tokens == TOKEN].any() and e.weights[np.flatnonzero(e.tokens == TOKEN)[4:8] - 1][0]


def test_images_of_a_pair_are_in_its_order_however_its_fields_stand(base, config):
    part = lambda name: [{"type": "image", "path": name}]  # noqa: E731
    pair = {"prompt": [turn("user", part("0.png"))], "completion": [turn("assistant", part("1.png"))]}
    for record in (pair, dict(sorted(pair.items()))):
        [e] = make(config).examples([record], [f"{base}/x.jsonl:1"])
        assert e.images == [file(base, 0), file(base, 1)]


@pytest.mark.fixtures
def test_llama_factory_s_records(fixtures, config):
    config.data.max_length = 400
    source, task = open_source(str(fixtures / "llamafactory-mllm" / "mllm_demo.json")), make(config)
    examples = task.examples([source[i] for i in range(len(source))], [source.where(i) for i in range(len(source))])
    assert [len(e.images) for e in examples] == [2, 1, 1, 2, 1, 1]
    for e, record in zip(examples, source, strict=True):
        folder = fixtures / "llamafactory-mllm"
        assert e.images == [(folder / name).read_bytes() for name in record["images"]]
        assert (e.tokens == TOKEN).sum() == MOST * len(e.images)
    store = build_store(source, task, 400, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    assert store.report["images"] == 8
    counted(Rows(store, 400, layout=task.layout), task)


# ---- errors --------------------------------------------------------------------------------


def test_records_that_are_none_are_refused_by_file_and_row(base, config, tmp_path):
    (base / "cut.png").write_bytes(file(base, 4)[:200])
    (base / "text.png").write_text("no image")
    task = make(config)
    for record, kind, message in [
        (chat("<image>which?<image>", "0.png"), "image_slots", "a place for image 2, and the record 1 images"),
        (chat("<image>which?"), "image_slots", "a place for image 1, and the record 0 images; give it under 'images'"),
        (chat("<image>", "0.png", "1.png"), "image_slots", "2 images, and 1 places for them in the text"),
        (chat("which?", "0.png"), "image_slots", "1 images, and 0 places .* write <image> where"),
        (chat("<image>", "no.png"), "no_file", "no.png is not there"),
        (chat("<image>", "https://example.com/a.png"), "no_file", "is not there"),
        (chat("<image>", "cut.png"), "bad_image", "the image cannot be read: OSError"),
        (chat("<image>", "text.png"), "bad_image", "the image cannot be read: UnidentifiedImageError"),
        (chat("<image>", "data:image/png;base64,!"), "bad_image", "no base64"),
        (chat("<image>", 3), "wrong_type", "the image is '?3'?, expected a path"),
        (chat("<image>", ""), "wrong_type", "expected a path"),
        (chat(f"<image>{MARKER}", "0.png"), "image_slots", rf"1 images, and 2 tokens '{re.escape(MARKER)}'"),
        (chat(f"a {MARKER}"), "image_slots", "0 images, and 1 tokens"),
        (chat("a", answer=MARKER), "image_slots", "0 images, and 1 tokens"),
        (chat([{"type": "image", "source": {"data": "x"}}], "0.png"), "image_slots", "an image's part has 'source'"),
    ]:
        path = write(base / "bad.jsonl", [chat("fine"), record])
        source = open_source(path)
        with pytest.raises(DataError, match=message) as error:
            task.examples([source[i] for i in range(2)], [source.where(i) for i in range(2)])
        assert (error.value.kind, error.value.where) == (kind, f"{path}:2"), record
        with pytest.raises(DataError, match=message) as error:  # and as a whole set is read
            build_store(source, task, 48, "truncate_end", tmp_path)
        assert error.value.where == f"{path}:2"


def test_bad_rows_may_be_skipped(base, config):
    rows = [chat("<image>", "0.png"), chat("<image>", "no.png"), chat("b"), chat("<image>")]
    source, task = open_source(write(base / "some.jsonl", rows)), make(config)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir, "skip", 0.6)
    assert sorted(store.report["skipped"].values()) == [1, 1] and store.records.tolist() == [0, 2]
    lines = (store.folder / "rejects.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "some.jsonl:2" in lines[0]
    assert [len(store[i][3]) for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.packing", "wrapped"),
        ("data.packing", "bfd_split"),
        ("data.eval_packing", "wrapped"),
        ("data.eval_packing", "bfd_split"),
        ("data.overlong", "split"),
        ("data.streaming", True),
        ("eval.shots", 2),
        ("eval.metrics", ("choice",)),
        ("data.fields.label", "y"),
        ("data.labels", ("a", "b")),
    ],
)
def test_settings_that_do_not_go_with_images(key, value, config):
    config_lib.override(config, key, value if isinstance(value, str) else repr(value))
    with pytest.raises(ConfigError, match=re.escape(key)):
        make(config)


def test_a_row_has_room_for_an_image(base, config):
    source, task = open_source(write(base / "few.jsonl", [chat("<image>", "0.png")])), make(config)
    with pytest.raises(DataError, match="data.max_length=3: an image has 4 tokens"):
        build_store(source, task, 3, "truncate_end", config.data.cache_dir)
    assert len(build_store(source, task, 0, "truncate_end", config.data.cache_dir)) == 1


def test_a_model_that_reads_something_else_is_refused(base, config, tmp_path):
    config.model.path = str(tiny.directory(tmp_path / "text"))
    with pytest.raises(ConfigError, match="the model reads texts, the task images with texts"):
        make(config)
    config.task, config.model.path = "causal_lm", str(base / "model")
    task = tasks.make(config, load_tokenizer(config))
    with pytest.raises(ConfigError, match="the model reads images with texts, the task texts"):
        task.load_model(config.model)


def test_a_tokenizer_without_the_image_s_token_is_refused(base, config):
    task, c = make(config), hf.load_model(config.model.path).config
    with pytest.raises(ConfigError, match="token 100256, the image's of the model's config, is no added token"):
        task.reads(dataclasses.replace(c, image_token=100256))
    with pytest.raises(ConfigError, match="token 40, .* is no added token"):  # a letter, which texts hold
        task.reads(dataclasses.replace(c, image_token=40))


# ---- model, questions ----------------------------------------------------------------------


def test_what_no_output_depends_on_is_not_trained(base, config):
    model, trainable = build.make_model(config, make(config))
    off = {k for k, on in params_lib.flatten(trainable).items() if not on}
    assert off == {k for k in params_lib.flatten(model.abstract) if re.match(r"tower/(layers/1-1|norm)/", k)} != set()
    config.optim.trainable = ((r"projector/.*", True), (".*", False))
    _, trainable = build.make_model(config, make(config))
    on = {k for k, on in params_lib.flatten(trainable).items() if on}
    assert on == {f"projector/{a}/{b}" for a in ("up", "down") for b in "wb"}


def asked(base, config):
    """(task, questions): with 0, 1 and 2 images, in parts and in marks."""
    rows = [chat("which?"), chat("<image>which?", "0.png"), chat("<image>a<image>", "1.png", "2.png")]
    rows += [{"messages": [turn("user", [{"type": "image", "image": "3.png"}]), turn("assistant", "b")]}]
    task = make(config)
    return task, task.questions(open_source(write(base / "test.jsonl", rows)))


def test_questions_have_their_images(base, config):
    task, questions = asked(base, config)
    assert [[*q.images] for q in questions] == [[file(base, i) for i in own] for own in ([], [0], [1, 2], [3])]
    assert [(q.prompt == TOKEN).sum() // MOST for q in questions] == [0, 1, 2, 1]
    assert [q.answer for q in questions] == ["cat"] * 3 + ["b"]
    [e] = task.examples([chat("<image>a<image>", "1.png", "2.png")], [f"{base}/x:1"])
    np.testing.assert_array_equal(questions[2].prompt, e.tokens[: len(questions[2].prompt)])
    for some in ([0], [1], [0, 1, 2, 3]):
        batch = task.beside_prompts([questions[i].images for i in some])
        assert batch["patches"].shape[:2] == (len(some), MOST * max(1, *(len(questions[i].images) for i in some)))
    with pytest.raises(DataError, match="1 images, and 0 tokens"):  # what is asked has no place for it
        task.questions(open_source(write(base / "odd.jsonl", [chat("a", "0.png", answer="b<image>")])))


def test_answers_are_those_of_each_question(base, config):
    task, questions = asked(base, config)
    model = task.load_model(config.model)
    params = params_lib.init(model.abstract, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)  # so that images matter
    how = dict(max_new_tokens=4, batch_size=4)
    task.asking = task.asking._replace(draws=1)
    found = task.answers(model, params, questions, **how)["answers"]
    order = [2, 0, 3, 1]
    assert task.answers(model, params, [questions[i] for i in order], **how)["answers"] == [found[i] for i in order]
    other = [q._replace(images=[file(base, 4)] * len(q.images)) for q in questions]
    changed = task.answers(model, params, other, **how)["answers"]
    assert changed[0] == found[0] and all(a != b for a, b in zip(changed[1:], found[1:], strict=True))
    # Of several draws each has its question's images.
    task.asking = task.asking._replace(draws=2)
    drawn = task.answers(model, params, [questions[i] for i in (1, 2)], **how)["answers"]
    assert drawn == [[found[1]] * 2, [found[2]] * 2]


def test_the_command_line_answers_as_a_run_does(base, config, tmp_path, capsys):
    task, questions = asked(base, config)
    model = task.load_model(config.model)
    params = jax.tree.map(lambda x: 3 * x, params_lib.init(model.abstract, jax.random.key(0)))
    hf.save_pretrained(tmp_path / "out", model, params, task.tokenizer)
    wanted = task.answers(model, params, questions[1:3], max_new_tokens=4)["answers"]
    images = [f"--image={base / f'{i}.png'}" for i in range(3)]
    for prompt, own, answer in (("which?", images[:1], wanted[0]), ("<image>a<image>", images[1:], wanted[1])):
        generate.main([f"--model={tmp_path / 'out'}", f"--prompt={prompt}", "--max_new_tokens=4", *own])
        assert capsys.readouterr().out.strip() == answer.strip()
    with pytest.raises(DataError, match="the image .*no.png is not there"):
        generate.main([f"--model={tmp_path / 'out'}", "--prompt=a", "--image=no.png"])


def test_the_command_to_try_names_an_image(base, config):
    task, _ = asked(base, config)
    assert "sftjax.generate" in task.try_it(config.data, base) and "--image=FILE" in task.try_it(config.data, base)
