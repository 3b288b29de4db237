"""The quickstart's questions, text and tokenizer: answers right, splits apart, nothing lost."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import make_data  # noqa: E402
import make_text  # noqa: E402
import make_tokenizer  # noqa: E402
import tasks  # noqa: E402


@pytest.fixture(scope="module")
def splits():
    return {split: make_data.make_split(split) for split in make_data.ROWS}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QUICKSTART / "base_model")


def test_written_files_are_what_the_command_writes_today(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--out", str(tmp_path)])
    make_data.main()
    for split in make_data.ROWS:
        written = (QUICKSTART / "data" / f"{split}.jsonl").read_bytes()
        assert (tmp_path / f"{split}.jsonl").read_bytes() == written
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_500_000


def test_splits_have_every_kind_and_share_no_prompt(splits):
    prompts = {split: {row["prompt"] for row in rows} for split, rows in splits.items()}
    for split, rows in splits.items():
        assert len(prompts[split]) == len(rows) == make_data.ROWS[split]
        shares = Counter(row["kind"] for row in rows)
        print(split, {kind: f"{n / len(rows):.1%}" for kind, n in shares.items()})
        assert set(shares) == set(tasks.ASKED)
        assert all(len(row["prompt"]) <= tasks.MAX_PROMPT for row in rows)
        assert all(0 < len(row["completion"]) <= tasks.MAX_ANSWER for row in rows)
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_no_question_is_in_two_splits_in_other_words(splits):
    """For add and reverse the prompt's own numbers or word identify the question."""

    def questions(rows):
        for row in rows:
            if row["kind"] == "add":
                yield "add", *re.findall(r"\d+", row["prompt"])
            if row["kind"] == "reverse":
                yield "reverse", row["completion"]

    train = set(questions(splits["train"]))
    assert train and not train & set(questions(splits["test"]))
    assert not train & set(questions(splits["validation"]))


def solve(kind: str, prompt: str) -> str | None:
    """The answer found from the prompt's text alone, in another way than tasks.py does."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    words = re.findall(r"[a-z]+", prompt)
    if kind == "add":
        return str(sum(numbers))
    if kind == "subtract":
        return str(max(numbers) - min(numbers))
    if kind == "compare":
        return str(sorted(numbers)[1])
    if kind == "sort_digits":
        return " ".join(str(d) for d in range(10) if d in numbers)
    if kind == "sort_letters":
        run = re.search(r"\b[a-z]( [a-z]\b){2,}", prompt.replace(" from a to z", ""))[0]
        return " ".join(c for c in map(chr, range(97, 123)) if c in run)
    if kind == "convert":
        n = numbers[0]
        unit = re.search(rf"{n} ([a-z]+)", prompt)[1]
        to = next(w for w in words if w != unit and w in {"cm", "m", "g", "mm", "s", "min"})
        per = {"m": 100, "km": 1000, "kg": 1000, "cm": 10, "min": 60, "h": 60}[unit]
        return f"{sum(n for _ in range(per))} {to}"
    if kind == "count_items":
        return str(len(re.findall("|".join(tasks.THINGS), prompt)))
    if kind == "count_letter":
        letter = re.search(r"(?:times does|letters?) ([a-z])\b", prompt)[1]
        word = re.search(r"(?:\bin|often does) (\w+)", prompt)[1]
        return str(len(word.split(letter)) - 1)
    if kind in ("extract", "json"):
        record = dict(re.findall(r"([a-z]+): (\w+)", prompt.removeprefix("Write as JSON: ")))
        if kind == "extract":
            key = re.search(r"(?:the|Which) (name|city|age|job|pet|color)\b", prompt)[1]
            return record[key]
        inner = [f'"{k}": {v if v.isdigit() else json.dumps(v)}' for k, v in record.items()]
        return "{" + ", ".join(inner) + "}"
    return None


def test_answers_are_right(splits):
    solved = Counter()
    for row in splits["test"] + splits["validation"] + splits["train"][:2000]:
        answer = solve(row["kind"], row["prompt"])
        if answer is not None:
            solved[row["kind"]] += 1
            assert answer == row["completion"], row
        if row["kind"] == "json":
            assert isinstance(json.loads(row["completion"]), dict)
        if row["kind"] == "reverse":
            assert "".join(reversed(row["completion"])) in row["prompt"]
        if row["kind"] == "uppercase":
            assert row["completion"].isupper() and row["completion"].lower() in row["prompt"]
        if row["kind"] == "repeat":
            n = int(re.search(r"\d", row["prompt"])[0])
            assert row["completion"].split() == [row["completion"].split()[0]] * n
    assert len(solved) == 7


def test_tasks_are_deterministic():
    for kind, task in tasks.TASKS.items():
        first, again = task(Random(7)), task(Random(7))
        assert first == again and first[2] == kind


def test_shuffled_answers_are_a_permutation_that_keeps_none(splits):
    rows = splits["train"]
    shuffled = make_data.shuffle_answers(rows)
    pairs = list(zip(rows, shuffled, strict=True))
    assert all(old["prompt"] == new["prompt"] for old, new in pairs)
    assert all(old["completion"] != new["completion"] for old, new in pairs)
    count = lambda rows: Counter(row["completion"] for row in rows)  # noqa: E731
    assert count(rows) == count(shuffled)


def test_text_has_no_markup_and_no_held_out_instruction(splits):
    texts = list(make_text.documents(1000))
    assert texts[:10] == list(make_text.documents(10))
    assert all(0 < len(text) <= make_text.MAX_DOCUMENT for text in texts)
    corpus = "\x00".join(texts)
    assert "<|" not in corpus
    for row in splits["validation"] + splits["test"]:
        assert row["prompt"] not in corpus
    assert set(make_text.STATEMENTS) == set(make_text.WEIGHTS) == set(tasks.KINDS)
    held_out = {tuple(re.findall(r"\d+", row["prompt"])) for row in splits["test"] if row["kind"] == "add"}
    assert held_out.isdisjoint(re.findall(r"(\d+) \+ (\d+) =", corpus))


def test_tokenizer_keeps_ascii_exactly(tokenizer):
    assert len(tokenizer) == len(make_tokenizer.VOCABULARY) == 112
    text = "".join(map(chr, range(32, 127))) + "\n\t  two  blanks ,  a .  don 't\n\n "
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    other = tokenizer("naïve 火 x", return_offsets_mapping=True)
    assert other["input_ids"].count(tokenizer.unk_token_id) == 2
    assert other["offset_mapping"][-1] == (8, 9)


def test_saved_tokenizer_and_config_are_what_the_command_writes_today(tokenizer, tmp_path):
    assert tokenizer.get_vocab() == make_tokenizer.make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer.make_tokenizer().chat_template
    read = lambda name: json.loads((QUICKSTART / "base_model" / name).read_text())  # noqa: E731
    assert read("config.json") == make_tokenizer.model_config()
    assert read("generation_config.json") == make_tokenizer.generation_config()
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<eos>")]
    assert read("generation_config.json")["eos_token_id"] == stops
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token_id not in stops


def turns(*roles: str) -> list[dict]:
    return [{"role": role, "content": f" {role}  {{{i}}}"} for i, role in enumerate(roles)]


def test_chat_template(tokenizer):
    chat = turns("system", "user", "assistant", "user")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><|system|> system  {0}<|end|>\n<|user|> user  {1}<|end|>\n"
        "<|assistant|> assistant  {2}<|end|>\n<|user|> user  {3}<|end|>\n<|assistant|>"
    )
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[a:b] for a, b in encoded["offset_mapping"]]
    assert "".join(pieces) == text
    assert pieces == tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    # a turn's rendering is a prefix of the longer conversation's, so generation meets what it saw
    shorter = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(shorter)


@pytest.mark.parametrize(
    "roles",
    [("assistant",), ("user", "user"), ("user", "system"), ("system", "system"), ("tool",)],
)
def test_chat_template_refuses_wrong_orders(tokenizer, roles):
    with pytest.raises(Exception, match="turn|role"):
        tokenizer.apply_chat_template(turns(*roles), tokenize=False)
