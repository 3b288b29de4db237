"""Make a tokenizer, an untrained T5 and the data of four tasks.

    python experiments/small_t5/prepare.py [runs/small_t5]

copy and reverse: words of TinyStories, 3 to 10 in a row. summary: passages of stories, summed up by
a template: who it is about, and how it ends. qmsum: a question about a meeting with the turns that
answer it, and the answer. $SFTJAX_FIXTURES is the directory that holds the texts.
"""

import collections
import json
import os
import random
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
SPECIAL = ["<pad>", "</s>", "<unk>"]
T5 = dict(
    model_type="t5", architectures=["T5ForConditionalGeneration"], d_model=128, d_kv=32, d_ff=384,
    num_layers=3, num_decoder_layers=3, num_heads=4, relative_attention_num_buckets=64,
    relative_attention_max_distance=64, dropout_rate=0.0, feed_forward_proj="relu",
    tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    is_encoder_decoder=True,
)  # fmt: skip
TURNS = 220  # words of a meeting that are shown


def words(text):
    return re.findall(r"[a-z']+|[.,!?\"]", text.lower())


def stories():
    """The lists of sentences, as words, of each story of several paragraphs."""
    text = (FIXTURES / "tinystories-text" / "tinystories.txt").read_text(encoding="utf-8")
    found = []
    for paragraph in text.split("\n\n"):
        new = re.match(r"(One day|Once upon)", paragraph) or not found
        if new:
            found.append([])
        parts = re.split(r'(?<=[.!?]) +(?="?[A-Z])', paragraph.strip())
        found[-1] += [w for part in parts if (w := words(part))]
    return [story for story in found if len(story) >= 4]


def names(text):
    """The names of a text: words after "named", and how often each is there."""
    return set(re.findall(r"(?:named|called) ([A-Z][a-z]+)", text))


def spans(rng, vocabulary, n, change):
    rows = []
    for _ in range(n):
        some = rng.choices(vocabulary, k=rng.randint(3, 10))
        rows.append({"source": " ".join(some), "target": " ".join(change(some))})
    return rows


def summaries(rng, some, known, n):
    """A passage of 3 to 6 sentences; of whom it tells most often, and its last sentence."""
    rows = []
    while len(rows) < n:
        story = rng.choice(some)
        length = rng.randint(3, min(6, len(story)))
        at = rng.randint(0, len(story) - length)
        passage = story[at : at + length]
        counts = collections.Counter(w for s in passage for w in s if w in known)
        if counts and len(passage[-1]) <= 14:
            who = counts.most_common(1)[0][0]
            target = f"about {who} . at last {' '.join(passage[-1])}"
            rows.append({"source": " ".join(w for s in passage for w in s), "target": target})
    return rows


def meetings():
    """The pairs of each meeting."""
    for line in (FIXTURES / "qmsum" / "val.jsonl").read_text(encoding="utf-8").splitlines():
        meeting = json.loads(line)
        turns, rows = meeting["meeting_transcripts"], []
        for asked in meeting["specific_query_list"]:
            shown = []
            for first, last in asked["relevant_text_span"]:
                shown += [t["content"] for t in turns[int(first) : int(last) + 1]]
            shown = " ".join(" ".join(shown).split()[:TURNS])
            rows.append({"source": f"{asked['query']} {shown}", "target": asked["answer"]})
        yield rows


def save(where, tokenizer):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    own.save_pretrained(where)
    config = T5 | {"vocab_size": len(own)}
    (where / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main(out="runs/small_t5"):
    """{task: {set: number of pairs}}."""
    out, rng, data = Path(out), random.Random(0), {}
    told = stories()
    vocabulary = sorted({w for story in told for s in story for w in s} | {"about", "last"})
    ids = {w: i for i, w in enumerate([*SPECIAL, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save(out / "words", tokenizer)

    for name, change in {"copy": list, "reverse": lambda some: some[::-1]}.items():
        sizes = {"train": 60_000, "validation": 500, "test": 500}
        data[name] = {k: spans(rng, vocabulary, n, change) for k, n in sizes.items()}
    raw = (FIXTURES / "tinystories-text" / "tinystories.txt").read_text(encoding="utf-8")
    known = {name.lower() for name in names(raw)} | {"tree", "car", "dog", "cat", "bird", "mom"}
    rng.shuffle(told)
    parts = {"train": told[24:], "validation": told[:12], "test": told[12:24]}
    sizes = {"train": 8000, "validation": 200, "test": 200}
    data["summary"] = {k: summaries(rng, some, known, sizes[k]) for k, some in parts.items()}

    asked = list(meetings())
    groups = {"train": asked[10:], "validation": asked[:3], "test": asked[3:10]}
    data["qmsum"] = {k: [row for rows in some for row in rows] for k, some in groups.items()}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    texts = [text for row in data["qmsum"]["train"] for text in row.values()]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False)
    )
    save(out / "pieces", tokenizer)

    control = list(data["reverse"]["train"])
    targets = [row["target"] for row in control]
    rng.shuffle(targets)
    shuffled = [row | {"target": t} for row, t in zip(control, targets, strict=True)]
    data["shuffled"] = data["reverse"] | {"train": shuffled}
    data["reverse"]["train"] += spans(random.Random(1), vocabulary, 240_000, lambda some: some[::-1])
    for task, sets in data.items():
        for name, rows in sets.items():
            write(out / "data" / task / f"{name}.jsonl", rows)
    return {task: {k: len(v) for k, v in sets.items()} for task, sets in data.items()}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
