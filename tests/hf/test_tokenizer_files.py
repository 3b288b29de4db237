"""A tokenizer's files: no code of theirs is run, and an export loads wherever its source does."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
from test_hf import HF, checkpoint, equal

import sftjax
from sftjax.errors import ConfigError
from sftjax.hf.tokenizer_files import open_tokenizer, save_tokenizer

REPO = Path(__file__).resolve().parents[2]
TEXT = "Hello  wörld\n<s> 12"
CODE = "import pathlib\npathlib.Path({!r}).touch()\nclass Own: pass\n"


@pytest.fixture
def source(tmp_path, fixtures):
    """A copy of a small tokenizer, and no weights."""
    folder = tmp_path / "source"
    shutil.copytree(fixtures / "stories260K-hf", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def change(file, **fields):
    value = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def saved(tokenizer, folder):
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_every_call_of_transformers_refuses_remote_code():
    """Of the package and of its experiments: a call that does not say so may ask, or run it."""
    calls = 0
    for folder in ("sftjax", "experiments"):
        for file in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = getattr(node.func.value, "id", "")
                if node.func.attr != "from_pretrained" or not owner.startswith("Auto"):
                    continue
                said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert said.get("trust_remote_code") is False, f"{file}:{node.lineno}"
                calls += 1
    assert calls > 1


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_is_not_run_and_nothing_is_asked(source, tmp_path, monkeypatch, file, known):
    ran = tmp_path / "ran"
    (source / "own.py").write_text(CODE.format(str(ran)))
    auto_map = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    change(source / file, auto_map=auto_map)
    if not known:
        change(source / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    if known or file == "config.json":
        assert open_tokenizer(source)(TEXT).input_ids
    else:
        with pytest.raises(ConfigError, match="it is code of its own .*sftjax runs no code"):
            open_tokenizer(source)
    assert not ran.exists()


@pytest.mark.parametrize("text", ["{}", "[]", "5", "", "{", '{"a":' * 100_000, "[" * 600], ids=len)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_one_message(source, name, text):
    (source / name).write_text(text)
    if (name, text) == ("tokenizer_config.json", "{}"):
        assert open_tokenizer(source)
        return
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(source)
    assert str(source) in str(caught.value) and len(str(caught.value)) < 2000


@pytest.mark.parametrize("fields", [dict(tokenizer_class=["x"]), dict(auto_map="own.Own")])
def test_fields_of_a_wrong_type_are_one_message(source, fields):
    change(source / "tokenizer_config.json", **fields)
    with pytest.raises(ConfigError, match="no tokenizer could be loaded from"):
        open_tokenizer(source)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_special_files_are_refused(source, name, kind):
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name) if kind == "pipe" else (source / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=rf"{name} is a .*, expected a regular file"):
        open_tokenizer(source)


# ---- export --------------------------------------------------------------------------------


NAMES = ("stories260K-hf", "minilm-l6", "tokenizer-qwen")


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_tokenizer_is_copied(fixtures, tmp_path, name):
    tokenizer = open_tokenizer(fixtures / name)
    tokenizer([TEXT, "a"], padding=bool(tokenizer.pad_token), truncation=True, max_length=4)
    saved(tokenizer, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (fixtures / name / file.name).read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_tokenizer_keeps_its_class(fixtures, tmp_path, name):
    tokenizer = open_tokenizer(fixtures / name)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    said = saved(tokenizer, tmp_path / "out")
    known = json.loads((fixtures / name / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == known["tokenizer_class"] != "TokenizersBackend"
    assert not {"is_local", "local_files_only", "backend"} & said.keys()
    assert not isinstance(said.get("extra_special_tokens"), list)
    again = open_tokenizer(tmp_path / "out")
    assert again("<new>").input_ids == tokenizer("<new>").input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_what_version_5_wrote_is_put_into_the_form_of_both(source, tmp_path):
    change(
        source / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        backend="tokenizers",
        is_local=True,
        local_files_only=False,
        extra_special_tokens=["<unk>"],
    )
    said = saved(open_tokenizer(source), tmp_path / "out")
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<unk>"] and "extra_special_tokens" not in said
    assert not {"is_local", "local_files_only", "backend"} & said.keys()
    one, other = open_tokenizer(source), open_tokenizer(tmp_path / "out")
    assert one(TEXT).input_ids == other(TEXT).input_ids


def test_another_template_is_the_only_one_that_is_exported(source, tmp_path):
    (source / "chat_template.jinja").write_text("old")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("old tools")
    tokenizer = open_tokenizer(source)
    assert tokenizer.chat_template == {"default": "old", "tool": "old tools"}
    saved(tokenizer, tmp_path / "same")
    assert open_tokenizer(tmp_path / "same").chat_template == tokenizer.chat_template
    for template in ("new", {"default": "new", "rag": "newer"}):
        tokenizer.chat_template = template
        out = tmp_path / f"out-{len(template)}"
        saved(tokenizer, out)
        assert open_tokenizer(out).chat_template == template
        file = "tokenizer.json"  # nothing else has changed
        assert (out / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize(
    "auto_map, copied, kept",
    [
        ({"AutoConfig": "own.Own"}, True, True),
        ({"AutoConfig": "own.Own", "AutoModel": "other.Own"}, False, False),
        ({"AutoConfig": "org/name--own.Own"}, False, True),
        ({"AutoTokenizer": ["own.Own", None]}, True, True),
        ({"AutoConfig": "../own.Own"}, False, False),
        ({"AutoConfig": "a/own.Own"}, False, False),
        ({"AutoConfig": 5}, False, False),
        ("own.Own", False, False),
        ([], False, False),
    ],
    ids=str,
)
def test_code_comes_along_or_is_not_named(tmp_path, auto_map, copied, kept):
    source = checkpoint(tmp_path / "in", auto_map=auto_map)
    (source / "own.py").write_text(CODE.format(str(tmp_path / "ran")))
    (tmp_path / "own.py").write_text("x")
    model, params = sftjax.load_pretrained(source)
    sftjax.save_pretrained(tmp_path / "out", model, params)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said == HF | ({"auto_map": auto_map} if kept else {})
    assert (tmp_path / "out" / "own.py").exists() is copied
    assert not (tmp_path / "ran").exists()
    equal(sftjax.load_pretrained(tmp_path / "out")[1], params)


def test_a_second_export_leaves_no_file_of_the_first(source, tmp_path):
    model, params = sftjax.load_pretrained(checkpoint(tmp_path / "in"))
    tokenizer, out = open_tokenizer(source), tmp_path / "out"
    tokenizer.chat_template = "first"
    sftjax.save_pretrained(out, model, params, tokenizer)
    assert (out / "chat_template.jinja").exists()
    sftjax.save_pretrained(out, model, params, open_tokenizer(source))
    assert not (out / "chat_template.jinja").exists()
    assert open_tokenizer(out).chat_template == open_tokenizer(source).chat_template
