"""Write SST-2's train.tsv and dev.tsv as prompt and completion: the sentence, "positive" or
"negative".

    SFTJAX_FIXTURES=<directory that holds sst2/> python experiments/sst2/prepare.py [runs/sst2_data]

Prints the share of each label; that of dev's majority is what a constant answer would get.
"""

import collections
import json
import os
import sys
from pathlib import Path

from sftjax.data import open_source

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
LABELS = {"0": "negative", "1": "positive"}
SENTENCE = {"train": "sentence", "dev": "content"}  # the files name this column differently


def main(out="runs/sst2_data"):
    """{"train", "dev"} -> Counter of labels."""
    Path(out).mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, column in SENTENCE.items():
        rows = open_source(str(FIXTURES / "sst2" / f"{split}.tsv"))
        records = [{"prompt": r[column].strip(), "completion": LABELS[r["label"]]} for r in rows]
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (Path(out) / f"{split}.jsonl").write_text(lines)
        counts[split] = collections.Counter(r["completion"] for r in records)
        label, n = counts[split].most_common(1)[0]
        print(f"{split}: {len(records)} sentences, {n / len(records):.1%} of them {label}")
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
