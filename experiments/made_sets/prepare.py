"""Make three sets of texts from real ones: pairs, several labels, numbers.

    python experiments/made_sets/prepare.py [runs/made_sets]

$SFTJAX_FIXTURES is the directory that holds the texts. By halves that share no article, story,
meeting or sentence, for training and test; of each set also a control with shuffled labels.

pairs: does the sentence answer the question, of XQuAD: the one with the answer, or another of its
paragraph. multi_label: which of five kinds of text a text is joined of, one to three of them.
regression: how many of three reviews of SST-2 in a row are good, 0 to 1.
"""

import csv
import json
import os
import random
import re
import sys
from pathlib import Path

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
KINDS = ("review", "story", "post", "article", "meeting")


def sentences(text):
    return [s for s in re.split(r"(?<=[.!?]) +", text.strip()) if s]


def pairs(rng):
    """[{"question", "sentence", "label"}] of each article."""
    data = json.loads((FIXTURES / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    found = []
    for article in data:
        rows = []
        for paragraph in article["paragraphs"]:
            parts = sentences(paragraph["context"])
            for asked in paragraph["qas"]:
                at = asked["answers"][0]["answer_start"]
                ends = [paragraph["context"].find(s) + len(s) for s in parts]
                own = next(i for i, end in enumerate(ends) if end > at)
                others = [s for i, s in enumerate(parts) if i != own]
                if others:
                    for sentence, label in ((parts[own], "yes"), (rng.choice(others), "no")):
                        rows.append({"question": asked["question"], "sentence": sentence, "label": label})
        found.append(rows)
    return found


def kinds():
    """{kind: [short texts]}, in the order of their files."""
    xquad = json.loads((FIXTURES / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    story = (FIXTURES / "tinystories-text" / "tinystories.txt").read_text(encoding="utf-8")
    meetings = (FIXTURES / "qmsum" / "val.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [t["content"] for m in meetings for t in json.loads(m)["meeting_transcripts"]]
    posts, words = [], []
    for line in (FIXTURES / "wnut17" / "wnut17train.conll").read_text("utf-8").split("\n"):
        word = line.partition("\t")[0].strip()
        words = [*words, word] if word else (posts.append(" ".join(words)) or [])
    found = {
        "review": [text for _, text in reviews()],
        "story": [s for p in story.split("\n\n") for s in sentences(p)],
        "post": posts,
        "article": [s for a in xquad for p in a["paragraphs"] for s in sentences(p["context"])],
        "meeting": turns,
    }
    return {k: [x for x in texts if 6 <= len(x.split()) <= 25] for k, texts in found.items()}


def reviews():
    with open(FIXTURES / "sst2" / "train.tsv", encoding="utf-8", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(int(r["label"]), r["sentence"].strip()) for r in rows]


def overlap(rows):
    """[(share of the question's words that the sentence has, is it an answer)] of pairs."""
    words = lambda text: set(re.findall(r"\w+", text.lower()))  # noqa: E731
    found = []
    for r in rows:
        asked = words(r["question"])
        share = len(asked & words(r["sentence"])) / max(len(asked), 1)
        found.append((share, r["label"] == "yes"))
    return found


def by_overlap(train, test):
    """The accuracy on test of "yes" from the share of words on that is best on train."""
    seen, unseen = overlap(train), overlap(test)
    right = lambda some, least: sum((x >= least) == y for x, y in some) / len(some)  # noqa: E731
    return right(unseen, max((x for x, _ in seen), key=lambda least: right(seen, least)))


def joined(rng, texts, n):
    rows = []
    for _ in range(n):
        some = rng.sample(KINDS, rng.randint(1, 3))
        rows.append({"text": " ".join(rng.choice(texts[k]) for k in some), "label": sorted(some)})
    return rows


def shares(rng, some, n):
    rows = []
    for _ in range(n):
        three = rng.sample(some, 3)
        share = round(sum(label for label, _ in three) / 3, 4)
        rows.append({"text": " . ".join(text for _, text in three), "label": share})
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main(out="runs/made_sets"):
    """{set: {part: number of rows}}."""
    rng, data = random.Random(0), {}
    articles = pairs(rng)
    data["pairs"] = {
        "train": [r for i, rows in enumerate(articles) if i % 4 != 3 for r in rows],
        "test": [r for i, rows in enumerate(articles) if i % 4 == 3 for r in rows],
    }
    print(f"pairs by the words that they share: {by_overlap(**data['pairs']):.1%}")
    texts = kinds()
    first = {k: some[: 3 * len(some) // 4] for k, some in texts.items()}
    last = {k: some[3 * len(some) // 4 :] for k, some in texts.items()}
    data["multi_label"] = {"train": joined(rng, first, 1500), "test": joined(rng, last, 500)}
    some = [r for r in reviews() if len(r[1].split()) >= 5]
    cut = 3 * len(some) // 4
    data["regression"] = {
        "train": shares(rng, some[:cut], 4000),
        "test": shares(rng, some[cut:], 500),
    }
    for name, parts in data.items():
        labels = [r["label"] for r in parts["train"]]
        rng.shuffle(labels)
        parts["shuffled"] = [r | {"label": y} for r, y in zip(parts["train"], labels, strict=True)]
        for part, rows in parts.items():
            write(Path(out) / name / f"{part}.jsonl", rows)
    return {name: {k: len(v) for k, v in parts.items()} for name, parts in data.items()}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
