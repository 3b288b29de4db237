"""Texts with images: forms of records, errors, cuts, batches, questions."""

import base64
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tiny
from vision_language import png

from sftjax import config as config_lib
from sftjax import generate, hf, parallel, tasks
from sftjax import params as params_lib
from sftjax.config import ConfigError
from sftjax.data import DataError, Rows, build_store, loader, open_source
from sftjax.data.packing.image_text import Patches
from sftjax.data.token_store import store_key
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.tasks.image_text import ImageText
from sftjax.training import build
from sftjax.training import data as feed_lib

MARKER, TOKEN, MOST = "<|reserved_0|>", 108, 4
SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    image_size=8, patch_size=4,
)  # fmt: skip
ANY = Patches(12, 4, 3, (4, 9))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's directory and, beside the records to come, five images."""
    where = tmp_path_factory.mktemp("base")
    path = tiny.directory(where / "model")
    text = json.loads((path / "config.json").read_text())
    llava = dict(model_type="llava", architectures=["LlavaForConditionalGeneration"], image_token_index=TOKEN)
    llava |= dict(vision_feature_select_strategy="full", text_config=text, vision_config=SIGLIP)
    (path / "config.json").write_text(json.dumps(llava))
    for i, size in enumerate([(9, 8), (30, 13), (16, 16), (1, 40), (21, 17)]):
        (where / f"{i}.png").write_bytes(png(*size, i))
    return where


@pytest.fixture
def config(base, tmp_path):
    c = config_lib.get_default()
    c.task, c.model.path, c.model.init = "image_text", str(base / "model"), "random"
    c.model.dtype, c.data.max_length, c.train.batch_size, c.data.cache_dir = "float32", 48, 4, str(tmp_path / "cache")
    c.train.duration = "2 steps"
    return c


def make(config, any_size=False) -> ImageText:
    task = tasks.make(config, load_tokenizer(config))
    if any_size:
        task.patches = ANY
        task.layout = dataclasses.replace(task.layout, patches=ANY)
    return task


def file(base, i):
    return (base / f"{i}.png").read_bytes()


def url(base, i):
    return "data:image/png;base64," + base64.b64encode(file(base, i)).decode()


def write(where, records):
    where.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(where)


def turn(role, content):
    return {"role": role, "content": content}


def chat(user, *images, answer="cat", **more):
    return {"messages": [turn("user", user), turn("assistant", answer)], "images": list(images)} | more


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


# ---- cuts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("overlong", ["truncate_end", "truncate_prompt"])
def test_a_cut_never_leaves_a_part_of_an_image(overlong, any_size, base, config):
    task = make(config, any_size)
    record = {"messages": [turn("user", "a<image>b"), turn("assistant", "cd"), turn("user", "<image>ef<image>"),
                           turn("assistant", "gh")], "images": ["0.png", "1.png", "2.png"]}  # fmt: skip
    [e] = task.examples([record], [f"{base}/x.jsonl:1"])
    counts, whole = np.bincount(e.image)[1:], len(e.tokens)
    assert counts.tolist() == ([9, 8, 9] if any_size else [4, 4, 4]) or any_size
    seen = set()
    for most in range(max(counts), whole + 2):
        pieces, kept = task.cut(e, most, overlong), task.kept(e, most, overlong)
        assert len(pieces) == len(kept) <= 1
        for (tokens, weights, data, sizes), at in zip(pieces, kept, strict=True):
            assert len(tokens) == len(weights) <= most and weights[1:].any()
            np.testing.assert_array_equal(tokens, e.tokens[at])
            np.testing.assert_array_equal(weights, e.weights[at])
            left = [i for i in range(1, 4) if i in e.image[at]]
            seen.add(tuple(left))
            assert data.tobytes() == b"".join(e.images[i - 1] for i in left)
            assert sizes.tolist() == [len(e.images[i - 1]) for i in left]
            assert (tokens == TOKEN).sum() == sum(counts[i - 1] for i in left)
            batch = {k: np.zeros(f.shape, f.dtype) for k, f in task.layout.spec(1, whole).items()}
            task.layout.fill({k: v[0] for k, v in batch.items()}, [pieces[0]], [(0, 0, len(tokens))])
            if any_size:
                assert (batch["patch_segments"] > 0).sum() == (tokens == TOKEN).sum()
    assert (1, 2, 3) in seen and len(seen) > 2, seen


# ---- batches -------------------------------------------------------------------------------


def records(n):
    """Texts of several lengths with 0 to 3 images each."""
    return [
        chat("<image>" * (i % 4) + "wh" * (i % 7 + 1), *[f"{(i + j) % 5}.png" for j in range(i % 4)]) for i in range(n)
    ]


def counted(rows, task):
    """Every row of a store has as many patches as tokens of images, and they are those of its images, in order."""
    for r in range(len(rows)):
        batch = rows.batch([r])
        spec = task.layout.spec(1, batch["tokens"].shape[1])
        assert {k: v.shape for k, v in batch.items()} == {k: f.shape for k, f in spec.items()}
        wanted = [x for doc, _, _ in rows.pieces(r) for x in images_of(rows.store[doc])]
        cut = [task.patches.of(data) for data in wanted]
        flat = np.concatenate([x.reshape(-1, *x.shape[2:]) for x in cut]) if cut else batch["patches"][0, :0]
        assert len(flat) == (batch["tokens"] == TOKEN).sum()
        np.testing.assert_array_equal(batch["patches"][0, : len(flat)], flat)
        assert not batch["patches"][0, len(flat) :].any()
        if task.patches.limits:
            sizes = [x.shape[:2] for x in cut]
            segments = np.repeat(np.arange(1, len(cut) + 1), [h * w for h, w in sizes])
            np.testing.assert_array_equal(batch["patch_segments"][0, : len(flat)], segments)
            assert not batch["patch_segments"][0, len(flat) :].any()
            places = [(y, x, h, w) for h, w in sizes for y in range(h) for x in range(w)]
            np.testing.assert_array_equal(batch["patch_places"][0, : len(flat)], np.reshape(places, (-1, 4)))


def images_of(example):
    stops = np.cumsum(example[3])
    return [example[2][stop - n : stop].tobytes() for stop, n in zip(stops, example[3], strict=True)]


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_rows_have_as_many_patches_as_tokens_of_images(packing, any_size, base, config):
    source, task = open_source(write(base / "many.jsonl", records(23))), make(config, any_size)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    counted(Rows(store, 48, packing, layout=task.layout), task)
    shares = [(x[0] == TOKEN).mean() for x in store]
    assert task.layout.share == max(shares) < 1
    spec = task.layout.spec(1, 48)["patches"].shape[1]
    assert spec == (int(48 * max(shares)) if any_size else int(48 * max(shares) / MOST) * MOST)


@pytest.mark.parametrize("any_size", [False, True])
def test_buckets_cut_tokens_and_no_images(any_size, base, config):
    """Of a narrow batch too, patches come in whole images: 22 tokens of a row are 5 images and no part of one."""
    from sftjax.data.packing.buckets import Buckets

    source, task = open_source(write(base / "many.jsonl", records(23))), make(config, any_size)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    rows = Buckets(store, 48, widths=(22, 31), batch_size=1, layout=task.layout)
    counted(rows, task)
    assert {rows.batch([r])["tokens"].shape[1] for r in range(len(rows))} == {22, 31, 48}


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(base, config):
    source, task = open_source(write(base / "many.jsonl", records(23))), make(config, True)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    rows = Rows(store, 48, layout=task.layout, epochs=2)
    here, there = (list(loader(rows, 4, workers=n)) for n in (0, 2))
    assert len(here) == len(there) > 2
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            np.testing.assert_array_equal(a[k], b[k])


def test_training_rows_and_a_validation_set_share_one_shape(base, config, tmp_path):
    """Rows have room for the images of the set that has most of them."""
    few = [chat("a longer question that has an image <image>", "0.png")] * 6
    config.data.train = write(base / "few.jsonl", few)
    config.data.validation = write(base / "more.jsonl", [chat("<image><image><image>", "0.png", "1.png", "2.png")] * 3)
    task = make(config)
    feed = feed_lib.Feed(config, task, tmp_path, parallel.make_mesh({}, jax.devices()[:1]))
    own, other = next(feed.batches(0)), next(feed.eval_batches(feed.sets["more"]))
    assert own["patches"].shape[1:] == other["patches"].shape[1:] and (own["tokens"] == TOKEN).any()
    assert (np.asarray(other["tokens"]) == TOKEN).sum() == 3 * 3 * MOST


def test_sets_without_any_image_have_room_for_one(base, config, tmp_path):
    rows = [dict(messages=[turn("user", "a?"), turn("assistant", "b")])] * 6
    config.data.train = config.data.validation = write(tmp_path / "a.jsonl", rows)
    mesh = parallel.make_mesh(dict(data=1), jax.devices()[:1])
    feed = feed_lib.Feed(config, make(config), tmp_path, mesh)
    model, _ = build.make_model(config, feed.task)
    batch = next(feed.batches(0))
    assert batch["patches"].shape[1] == MOST and not batch["patches"].any() and feed.store.report["images"] == 0
    params = params_lib.init(model.abstract, jax.random.key(0))
    loss = feed.task.loss_fn(model, config.loss.to_dict())(params, batch, None)
    assert np.isfinite(float(loss.sum)) and float(loss.weight) > 0


def test_rows_of_several_sources_have_room_for_the_images_of_all(base, config, tmp_path):
    few, more = [chat("a long question <image>", "0.png")] * 4, [chat("<image><image>", "0.png", "1.png")] * 4
    paths = [write(base / f"{name}.jsonl", rows) for name, rows in (("few", few), ("two", more))]
    config.data.sources = tuple({"path": path} for path in paths)
    feed = feed_lib.Feed(config, make(config), tmp_path, parallel.make_mesh({}, jax.devices()[:1]))
    for _, batch in zip(range(2), feed.batches(0), strict=False):
        patches = np.asarray(batch["patches"]).any((2, 3, 4)).sum(1)
        np.testing.assert_array_equal(patches, (np.asarray(batch["tokens"]) == TOKEN).sum(1))
        assert {0, 1} >= set(np.unique(batch["sources"])) and patches.any()


def test_a_store_is_that_of_its_sizes_of_images(base, config):
    source = open_source(write(base / "few.jsonl", [chat("<image>which?", "4.png")]))
    keys, lengths = [], []
    for patches in (Patches(8, 4, 3), Patches(12, 4, 3), Patches(8, 2, 3), ANY, ANY._replace(limits=(4, 6))):
        task = make(config)
        task.patches = patches
        task.layout = dataclasses.replace(task.layout, patches=patches)
        keys.append(store_key(source, task, 48, "truncate_end"))
        store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
        assert store.folder.name == keys[-1]
        lengths.append(int((store[0][0] == TOKEN).sum()))
    assert len(set(keys)) == 5 and lengths[:3] == [4, 9, 16] and lengths[3] > lengths[4]
    assert keys[0] == store_key(source, make(config), 48, "truncate_end")


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
    assert changed[0] == found[0] and changed[1:] != found[1:]
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
