"""Training steps of encoders and of an encoder-decoder, compiled for TPU slices that are not here.

    python benchmarks/tpu_encoders.py [--runs=bert-v5e,t5-v5e,...] [--out=FILE] [--texts=DIR]

Needs the extra `tpu`, no TPU. Each run is the whole step of full fine-tuning with AdamW, float32
weights and moments, bfloat16 matmuls, rows that are full. Reported are the compiler's bytes of a
device and the projection of `plan`, and whether the program holds an array of [S, S], the scores of
a row; --texts keeps the programs.
"""

import argparse
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path

from sftjax import config as config_lib
from sftjax.ops.attention.blockwise import BLOCK
from sftjax.plan import compile as plan
from sftjax.plan import hardware as targets
from sftjax.plan import hlo
from sftjax.training import workdir

BERT_LARGE = dict(
    model_type="bert", vocab_size=30522, hidden_size=1024, num_hidden_layers=24,
    num_attention_heads=16, intermediate_size=4096, max_position_embeddings=512, type_vocab_size=2,
)  # fmt: skip
T5_3B = dict(
    model_type="t5", vocab_size=32128, d_model=1024, d_kv=128, d_ff=16384, num_heads=32,
    num_layers=24, relative_attention_num_buckets=32, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
MODERNBERT_LARGE = dict(
    model_type="modernbert", vocab_size=50368, hidden_size=1024, intermediate_size=2624,
    num_hidden_layers=28, num_attention_heads=16, local_attention=128, global_attn_every_n_layers=3,
    max_position_embeddings=8192,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """rows: over all devices; target: tokens of a row of targets, 0 for a task without them."""

    model: dict
    slice: str
    rows: int
    length: int
    target: int = 0
    attention: str = "splash"
    remat: str = "dots"


RUNS = {
    "bert-v5e": Run(BERT_LARGE, "v5e:2x2", 128, 512),
    "t5-v5e": Run(T5_3B, "v5e:2x4", 64, 512, 128, "blockwise", "full"),
    "modernbert-v5e": Run(MODERNBERT_LARGE, "v5e:2x4", 16, 8192),
    "bert-v5p": Run(BERT_LARGE, "v5p:2x2x1", 768, 512),
    "t5-v5p": Run(T5_3B, "v5p:2x2x2", 256, 512, 128, "blockwise", "dots"),
    "modernbert-v5p": Run(MODERNBERT_LARGE, "v5p:2x2x1", 32, 8192),
}


def config_of(run: Run, folder: str):
    """The config of a run, whose model is a config.json in a folder."""
    Path(folder, "config.json").write_text(json.dumps(run.model))
    c = config_lib.get_default()
    c.task = "seq2seq" if run.target else "classification"
    if not run.target:
        c.data.labels = ("negative", "positive")
    c.model.path, c.model.init = folder, "random"
    c.model.attention, c.model.remat = run.attention, run.remat
    c.data.max_length, c.data.max_target_length = run.length, run.target
    c.train.batch_size = run.rows
    return c


def squares(text: str, length: int) -> list[str]:
    """Of a program's text the arrays of scores: of a row's length twice, in attention or unnamed.

    Elsewhere a width may happen to be that length; whole numbers are dropout's bits, which lie in
    half of a width.
    """
    found = set()
    for line in text.splitlines():
        made = re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([\w-]+)\(", line)
        name = re.search(r'op_name="([^"]*)"', line)
        if not made or made[2] == "parameter" or (name and "attention" not in name[1]):
            continue
        for kind, sizes in re.findall(r"\b(b?f\d+|pred)\[([\d,]+)\]", made[1]):
            if sizes.split(",").count(str(length)) > 1:
                found.add(f"{kind}[{sizes}] {name[1] if name else ''}".strip())
    return sorted(found)


def measure(name: str, run: Run, texts: str = "") -> dict:
    """Facts of one run."""
    with tempfile.TemporaryDirectory() as folder:
        # The share that is trained: of pairs the targets', of texts one label a row.
        trained = run.target / (run.length + run.target) if run.target else 1 / run.length
        program = plan.build(config_of(run, folder), targets.resolve(run.slice), trained)
        began = time.monotonic()
        with plan.use(program.mesh):
            compiled = program.step.lower(program.state, program.batch).compile()
    text = compiled.as_text()
    if texts:
        Path(texts, f"{name}.hlo").write_text(text)
    cost = hlo.analyze(text, plan.assumed(text, program))
    p = plan.account(program, "compiled", began, cost, *plan.compiled_memory(program, compiled))
    return dict(
        run=name, target=p.target, mesh=p.mesh, rows=run.rows, length=run.length,
        target_length=run.target, attention=run.attention, remat=run.remat, fits=p.fits,
        peak_gib=p.total / 2**30, memory=p.memory, model_tflop=p.model_flops / 1e12,
        done_tflop=p.hardware_flops / 1e12, loops_assumed=[
            dataclasses.asdict(x) for x in cost.loops if not x.known],
        projection=p.time, compile_s=p.seconds,
        squares={n: squares(text, n) for n in (run.length, run.target) if n > BLOCK},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--texts", default="", help="a folder for the compiled programs")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    results = []
    for name in args.runs.split(","):
        results.append(measure(name, RUNS[name], args.texts))
        r, t = results[-1], results[-1]["projection"]
        print(
            f"{name:<16}{r['peak_gib']:>8.2f} GiB{t['step']:>8.3f} s, MFU {t['mfu']:.1%},"
            f" {t['tokens_per_s']:,.0f} tokens/s; squares: {r['squares']}", flush=True,
        )  # fmt: skip
        if args.out:  # after each: a run takes minutes
            facts = dict(environment=workdir.environment(), results=results)
            Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
