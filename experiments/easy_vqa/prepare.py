"""Make easy-VQA's conversations, a word tokenizer, and an untrained LLaVA: a small tower and a small decoder.

    python experiments/easy_vqa/prepare.py [runs/easy_vqa_data]

$SFTJAX_FIXTURES is the directory that holds easy-vqa/. An image has one conversation with all its questions; the last
400 of 4,000 images are asked about in test.jsonl, 500 of their questions, each alone, and the 200 before them are
validation.jsonl. blind/ has the same without images, the control: what the questions alone give away.
"""

import json
import os
import random
import sys
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES", "../shared/fixtures"))
SPECIAL = ["<pad>", "<bos>", "<|end|>", "<unk>", "<image>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOWER = dict(
    model_type="siglip_vision_model", hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=192, image_size=64, patch_size=8,
)  # fmt: skip
DECODER = dict(
    model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def spaced(question):
    return question.replace("?", " ?")


def conversation(name, asked, images=True):
    turns, mark = [], "<image> " if images else ""
    for question, answer in asked:
        turns += [{"role": "user", "content": mark + spaced(question)}, {"role": "assistant", "content": answer}]
        mark = ""
    return {"messages": turns} | ({"images": [name]} if images else {})


def save_model(out, words):
    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<|end|>", unk_token="<unk>"
    )
    own.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    own.chat_template = TEMPLATE
    own.save_pretrained(out)
    config = dict(
        model_type="llava", architectures=["LlavaForConditionalGeneration"], image_token_index=ids["<image>"],
        vision_feature_select_strategy="full", text_config=DECODER | {"vocab_size": len(own)}, vision_config=TOWER,
        tie_word_embeddings=True,
    )  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main(out="runs/easy_vqa_data"):
    """{set: number of rows}."""
    out, asked, rng = Path(out), {}, random.Random(0)
    questions = json.loads((FIXTURES / "easy-vqa" / "train_questions.json").read_text())
    for question, answer, image in questions:
        asked.setdefault(image, []).append((question, answer))
    with tarfile.open(FIXTURES / "easy-vqa" / "train_images.tar") as file:
        names = {int(Path(m.name).stem): m for m in file if m.isfile() and m.name.endswith(".png")}
        for i, member in names.items():
            path = out / "images" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.extractfile(member).read())
    images = sorted(set(asked) & set(names))
    parts = {"train": images[:-600], "validation": images[-600:-400]}
    single = [(i, [pair]) for i in images[-400:] for pair in asked[i]]
    rows = {name: [(i, asked[i]) for i in some] for name, some in parts.items()}
    rows["test"] = rng.sample(single, 500)
    for name, some in rows.items():
        write(out / f"{name}.jsonl", [conversation(f"images/{i}.png", x) for i, x in some])
        write(out / "blind" / f"{name}.jsonl", [conversation("", x, images=False) for _, x in some])
    words = sorted({w for q, a, _ in questions for w in f"{spaced(q)} {a}".split()})
    save_model(out / "model", words)
    return {name: len(some) for name, some in rows.items()}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
