"""Write variants of training rows: named pure functions (record, rng) -> record.

    python experiments/augment/augment.py train.jsonl out.jsonl token_dropout,paraphrase_template 2

Variant k of row i is a function of (seed, k, i) and the row, so more copies change none of the
first. The arguments are files as data.train names them, the new file, names of AUGMENTATIONS, which
are applied in order, the number of copies, and the seed. What is trained, the answers, stays as it
is; train on the new file alone, or on both.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from sftjax.data import open_source
from sftjax.data.masking.conversation import canonical

DROPPED = 0.1  # the share of words that token_dropout takes out
TEMPLATES = ("{}", "Please answer this: {}", "Here is a task. {}", "Respond to the following. {}")


def token_dropout(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Drop each word of the user's messages with probability 0.1; one word always stays."""

    def drop(text):
        words = text.split(" ")
        kept = [w for w, u in zip(words, rng.random(len(words)), strict=True) if u >= DROPPED]
        return " ".join(kept) if any(kept) else text

    return _map_prompts(record, drop)


def paraphrase_template(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Put the last user message into one of TEMPLATES, drawn at random."""
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return _map_prompts(record, lambda text: template.format(text), last=True)


AUGMENTATIONS = {"token_dropout": token_dropout, "paraphrase_template": paraphrase_template}


def _map_prompts(record, change, last=False):
    """The record with `change` applied to the text of its user messages, or of the last one."""
    if "prompt" in record:
        return record | {"prompt": change(record["prompt"])}
    if "messages" not in record:
        return record
    messages = list(record["messages"])
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and type(m["content"]) is str]
    for i in users[-1:] if last else users:
        messages[i] = messages[i] | {"content": change(messages[i]["content"])}
    return record | {"messages": messages}


def variants(source: Any, names: list[str], copies: int, seed: int) -> Iterator[dict[str, Any]]:
    """All rows once, then all once more, and so on. Raises: ValueError for an unknown name."""
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise ValueError(f"{unknown[0]!r} is unknown; known: {', '.join(AUGMENTATIONS)}")
    for copy in range(copies):
        for row in range(len(source)):
            record, rng = (
                canonical(source[row], source.where(row)),
                np.random.default_rng([seed, copy, row]),
            )
            for name in names:
                record = AUGMENTATIONS[name](record, rng)
            yield record


def main(data: str, out: str, names: str, copies: str = "1", seed: str = "0") -> None:
    rows = variants(open_source(data), names.split(","), int(copies), int(seed))
    with open(out, "x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
