"""Write data/{train,validation,test}.jsonl: instructions with known answers.

    python experiments/quickstart/make_data.py
    python experiments/quickstart/make_data.py --shuffle-answers

The second form writes data/train_shuffled.jsonl only: the rows of train with their answers dealt
to other rows. A model tuned on it must fail the test; if it does not, the test is wrong.

The splits share no question, not even in another phrasing: a hash of the question's fields
decides its split, whatever the number of rows asked for.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import tasks

DATA = Path(__file__).parent / "data"
ROWS = {"train": 7000, "validation": 350, "test": 350}  # multiples of the number of kinds
MAX_MISSES = 20_000  # draws without a new prompt before a kind counts as exhausted

Row = dict[str, str]


def split_of(kind: str, fields: tasks.Fields) -> str:
    bucket = zlib.crc32(json.dumps([kind, fields], sort_keys=True).encode()) % 16
    return {0: "validation", 1: "test"}.get(bucket, "train")


def rows_of(kind: str, split: str, rng: Random) -> Iterator[Row]:
    """Distinct rows of one kind in one split, without end."""
    seen: set[str] = set()
    misses = 0
    while misses < MAX_MISSES:
        misses += 1
        fields = tasks.KINDS[kind].draw(rng)
        if split_of(kind, fields) != split:
            continue
        prompt = tasks.phrase(kind, fields, rng)
        if prompt not in seen:
            seen.add(prompt)
            misses = 0
            yield {"prompt": prompt, "completion": str(fields["answer"]), "kind": kind}
    raise ValueError(f"{kind} has only {len(seen)} prompts for {split}; ask for fewer rows")


def make_split(split: str, seed: int = 0) -> list[Row]:
    """The rows of one split: as many of each kind, in random order."""
    per_kind = ROWS[split] // len(tasks.ASKED)
    rows = []
    for kind in tasks.ASKED:
        source = rows_of(kind, split, Random(f"{seed} {split} {kind}"))
        rows += [next(source) for _ in range(per_kind)]
    Random(f"{seed} {split}").shuffle(rows)
    return rows


def shuffle_answers(rows: list[Row], seed: int = 0) -> list[Row]:
    """The rows with their completions permuted so that no row has the text it had."""
    rng = Random(f"{seed} answers")
    old = [row["completion"] for row in rows]
    new = rng.sample(old, len(old))
    for i in range(len(old)):
        while new[i] == old[i]:  # equal answers are common ("2"), so one shuffle is not enough
            j = rng.randrange(len(old))
            if new[j] != old[i] and new[i] != old[j]:
                new[i], new[j] = new[j], new[i]
    return [{**row, "completion": answer} for row, answer in zip(rows, new, strict=True)]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle-answers", action="store_true")
    args = parser.parse_args()
    if args.shuffle_answers:
        rows = shuffle_answers(make_split("train", args.seed), args.seed)
        write_jsonl(args.out / "train_shuffled.jsonl", rows)
        return
    for split in ROWS:
        write_jsonl(args.out / f"{split}.jsonl", make_split(split, args.seed))


if __name__ == "__main__":
    main()
