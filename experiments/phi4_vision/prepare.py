"""Draw charts and screens, ask about them, and make an untrained model of Phi-4-reasoning-vision's shape.

    python experiments/phi4_vision/prepare.py [runs/phi4_vision_data]
    python experiments/phi4_vision/prepare.py [runs/phi4_vision_data] parts runs/phi4_vision_captions/export

A chart has two to five bars of different colours and heights, 1 to 9; a screen two to four buttons in its corners.
Pictures are 40 to 96 pixels wide and high. Training sets, of 6,000 pictures: captions.jsonl says all that is to be
seen; direct.jsonl asks one question of each and answers it; think.jsonl asks with <think> and the answer reads the
picture off first. test_direct.jsonl and test_think.jsonl ask the same 400 questions about new pictures; blind/ has the
sets without pictures, the control.

`parts` makes the start of the recipe from a model trained on captions: its tower and its decoder, and a projector of
new random weights, as of two models that were never together.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COLORS = dict(
    red=(220, 40, 40), green=(40, 170, 60), blue=(40, 80, 220), yellow=(230, 200, 40), black=(20, 20, 20),
    orange=(240, 130, 20),
)  # fmt: skip
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
SPECIAL = ["<pad>", "<bos>", "<|end|>", "<unk>", "<|image|>", "<think>", "</think>", "<nothink>", "<|user|>"]
SPECIAL += ["<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOWER = dict(
    model_type="siglip2_vision_model", hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=192, num_patches=64, patch_size=8,
)  # fmt: skip
DECODER = dict(
    model_type="phi4-siglip", architectures=["Phi4ForCausalLMV"], hidden_size=96, intermediate_size=256,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    original_max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-5, mm_hidden_size=96,
    mm_projector_type="mlp2x_gelu", min_num_patches=25, max_num_patches=144, tie_word_embeddings=False,
    pad_token_id=0, image_token_index=SPECIAL.index("<|image|>"),
)  # fmt: skip


def chart(rng, width, height):
    """(picture, caption, [(question, answer)], what is read off)."""
    picture = Image.new("RGB", (width, height), (250, 250, 250))
    draw, n = ImageDraw.Draw(picture), rng.randint(2, 5)
    names, sizes = rng.sample(list(COLORS), n), rng.sample(range(1, 10), n)
    each = width / n
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        top = height - size * height / 10
        draw.rectangle([i * each + 1, top, (i + 1) * each - 2, height], fill=COLORS[name])
    seen = " , ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    order = sorted(zip(sizes, names, strict=True))
    a, b = rng.sample(range(n), 2)
    asked = [
        ("which bar is tallest ?", order[-1][1]),
        ("which bar is shortest ?", order[0][1]),
        ("how many bars are there ?", str(n)),
        (f"is the {names[a]} bar taller than the {names[b]} bar ?", "yes" if sizes[a] > sizes[b] else "no"),
    ]
    return picture, f"a chart : {seen}", asked, seen


def screen(rng, width, height):
    picture = Image.new("RGB", (width, height), (235, 235, 240))
    draw, n = ImageDraw.Draw(picture), rng.randint(2, 4)
    names, places = rng.sample(list(COLORS), n), rng.sample(list(CORNERS), n)
    for name, place in zip(names, places, strict=True):
        x, y = (at * size / 2 for at, size in zip(CORNERS[place], (width, height), strict=True))
        draw.rectangle([x + 4, y + 4, x + width / 2 - 5, y + height / 2 - 5], fill=COLORS[name])
    seen = " , ".join(f"{name} {place}" for name, place in zip(names, places, strict=True))
    asked = [
        (f"where is the {names[0]} button ?", places[0]),
        (f"what color is the button at the {places[-1]} ?", names[-1]),
    ]
    return picture, f"a screen : {seen}", asked, seen


def pair(mode, question, answer, image, seen):
    says = f"{seen} </think> {answer}" if mode == "<think>" else answer
    return turns(f"<image> {question} {mode}", says, image)


def turns(asked, says, image):
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": says}]
    return {"messages": messages, "images": [image]}


def without_images(row):
    asked, said = row["messages"]
    return {"messages": [asked | {"content": asked["content"].replace("<image> ", "")}, said]}


def make(out, name, n, rng):
    """A list of (caption's row, direct row, row with reasoning) of new pictures."""
    rows = []
    for i in range(n):
        picture, caption, asked, seen = rng.choice([chart, screen])(rng, rng.randint(40, 96), rng.randint(40, 96))
        file = f"images/{name}_{i}.png"
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        picture.save(out / file)
        question, answer = rng.choice(asked)
        both = [pair(mode, question, answer, file, seen) for mode in ("<nothink>", "<think>")]
        rows.append((turns("<image> what is there ?", caption, file), *both))
    return rows


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
    config = DECODER | {"vocab_size": len(own), "vision_config": TOWER}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write(out, name, rows):
    for path, some in ((out / name, rows), (out / "blind" / name, [without_images(r) for r in rows])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in some))


def main(out="runs/phi4_vision_data", what="", export=""):
    """{set: number of rows}."""
    out, rng = Path(out), random.Random(0)
    if what == "parts":
        return parts(out, Path(export))
    sets = {"train": 6000, "validation": 200, "test": 400}
    found = {name: make(out, name, n, rng) for name, n in sets.items()}
    for name, rows in found.items():
        for i, kind in enumerate(("captions", "direct", "think")):
            write(out, f"{kind}.jsonl" if name == "train" else f"{name}_{kind}.jsonl", [row[i] for row in rows])
    texts = [m["content"] for row in found["train"] for one in row for m in one["messages"]]
    save_model(out / "model", sorted({w for t in texts for w in t.split() if w not in SPECIAL} - {"<image>"}))
    return {name: len(rows) for name, rows in found.items()}


def parts(out, export):
    """The directory of the recipe's start."""
    import jax

    from sftjax import hf, params
    from sftjax.hf.tokenizer_files import open_tokenizer

    model, weights = hf.load_pretrained(export)
    new = params.init(model.abstract["projector"], jax.random.key(1))
    hf.save_pretrained(out / "parts", model, weights | {"projector": new}, open_tokenizer(export))
    return {"parts": str(out / "parts")}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
