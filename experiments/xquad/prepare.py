"""Split XQuAD's English articles into training and test rows, and measure what needs no model.

    python experiments/xquad/prepare.py [runs/xquad_data]

$SFTJAX_FIXTURES is the directory that holds xquad/.

Every fourth article is test. The sliding window (Richardson et al. 2013) answers with the words of
the context that stand in a window of n words and are not in the question, where the window shares
most weight with the question; the best of several n is what a model has to beat.
"""

import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path

from sftjax.evaluation.metrics import squad_words, texts

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))


def records(language):
    """[[{"question", "context", "answers"}] of each article]."""
    data = json.loads((FIXTURES / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))
    return [
        [
            {
                "question": q["question"],
                "context": p["context"],
                "answers": {k: [a[k] for a in q["answers"]] for k in ("text", "answer_start")},
            }
            for p in article["paragraphs"]
            for q in p["qas"]
        ]
        for article in data["data"]
    ]


def window(record, n):
    """The words of the best window of n words that the question does not have."""
    words = record["context"].split()
    counts = Counter(w for word in words for w in squad_words(word))
    asked = set(squad_words(record["question"]))
    weight = [sum(math.log(1 + 1 / counts[w]) for w in squad_words(word) if w in asked) for word in words]
    best = max(range(len(words)), key=lambda i: sum(weight[max(i - n, 0) : i + n]))
    near = range(max(best - n, 0), min(best + n, len(words)))
    free = [i for i in near if not set(squad_words(words[i])) & asked]
    middle = sorted(free, key=lambda i: abs(i - best))[:3]
    return " ".join(words[i] for i in sorted(middle))


def write(path, rows):
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main(out="runs/xquad_data"):
    """{"sliding window of n": F1 on the test rows}."""
    Path(out).mkdir(parents=True, exist_ok=True)
    articles = records("en")
    test = [row for i, rows in enumerate(articles) if i % 4 == 3 for row in rows]
    train = [row for i, rows in enumerate(articles) if i % 4 != 3 for row in rows]
    write(Path(out) / "test.jsonl", test)
    write(Path(out) / "train.jsonl", train)
    contexts = [row["context"] for row in train]
    rng, shuffled = random.Random(0), []
    for row, context in zip(train, contexts, strict=True):  # the control: any words of the context
        word = rng.choice([w for w in context.split() if len(w) > 3])
        wrong = {"text": [word], "answer_start": [context.index(word)]}
        shuffled.append(row | {"answers": wrong})
    write(Path(out) / "shuffled.jsonl", shuffled)
    print(f"{len(train)} training rows, {len(test)} test rows")
    wanted, found = [row["answers"]["text"] for row in test], {}
    for n in (4, 8, 16):
        given = [window(row, n) for row in test]
        found[f"sliding window of {n}"] = texts(["token_f1"], wanted, given).values["token_f1"]
    for name, f1 in found.items():
        print(f"{name}: F1 {f1:.1%}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
