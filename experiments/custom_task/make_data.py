"""Write scikit-learn's diabetes data (442 patients, 10 measurements each) as JSON lines.

    python experiments/custom_task/make_data.py [runs/custom_task_data]

Every fifth patient goes to validation.jsonl. The target, how far the disease went in a year, is
divided by 100.
"""

import json
import sys
from pathlib import Path

from sklearn.datasets import load_diabetes


def main(out="runs/custom_task_data"):
    Path(out).mkdir(parents=True, exist_ok=True)
    data = load_diabetes(scaled=False)
    rows = [
        json.dumps(dict(features=x.tolist(), target=y / 100)) + "\n"
        for x, y in zip(data.data, data.target, strict=True)
    ]
    for name, own in (("train", 1), ("validation", 0)):
        text = "".join(row for i, row in enumerate(rows) if bool(i % 5) == bool(own))
        (Path(out) / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
