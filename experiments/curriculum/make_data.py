"""Part the quickstart's training rows by kind: format, special and hard, a file each.

python experiments/curriculum/make_data.py runs/curriculum_data
"""

import json
import sys
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "quickstart" / "data" / "train.jsonl"
KINDS = {
    "format": ("repeat", "uppercase", "json", "extract"),
    "special": ("count_items", "sort_digits", "sort_letters"),
    "hard": ("compare", "convert", "reverse"),
}


def main(out):
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, kinds in KINDS.items():
        own = [json.dumps(row) + "\n" for row in rows if row["kind"] in kinds]
        (Path(out) / f"{name}.jsonl").write_text("".join(own))


if __name__ == "__main__":
    main(sys.argv[1])
