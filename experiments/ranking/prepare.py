"""Make questions with eight candidate passages each out of XQuAD in English.

    python experiments/ranking/prepare.py [runs/ranking_data]

$SFTJAX_FIXTURES is the directory that holds xquad/.

Every fourth article is test, as in experiments/xquad. An article has five paragraphs only, of about
110 words, so each paragraph is cut into passages: as few parts of equal length as have at most 60
words each. The relevant one (1) is that in which the answer begins; seven others (0) are drawn from
the same article, and where it has fewer than that, the rest from the other articles of its split.
The order is drawn too. Another passage may hold the answer's words by chance; it counts as wrong.

shuffled.jsonl is the control: the training rows with their relevances in an order drawn anew.
"""

import json
import math
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from sftjax.files import load_python

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
WORDS, CANDIDATES = 60, 8
task = load_python(str(Path(__file__).with_name("task.py")), "task")


def passages(context):
    """[(first character, text)] of a paragraph's parts."""
    words = list(re.finditer(r"\S+", context))
    parts = np.array_split(np.arange(len(words)), math.ceil(len(words) / WORDS))
    places = [(words[at[0]].start(), words[at[-1]].end()) for at in parts]
    return [(start, context[start:end]) for start, end in places]


def questions(articles, seed):
    """A record of each question of some articles [(title, paragraphs as SQuAD has them)]."""
    rng, out = random.Random(seed), []
    cut = [[passages(p["context"]) for p in paragraphs] for _, paragraphs in articles]
    texts = [[text for parts in some for _, text in parts] for some in cut]
    for i, (title, paragraphs) in enumerate(articles):
        others = [text for j, some in enumerate(texts) if j != i for text in some]
        for parts, paragraph in zip(cut[i], paragraphs, strict=True):
            for qa in paragraph["qas"]:
                begins = qa["answers"][0]["answer_start"]
                right = [text for start, text in parts if start <= begins][-1]
                near = [text for text in texts[i] if text != right]
                wrong = rng.sample(near, min(len(near), CANDIDATES - 1))
                wrong += rng.sample(others, CANDIDATES - 1 - len(wrong))
                given = [right, *wrong]
                rng.shuffle(given)
                relevance = [int(text == right) for text in given]
                row = {"query": qa["question"], "candidates": given, "relevance": relevance}
                out.append(row | {"article": title})
    return out


def rare_overlap(row):
    """As task.word_overlap, but a word counts the more, the fewer of the candidates have it."""
    sets = [set(re.findall(r"\w+", text.lower())) for text in row["candidates"]]
    counts = Counter(word for words in sets for word in words)
    asked = set(re.findall(r"\w+", row["query"].lower()))
    return [sum(math.log(len(sets) / counts[w]) for w in asked & words) for words in sets]


def write(path, rows):
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main(out="runs/ranking_data"):
    """{what needs no model: {metric: value on the test rows}}."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data = json.loads((FIXTURES / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    articles = [(f"article {i}", a["paragraphs"]) for i, a in enumerate(data)]
    test = questions([a for i, a in enumerate(articles) if i % 4 == 3], seed=1)
    train = questions([a for i, a in enumerate(articles) if i % 4 != 3], seed=0)
    rng = random.Random(2)
    shuffled = [r | {"relevance": rng.sample(r["relevance"], CANDIDATES)} for r in train]
    for name, rows in {"train": train, "test": test, "shuffled": shuffled}.items():
        write(out / f"{name}.jsonl", rows)
    print(f"{len(train)} training rows, {len(test)} test rows")
    columns = [np.array([r["relevance"], rare_overlap(r), [0.0] * CANDIDATES]) for r in test]
    for row, x in zip(test, columns, strict=True):
        x[2] = [task.word_overlap(row["query"], text) for text in row["candidates"]]
    scores = task.measured(columns)
    found = {**scores.baselines, "overlap of rare words": scores.values}
    for name, values in found.items():
        print(f"{name}: NDCG@10 {values['ndcg10']:.3f}, MRR {values['mrr']:.3f}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
