"""Answers to questions by generation, beside transformers' generate: the same texts, and the time.

    python benchmarks/generate.py --model=<directory> --data=<file> [--out=FILE]

Both answer the same questions greedily, in batches of 64, up to 64 tokens or the end of the answer,
in float32, in turns; transformers pads at the left and keeps its cache, on as many threads. The
first round, in which ours compiles, is shown apart. Needs torch.
"""

import argparse
import json
import os
import statistics
import time

import jax
import numpy as np

from sftjax import config as config_lib
from sftjax import parallel, tasks
from sftjax.data import open_source
from sftjax.evaluation.generation import generate
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.training import build, xla_flags

BATCH, NEW = 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="questions, or texts that are gone on with")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--words", type=int, default=6, help="of a text: what stands before")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    xla_flags.settle()
    config = config_lib.get_default()
    config.model.path, config.model.dtype = args.model, "float32"
    tokenizer = load_tokenizer(config)
    task = tasks.make(config, tokenizer)
    source = open_source(args.data, args.limit)
    if set(source[0]) <= {"text"}:
        starts = (" ".join(source[i]["text"].split()[: args.words]) for i in range(len(source)))
        prompts = [np.array(tokenizer(text)["input_ids"]) for text in starts]
    else:
        prompts = [asked.prompt for asked in task.questions(source)]
    ours, theirs = of_sftjax(config, task, prompts), of_transformers(args.model, task, prompts)
    seconds, texts = {"sftjax": [], "transformers": []}, {}
    for _ in range(args.rounds + 1):
        for name, fn in ("sftjax", ours), ("transformers", theirs):
            began = time.perf_counter()
            texts[name] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in fn()]
            seconds[name].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(*(seconds[k][1:] for k in seconds), strict=True)]
    result = {
        "model": os.path.basename(os.path.normpath(args.model)),
        "questions": len(prompts),
        "cores": os.cpu_count(),
        "first_round_s": {k: round(v[0], 2) for k, v in seconds.items()},
        "seconds": {k: round(statistics.median(v[1:]), 3) for k, v in seconds.items()},
        "times_as_fast": [round(f(ratios), 2) for f in (min, statistics.median, max)],
        "same_texts": sum(a == b for a, b in zip(*texts.values(), strict=True)),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        with open(args.out, "w", encoding="utf-8") as f:
            f.write(json.dumps(result, indent=1) + "\n")


def of_sftjax(config, task, prompts):
    mesh = parallel.make_mesh({"fsdp": -1})
    model, trainable = build.make_model(config, task)
    with jax.set_mesh(mesh):
        params, _ = build.make_params(config.model, model, trainable, mesh)
    options = dict(stop_ids=task.stop_ids, max_new_tokens=NEW, batch_size=BATCH, mesh=mesh)

    def answer():
        with jax.set_mesh(mesh):
            return generate(model, params, prompts, **options)

    return answer


def of_transformers(path, task, prompts):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # as ours, for less padding

    def answer():
        out = [None] * len(prompts)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            width = max(len(prompts[i]) for i in rows)
            tokens = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for j, i in enumerate(rows):
                n = len(prompts[i])
                tokens[j, width - n :] = torch.as_tensor(np.asarray(prompts[i]))
                mask[j, width - n :] = 1
            with torch.inference_mode():
                found = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=NEW,
                    do_sample=False,
                    eos_token_id=task.stop_ids,
                    pad_token_id=0,
                )
            for j, i in enumerate(rows):
                ids = found[j, width:].tolist()
                ends = [n for n, token in enumerate(ids) if token in task.stop_ids]
                out[i] = ids[: ends[0]] if ends else ids
        return out

    return answer


if __name__ == "__main__":
    main()
