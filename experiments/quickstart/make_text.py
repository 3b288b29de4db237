"""Write the text that the quickstart's base model is pretrained on: JSONL rows {"text": ...}.

    python experiments/quickstart/make_text.py text.jsonl

The skills behind the instructions of tasks.py occur here as plain statements, several of one form
in a row, so that a model can also learn to go on with a pattern it sees. There is no chat markup
and no instruction, and no question of the validation or test split in any wording: what is
learnt here is the skill, what fine-tuning adds is to do as told.
"""

import argparse
import string
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from random import Random

import make_data
import tasks

DOCUMENTS = 50_000
MAX_DOCUMENT = 250  # characters: a row of 256 tokens holds it whole

STATEMENTS = {
    "add": (
        "{a} + {b} = {answer}.",
        "{a} plus {b} is {answer}.",
        "Adding {a} and {b} makes {answer}.",
        "The sum of {a} and {b} is {answer}.",
        "{who} has {a} coins and gets {b} more, so now {who} has {answer}.",
    ),
    "subtract": (
        "{a} - {b} = {answer}.",
        "{a} minus {b} is {answer}.",
        "Taking {b} from {a} leaves {answer}.",
        "If you subtract {b} from {a}, the rest is {answer}.",
        "{who} had {a} coins and gave {b} away, so {answer} are left.",
    ),
    "compare": (
        "Of {a} and {b}, {answer} is the larger number.",
        "{a} or {b}: {answer} is more.",
        "{who} has {a} and {b}. The bigger one is {answer}.",
    ),
    "sort_letters": (
        "The letters {items} in order: {answer}.",
        "{items} sorted is {answer}.",
        "From a to z, {items} become {answer}.",
        "The alphabetical order of {items} is {answer}.",
    ),
    "sort_digits": (
        "The numbers {items} in order: {answer}.",
        "{items} sorted is {answer}.",
        "With the smallest first, {items} become {answer}.",
        "The order of {items} from smallest to largest is {answer}.",
    ),
    "reverse": (
        "The word {word} backwards is {answer}.",
        "{word} reversed: {answer}.",
        "Read in reverse, the letters of {word} spell {answer}.",
        "{who} writes {word} backwards as {answer}.",
    ),
    "uppercase": (
        "The word {word} in capitals is {answer}.",
        "{word} in upper case: {answer}.",
        "In capital letters {word} is written {answer}.",
        "{who} shouted {word}: {answer}!",
    ),
    "repeat": (
        "The word {word} {n} times: {answer}.",
        "{who} said {word} {n} times: {answer}.",
        "{n} times {word} in a row is {answer}.",
        "{n} copies of {word}: {answer}.",
    ),
    "count_letter": (
        "The letter {letter} is in {word} {answer} times.",
        "In {word}, the count of {letter} is {answer}.",
        "{word} has the letter {letter} {answer} times.",
        "The letters {letter} that appear in {word}: {answer}.",
    ),
    "count_items": (
        "{items}: that makes {answer} things.",
        "The list {items} has {answer} items.",
        "{who} has these: {items}. The number of things is {answer}.",
        "Counting {items} gives {answer}.",
    ),
    "convert": (
        "{n} {unit} = {answer}.",
        "{n} {unit} is {answer}.",
        "{n} {unit} in {to} is {answer}.",
        "As {to}, {n} {unit} become {answer}.",
    ),
    "extract": (
        "{record}. The {key} is {answer}.",
        "{record}. Here the {key} is {answer}.",
        "The {key} in this record is {answer}. {record}",
        "{record}. So {key} = {answer}.",
    ),
    "json": (
        "{record}. As JSON: {answer}",
        "{record} in JSON is {answer}",
        "JSON {answer} says {record}",
        "The record {record} turned into JSON: {answer}",
    ),
}
# The same in few characters, for many examples in little text.
DRILLS = {
    "add": "{a}+{b}={answer}",
    "subtract": "{a}-{b}={answer}",
    "compare": "{a} or {b}: {answer}",
    "sort_letters": "{items}: {answer}",
    "sort_digits": "{items}: {answer}",
    "reverse": "{word} - {answer}",
    "uppercase": "{word} = {answer}",
    "repeat": "{n} {word}: {answer}",
    "count_letter": "{letter} in {word}: {answer}",
    "count_items": "{items}: {answer}",
    "convert": "{n} {unit}={answer}",
    "extract": "{record} | {key}: {answer}",
    "json": "{record} {answer}",
}

# How often a kind occurs: arithmetic needs many examples and is short, a record needs few.
WEIGHTS = {
    "add": 5,
    "subtract": 5,
    "compare": 2,
    "sort_letters": 3,
    "sort_digits": 2,
    "reverse": 3,
    "uppercase": 1,
    "repeat": 1,
    "count_letter": 2,
    "count_items": 1,
    "convert": 2,
    "extract": 1,
    "json": 1,
}

STORIES = (
    "{who} lives in {city} and is a {job}. {who} has a {pet}, and the {pet} has a {color} {thing}.",
    "One day {who} went to {city} with {other}. They found a {color} {thing}. {other} was happy.",
    "{who} put the {thing} in the {color} {box}. Then {other} read a {word} story to the {pet}.",
    "In {city} it was a cold day. The {job} gave {who} a {thing}, and {who} gave it to the {pet}.",
    "What is in the {box}? {other} asked. A {color} {thing}, said {who}, and a {word}.",
    "How many are there? {who} did not know. Which {thing} is here? Find the {color} one.",
)


def statements(rng: Random) -> Iterator[str]:
    """A few statements of one kind, as a rule in one form."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    forms, count = STATEMENTS[kind], rng.randint(2, 5)
    if rng.random() < 0.4:
        forms, count = [DRILLS[kind]], rng.randint(3, 8)
    elif rng.random() < 0.7:
        forms = [rng.choice(forms)]
    for _ in range(count):
        fields = tasks.KINDS[kind].draw(rng)
        while make_data.split_of(kind, fields) != "train":
            fields = tasks.KINDS[kind].draw(rng)
        yield rng.choice(forms).format(**fields, who=rng.choice(tasks.NAMES))


def story(rng: Random) -> str:
    who, other = rng.sample(tasks.NAMES, 2)
    thing, box = rng.sample(tasks.THINGS, 2)
    values = {key: rng.choice(tasks.VALUES[key]) for key in ("city", "job", "pet", "color")}
    return rng.choice(STORIES).format(
        who=who, other=other, thing=thing, box=box, word=rng.choice(tasks.WORDS), **values
    )


def echo(rng: Random) -> str:
    """A line nobody can guess, again and again: the shortest way to learn to copy."""
    alphabet = rng.choice([string.ascii_letters, string.ascii_lowercase, string.digits])
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(3, 8))]
    if rng.random() < 0.5:
        words = [tasks.draw_word(rng) for _ in words]
    return "\n".join([rng.choice([" ", ", ", ": "]).join(words)] * rng.randint(2, 4))


def document(rng: Random) -> str:
    if rng.random() < 0.3:
        return echo(rng)
    parts: list[str] = []
    for _ in range(rng.randint(1, 3)):
        parts += [story(rng)] if rng.random() < 0.1 else statements(rng)
    lengths = accumulate(len(part) + 1 for part in parts)
    whole = [part for part, end in zip(parts, lengths, strict=True) if end <= MAX_DOCUMENT]
    return rng.choice([" ", "\n"]).join(whole)


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents, none of them with a held-out instruction in it."""
    held_out = [row["prompt"] for split in ("validation", "test") for row in make_data.make_split(split, seed)]
    for i in range(count):
        text = document(Random(f"{seed} text {i}"))
        found = next((prompt for prompt in held_out if prompt in text), None)
        if found is not None:
            raise ValueError(f"document {i} holds the instruction {found!r}: change STATEMENTS")
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [{"text": text} for text in documents(args.documents, args.seed)]
    make_data.write_jsonl(args.out, rows)
    print(f"{sum(len(row['text']) for row in rows):,} characters")


if __name__ == "__main__":
    main()
