"""Data preparation beside TRL's, a second start, and the loader beside the trainer it feeds.

    python benchmarks/data.py [--rows=4000] [--rounds=3] [--cached=100000] [--out=data.json]

prepare  The same rows, tokenizer and chat template on both sides, from a file of rows to packed
         rows of 2048 tokens: sftjax's build_store and Rows; TRL's SFTTrainer._prepare_dataset with
         dataset_num_proc=2 and packing bfd. gsm8k: prompts and completions as chats, trained on
         the completion. oasst: conversations, trained on every assistant turn, with the template
         that TRL trains on. Both give the same number of tokens, which is checked. Rounds are
         interleaved: a ratio compares neighbours in time. Processor seconds, of all processes of a
         side, are compared too: other work on the machine disturbs them least.
second   Seconds until the same command knows its rows again, with the cache of the first start.
loader   Tokens/s of the loader alone, and of training steps of shape S (benchmarks/train_step.py).
wait     The share of a training run's time spent waiting for a batch, as its own log says.

Needs the extra `parity` and $SFTJAX_FIXTURES (default ../shared/fixtures beside the repository).
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import psutil
import torch
import train_step
import transformers
import trl
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sftjax import config as config_lib
from sftjax.data import Rows, build_store, loader, open_source
from sftjax.tasks.causal_lm import CausalLM
from sftjax.train import train
from sftjax.training import workdir

LENGTH = 2048
GSM8K = dict(prompt="question", completion="answer")


# ---- rows ----------------------------------------------------------------------------------


def gsm8k(fixtures):
    for row in _jsonl(fixtures / "gsm8k" / "train.jsonl"):
        prompt, completion = row["question"], row["answer"]
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }


def oasst(fixtures):
    for tree in _jsonl(fixtures / "oasst-en-100" / "en_100_tree.jsonl"):
        yield from _answers(tree["prompt"], [])


def _answers(node, before):
    """Every assistant message of a tree, as the last of a conversation."""
    role = {"prompter": "user"}.get(node["role"], node["role"])
    messages = [*before, {"role": role, "content": node["text"]}]
    if role == "assistant":
        yield {"messages": messages}
    for reply in node["replies"]:
        yield from _answers(reply, messages)


def _jsonl(path):
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write(path, rows, n):
    """The first n of the rows, over and over."""
    rows = list(rows)
    with open(path, "w", encoding="utf-8") as file:
        for row in itertools.islice(itertools.cycle(rows), n):
            file.write(json.dumps(row) + "\n")
    return path


# ---- both sides: a function that prepares the file once and says (tokens, rows) --------------


def ours(path, tokenizer, template):
    # The other side's processes leave it off in this one, where a run of sftjax has it on.
    os.putenv("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as cache:
        source = open_source(path)
        store = build_store(source, CausalLM(tokenizer, dict(template=template)), LENGTH, "error", cache)
        return store.report["tokens"], Rows(store, LENGTH).per_epoch


def trl_trainer(path, tokenizer, folder):
    chats = "messages" in next(_jsonl(path))
    args = trl.SFTConfig(
        output_dir=str(folder), packing=True, packing_strategy="bfd", max_length=LENGTH,
        dataset_num_proc=2, assistant_only_loss=chats, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    rows = datasets.Dataset.from_list(list(itertools.islice(_jsonl(path), 4)))
    tiny = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(tiny)  # not used: the trainer wants one
    return trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def theirs(trainer, rows, tokenizer):
    packed = trainer._prepare_dataset(rows, tokenizer, trainer.args, True, None, "train")
    return sum(map(len, packed["input_ids"])), len(packed)


def prepare(name, fixtures, folder, n, rounds):
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer-qwen")
    path = write(folder / f"{name}.jsonl", {"gsm8k": gsm8k, "oasst": oasst}[name](fixtures), n)
    trainer = trl_trainer(path, tokenizer, folder / "trl")
    rows = datasets.Dataset.from_json(str(path), cache_dir=str(folder / "arrow"))
    sides = {
        "sftjax": lambda: ours(path, tokenizer, trainer.chat_template),
        "TRL": lambda: theirs(trainer, rows, tokenizer),
    }
    seconds, cpu, found = {side: [] for side in sides}, {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, run in sides.items():
            began, used = time.perf_counter(), processor_seconds()
            found[side] = run()
            seconds[side].append(time.perf_counter() - began)
            cpu[side].append(processor_seconds() - used)
            print(f"{name}: {side} {seconds[side][-1]:.1f} s, {cpu[side][-1]:.1f} s of processors")
    if found["sftjax"][0] != found["TRL"][0]:
        raise ValueError(f"{name}: unequal (tokens, rows): {found}")
    return dict(
        rows=n,
        tokens=found["TRL"][0],
        packed_rows={side: rows for side, (_, rows) in found.items()},
        rows_per_s={side: n / statistics.median(times) for side, times in seconds.items()},
        ratio=ratios(seconds),
        processor_s={side: statistics.median(times) for side, times in cpu.items()},
        processor_ratio=ratios(cpu),
    )


def ratios(seconds):
    """[least, median, most] of TRL's by ours, round by round."""
    each = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    return [min(each), statistics.median(each), max(each)]


def processor_seconds():
    """Of this process and its children, those that have ended too."""
    own, us = psutil.Process().cpu_times(), psutil.Process()
    used = [own, *(child.cpu_times() for child in us.children(recursive=True))]
    return sum(t.user + t.system for t in used) + own.children_user + own.children_system


# ---- what comes after ----------------------------------------------------------------------


def second_start(fixtures, folder, n):
    """(seconds of the first start, of the second)."""
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer-qwen")
    path = write(folder / "many.jsonl", _jsonl(fixtures / "gsm8k" / "train.jsonl"), n)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        policy = dict(fields=GSM8K)
        store = build_store(open_source(path), CausalLM(tokenizer, policy), LENGTH, "error", folder / "cache")
        Rows(store, LENGTH)
        seconds.append(time.perf_counter() - began)
    return dict(rows=n, first_s=seconds[0], second_s=seconds[1])


def feeding(fixtures, folder, steps=500):
    """Tokens/s of the loader, and of training steps, with batches of shape S."""
    _, rows, length = train_step.SHAPES["S"]
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer-llama2")
    source = open_source(fixtures / "gsm8k" / "train.jsonl")
    policy = dict(fields=GSM8K)
    store = build_store(source, CausalLM(tokenizer, policy), length, "truncate_end", folder / "cache")
    packed = Rows(store, length)
    packed.total = steps * rows
    one = train_step.prepare("S", *train_step.VARIANTS["default"])
    began = time.perf_counter()
    tokens = sum(batch["tokens"].size for batch in loader(packed, rows))
    loading = tokens / (time.perf_counter() - began)
    training = rows * length / min(one() for _ in range(5))
    return dict(loader=loading, trainer=training, ratio=loading / training)


def wait_share(fixtures, folder, steps=20):
    """data_wait of the log's lines after the first, of a run of shape S."""
    model, rows, length = train_step.SHAPES["S"]
    sizes = dataclasses.asdict(model)
    names = dict(vocab="vocab_size", width="hidden_size", layers="num_hidden_layers")
    names |= dict(heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim")
    names |= dict(mlp="intermediate_size", tied="tie_word_embeddings")
    described = {theirs: sizes[mine] for mine, theirs in names.items()} | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(described))
    c = config_lib.get_default()
    c.model.path, c.model.init = str(folder), "random"
    c.data.tokenizer = str(fixtures / "tokenizer-llama2")
    c.data.train, c.data.max_length = str(fixtures / "gsm8k" / "train.jsonl"), length
    c.data.fields.update(GSM8K)
    c.train.update(batch_size=rows, duration=f"{steps} steps", log_every=f"{steps // 4} steps")
    c.train.update(checkpoint_every="100%", export=False, tensorboard=False)
    train(c, folder / "run")
    lines = list(_jsonl(folder / "run" / "metrics.jsonl"))[1:]
    return max(line["data_wait"] for line in lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cached", type=int, default=100_000)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    here = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    fixtures = Path(os.environ.get("SFTJAX_FIXTURES") or here)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepared = {n: prepare(n, fixtures, folder, args.rows, args.rounds) for n in ("gsm8k", "oasst")}
        second = second_start(fixtures, folder, args.cached)
        fed = feeding(fixtures, folder)
        wait = wait_share(fixtures, folder)
    print(f"\n{'prepare':<10}{'sftjax rows/s':>16}{'TRL rows/s':>14}", end="")
    print(f"{'ratio':>20}{'of processor time':>22}")
    for name, found in prepared.items():
        mine, other = found["rows_per_s"].values()
        spans = [found[key] for key in ("ratio", "processor_ratio")]
        spans = [f"{middle:.1f} ({low:.1f}..{high:.1f})" for low, middle, high in spans]
        print(f"{name:<10}{mine:>16,.0f}{other:>14,.0f}{spans[0]:>20}{spans[1]:>22}")
    print(f"second start, {args.cached:,} rows: {second['second_s']:.2f} s", end="")
    print(f" (the first: {second['first_s']:.0f} s)")
    print(f"loader {fed['loader']:,.0f} tokens/s, trainer {fed['trainer']:,.0f}: {fed['ratio']:.0f}x")
    print(f"waiting for data: {wait:.2%} of the time")
    if args.out:
        results = dict(prepare=prepared, second_start=second, feeding=fed, data_wait=wait)
        versions = {m.__name__: m.__version__ for m in (trl, datasets, torch)}
        environment = workdir.environment() | dict(others=versions, cores=os.cpu_count())
        value = {"environment": environment, "results": results}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
