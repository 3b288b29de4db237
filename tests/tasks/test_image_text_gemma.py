"""Gemma 3's and PaliGemma's rows: what their processors write around images, pooled patches, prompts seen whole."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from image_records import SIGLIP, TOKEN, chat, make, turn, write
from vision_language import png

from sftjax import config as config_lib
from sftjax import params as params_lib
from sftjax import train as train_lib
from sftjax.data import Rows, build_store, open_source
from sftjax.data.masking.around import Around
from sftjax.errors import ConfigError
from sftjax.evaluation.likelihood import log_likelihoods
from sftjax.hf.tokenizer_files import open_tokenizer

BEFORE, AFTER = 109, 110


@pytest.fixture(params=["gemma3", "paligemma"])
def config(request, tmp_path):
    path = tiny.directory(tmp_path / "model")
    text = json.loads((path / "config.json").read_text())
    own = dict(model_type=request.param, image_token_index=TOKEN, vision_config=SIGLIP | {"image_size": 16})
    if request.param == "gemma3":
        own |= dict(architectures=["Gemma3ForConditionalGeneration"], mm_tokens_per_image=4)
        own |= dict(boi_token_index=BEFORE, eoi_token_index=AFTER)
        text |= dict(model_type="gemma3_text", sliding_window=64)
    else:
        own |= dict(architectures=["PaliGemmaForConditionalGeneration"], projection_dim=32)
        text["model_type"] = "gemma"
        (path / "chat_template.jinja").unlink(missing_ok=True)  # PaliGemma's tokenizer has none
        said = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({k: x for k, x in said.items() if k != "chat_template"}))
    (path / "config.json").write_text(json.dumps(own | {"text_config": text}))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(9 + i, 8, i))
    c = config_lib.get_default()
    c.task, c.model.path, c.model.init = "image_text", str(path), "random"
    c.model.dtype, c.data.max_length, c.train.batch_size, c.data.cache_dir = "float32", 64, 8, str(tmp_path / "cache")
    c.train.duration, c.train.checkpoint_every, c.eval.every = "3 steps", "0", "0"
    return c


def pairs(n):
    names = [[f"{j}.png" for j in range(i % 3)] for i in range(n)]
    return [
        {"prompt": "<image>" * len(own) + "which?\n", "completion": "ab"[i % 2], "images": own}
        for i, own in enumerate(names)
    ]


def records(config, n, where):
    """Rows of the form that the model's data has: chats, or pairs."""
    if "paligemma" in (where / "model" / "config.json").read_text():
        return pairs(n)
    return [chat("<image>a " * len(x["images"]) + "which?", *x["images"], answer=x["completion"]) for x in pairs(n)]


def test_tokens_are_those_of_the_text_that_the_processor_writes(config, tmp_path):
    if "paligemma" in (tmp_path / "model" / "config.json").read_text():
        task = make(config)
        [e] = task.examples(pairs(3)[2:], [f"{tmp_path}/x.jsonl:1"])
        text = "<|reserved_0|>" * 32 + "<bos>which?\na<|end|>"
        answer = "a<|end|>"
    else:
        task = make(config)
        record = chat("<image>which <image>", "0.png", "1.png", answer="x")
        [e] = task.examples([record], [f"{tmp_path}/x.jsonl:1"])
        image = "\n\n<|reserved_1|>" + "<|reserved_0|>" * 4 + "<|reserved_2|>\n\n"
        text = task.tokenizer.apply_chat_template([turn("user", "@which @"), turn("assistant", "x")], tokenize=False)
        text, answer = text.replace("@", image), "x<|end|>"
    plain = open_tokenizer(tmp_path / "model", "model")
    assert plain.decode(e.tokens) == text
    assert e.tokens.tolist() == plain(text, add_special_tokens=False).input_ids
    assert plain.decode(e.tokens[e.weights > 0]) == answer
    assert len(e.images) == 2 and (e.image > 0).sum() == (e.tokens == TOKEN).sum() and not e.weights[e.image > 0].any()


def test_rows_have_the_patches_of_their_tokens(config, tmp_path):
    task = make(config)
    source = open_source(write(tmp_path / "many.jsonl", records(config, 17, tmp_path)))
    store = build_store(source, task, 64, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    rows = Rows(store, 64, layout=task.layout)
    spec, each = task.layout.spec(1, 64)["patches"].shape[1], task.patches.each
    assert spec == int(64 * task.layout.share * each / 16 + 1e-6) * 16 and each in (1, 4)
    for r in range(len(rows)):
        batch = rows.batch([r])
        used = batch["patches"].reshape(spec, -1).any(1).sum()
        assert used == each * (batch["tokens"] == TOKEN).sum()


@pytest.mark.slow
def test_a_run_answers_about_its_images(config, tmp_path):
    """It trains, answers, and its export is read again with the same numbers."""
    for name, n in {"train": 12, "test": 5}.items():
        config.data[name] = write(tmp_path / f"{name}.jsonl", records(config, n, tmp_path))
    config.generate.max_new_tokens = 3
    train_lib.train(config, tmp_path / "run")
    answers = [json.loads(x) for x in (tmp_path / "run/samples/test.jsonl").read_text().splitlines()]
    assert len(answers) == 5 and all(len(x["after"]) <= 3 for x in answers)
    again = config_lib.get_default()
    again.task, again.model.path = "image_text", str(tmp_path / "run/export")
    model = make(again).load_model(again.model)
    assert model.config.image_tokens in (4, 16) and model.config.left == 0


def test_places_are_those_of_the_text_as_it_was(config, tmp_path):
    own = open_tokenizer(tmp_path / "model", "model")
    text, around = "ab<|reserved_0|>cd<|reserved_0|>", Around(own, "<.reserved_0.>", "\n\n", "xy")
    out = around(text, add_special_tokens=False, return_offsets_mapping=True)
    assert own.decode(out["input_ids"]) == "ab\n\n<|reserved_0|>xycd\n\n<|reserved_0|>xy"
    places = [text[a:b] for a, b in out["offset_mapping"]]
    assert places == ["a", "b", "", "", "<|reserved_0|>", "", "", "c", "d", "", "", "<|reserved_0|>", "", ""]
    [encoding] = around([text], add_special_tokens=False).encodings
    assert [encoding.token_to_chars(i) for i in range(len(encoding.ids))] == out["offset_mapping"]
    assert len(around) == len(own) and around.bos_token == "<bos>"


def test_another_task_s_tokenizer_is_taken_as_it_was(config):
    """Of several sources each has a task of its own, made with the first one's tokenizer."""
    first = make(config)
    second = make(config, tokenizer=first.tokenizer)
    assert isinstance(first.tokenizer, Around) and not isinstance(second.tokenizer.within, Around)
    assert copy.deepcopy(first.tokenizer).written == second.tokenizer.written
    assert first.key() == second.key() != make(config).key()[:-3]


def test_a_prompt_is_seen_whole_by_what_scores_its_answer(config):
    """A likelihood's batch says what is asked about, or all of a PaliGemma's text would be a prompt."""
    model = make(config).load_model(config.model)
    params = params_lib.init(model.abstract, jax.random.key(0))
    prompt, answer = [9, 12, 15, 30], [41, 17]
    [found], _ = log_likelihoods(model, params, [(prompt, answer)])
    batch = {"tokens": jnp.array([prompt + answer]), "weights": jnp.array([[0, 0, 0, 1, 1, 0.0]])}
    right = jax.nn.log_softmax(model.apply(params, batch))[0]
    assert found == pytest.approx(float(right[3, 41] + right[4, 17]), rel=1e-4)


@pytest.mark.parametrize("config", ["gemma3"], indirect=True)
def test_tokens_around_an_image_have_to_be_added_ones(config):
    task = make(config)
    c = task.load_model(config.model).config
    with pytest.raises(ConfigError, match="token 40, the image's of the model's config, is no added token"):
        task.reads(dataclasses.replace(c, around=(40, AFTER)))


@pytest.mark.parametrize("config", ["paligemma"], indirect=True)
def test_a_prompt_without_its_line_break_is_said(config, tmp_path):
    rows = pairs(4)
    rows[2]["prompt"] = rows[2]["prompt"].strip()
    store = build_store(
        open_source(write(tmp_path / "x.jsonl", rows)), make(config), 64, "truncate_end", config.data.cache_dir
    )
    assert store.report["left_out"] == {
        "the prompt does not end with a line break, as PaliGemma's do": [1, f"{tmp_path}/x.jsonl:3"]
    }
