"""Write WNUT17's CoNLL files as records of words and tags, with and without shuffled tags.

    python experiments/wnut17/prepare.py [runs/wnut17_data]

$SFTJAX_FIXTURES is the directory that holds wnut17/.
"""

import json
import os
import random
import sys
from pathlib import Path

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
FILES = {"train": "wnut17train.conll", "dev": "emerging.dev.conll"}


def sentences(path):
    """{"tokens", "tags"} of each sentence; an empty line, or a lone tab, ends one."""
    record = {"tokens": [], "tags": []}
    for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
        word, _, tag = line.partition("\t")
        if tag.strip():
            record["tokens"].append(word)
            record["tags"].append(tag.strip())
        elif record["tokens"]:
            yield record
            record = {"tokens": [], "tags": []}


def write(path, records):
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_text("".join(lines), encoding="utf-8")


def main(out="runs/wnut17_data"):
    """{"train", "dev"} -> number of sentences."""
    Path(out).mkdir(parents=True, exist_ok=True)
    found = {k: list(sentences(FIXTURES / "wnut17" / name)) for k, name in FILES.items()}
    for name, records in found.items():
        write(Path(out) / f"{name}.jsonl", records)
    # The control: every sentence gets the tags of the corpus in another order.
    tags = [tag for r in found["train"] for tag in r["tags"]]
    random.Random(0).shuffle(tags)
    other = [{"tokens": r["tokens"], "tags": [tags.pop() for _ in r["tags"]]} for r in found["train"]]
    write(Path(out) / "shuffled.jsonl", other)
    counts = {name: len(records) for name, records in found.items()}
    print(", ".join(f"{name}: {n} sentences" for name, n in counts.items()))
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
