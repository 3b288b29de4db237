"""One answer of a model: the command `sftjax generate --model=DIR --prompt=TEXT`."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from sftjax import exits, hf
from sftjax.data import stop_ids
from sftjax.data.masking.template import load_template
from sftjax.errors import DataError, NotFoundError
from sftjax.evaluation import generation
from sftjax.hf.tokenizer_files import open_tokenizer
from sftjax.tasks.image_text import MARK, ImageText
from sftjax.terminal import show


def main(argv: Sequence[str]) -> None:
    """Print one answer, for a look at an exported model."""
    parser = argparse.ArgumentParser(prog="sftjax generate")
    parser.add_argument("--model", required=True, help="Hugging Face directory, such as an export")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--system", default="")
    parser.add_argument("--image", action="append", default=[], help="a file; given again, one more; <image> in"
                        " --prompt says where it stands, else it comes first")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    path = hf.resolve(args.model)
    if not path.is_dir():
        raise NotFoundError(f"--model={args.model} is no directory")
    tokenizer = open_tokenizer(path, "--model")
    if not tokenizer.chat_template:
        problem = "its tokenizer has no chat template"
        raise DataError(problem, where=f"--model={path}", kind="no_template")
    messages = [{"role": "system", "content": args.system}] if args.system else []
    model = hf.load_model(path)
    if args.image and not hasattr(model.config, "vision"):
        raise DataError(f"--image={args.image[0]}: --model={path} reads no images", kind="setting")
    prompt = MARK * (len(args.image) - args.prompt.count(MARK)) + args.prompt
    files = list[bytes]()
    if hasattr(model.config, "vision"):
        task = ImageText(tokenizer).reads(model.config)
        asked, files = task.separated({"prompt": prompt, "images": args.image}, "--image:0")
        prompt, tokenizer = asked["prompt"], task.tokenizer
    messages.append({"role": "user", "content": prompt})
    chat: dict[str, Any] = dict(messages=messages, tools=None, options={}, where=f"--model={path}")
    [text] = load_template(tokenizer).render([chat], generate=True)
    model, params = hf.load_pretrained(path)
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    options: dict[str, Any] = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    if hasattr(model.config, "vision"):
        ids = np.repeat(ids, task.expanded(ids, files, "--image:0")[0])
        options |= {"beside": lambda rows: task.beside_prompts([files])} if files else {}
    out = generation.generate(model, params, [ids], stop_ids=stop_ids(tokenizer), **options)
    show(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    exits.run(main)
