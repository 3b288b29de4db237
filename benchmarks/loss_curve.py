"""The loss curve of sftjax beside two references: a plain torch loop and TRL's SFTTrainer.

    python benchmarks/loss_curve.py [--data gsm8k oasst] [--steps=50] [--out=runs/loss_curve]

Real weights (stories260K: Llama, 5 layers, width 64, vocabulary 512), real rows, fp32, AdamW with
decay on matrices only, clipping, warm-up and cosine; eight minutes of CPU time in all. The same
initial weights and the same rows in the same order on every side:

sftjax   sftjax.data.encode and make_batch, train_step; once more (x4) with 4 micro-batches
torch    transformers' model, each document alone in a padded row, one division a step
TRL      SFTTrainer: its own tokenising, masking and bfd packing; once more with accumulation 4

gsm8k: text prompts and completions, trained on the completion. oasst: every assistant message with
the turns before it, trained on all assistant turns. The rows are TRL's (sftjax's bfd fills rows
better, so it makes others); what TRL's model was given is checked, token by token, against sftjax's
batch. Exit code 1 where a step differs by more than 1e-4, or the mean of the steps' absolute
differences is more than 1e-5 (relative). Controls are sftjax with one mistake.

What remains is about 1e-6 and mostly of one sign: optax computes Adam's 1 - b2**step in float32.

Needs the extra `parity` and $SFTJAX_FIXTURES (default ../shared/fixtures beside the repository).
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import datasets
import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import trl

import sftjax
from sftjax import config as config_lib
from sftjax import optim
from sftjax import params as params_lib
from sftjax.reports import curves as curves_lib

MODEL = "stories260K-hf"
LENGTH, ROWS = 512, 4  # tokens in a row, the model's context; rows in a step
LR, WARMUP, DECAY, CLIP = 1e-3, 5, 0.1, 1.0  # the rest is AdamW's default on all sides
EACH, MEAN = 1e-4, 1e-5  # bounds of the relative difference: of each step, of the mean of all
DOCUMENTS = 1000  # TRL packs so many at a time

# The end of a turn is the tokenizer's own special token. The tags are what TRL finds turns by.
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

# ---- data ----------------------------------------------------------------------------------


def gsm8k(fixtures):
    for row in _jsonl(fixtures / "gsm8k" / "train.jsonl"):
        yield {"prompt": row["question"] + "\n", "completion": row["answer"]}


def oasst(fixtures):
    for tree in _jsonl(fixtures / "oasst-en-100" / "en_100_tree.jsonl"):
        for messages in _answers(tree["prompt"], []):
            yield {"messages": messages}


def _answers(node, before):
    """Every assistant message of a tree, as the last of a conversation."""
    role = {"prompter": "user"}.get(node["role"], node["role"])
    messages = [*before, {"role": role, "content": node["text"]}]
    if role == "assistant":
        yield messages
    for reply in node["replies"]:
        yield from _answers(reply, messages)


def _jsonl(path):
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


DATA = {"gsm8k": gsm8k, "oasst": oasst}


class Task:
    """One data set: documents as sftjax encodes them, packed rows, and the rows of each step."""

    def __init__(self, name, fixtures, steps):
        self.path = fixtures / MODEL
        self.records = list(itertools.islice(DATA[name](fixtures), DOCUMENTS))
        self.chat = "messages" in self.records[0]
        tokenizer = self.tokenizer()
        self.documents = [sftjax.data.encode(r, tokenizer) for r in self.records]
        self.rows = _trl_rows(self.documents)
        if len(self.rows) < steps * ROWS:
            raise ValueError(
                f"{name}: {len(self.rows)} rows, but {steps} steps of {ROWS} need {steps * ROWS}: "
                f"set --steps to {len(self.rows) // ROWS} or less"
            )
        # bfd makes its longest rows first: any other order mixes them
        order = np.random.default_rng(0).permutation(len(self.rows))[: steps * ROWS]
        self.steps = order.reshape(steps, ROWS).tolist()

    def tokenizer(self):
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
        tokenizer.chat_template = CHAT if self.chat else None
        return tokenizer

    def batches(self):
        for step in self.steps:
            rows = [self.rows[r] for r in step]
            yield sftjax.data.make_batch(self.documents, LENGTH, rows)

    def pieces(self, step):
        """(tokens, weights) of each document of a step."""
        for d, start, stop in itertools.chain(*(self.rows[r] for r in step)):
            yield self.documents[d].tokens[start:stop], self.documents[d].weights[start:stop]


def _trl_rows(documents):
    """Rows as TRL packs them, each a list of (document, start, stop), from a column of owners."""
    owners = {"document": [[i] * len(d.tokens) for i, d in enumerate(documents)]}
    packed = trl.pack_dataset(datasets.Dataset.from_dict(owners), LENGTH, "bfd")["document"]
    return [[(d, 0, len(list(run))) for d, run in itertools.groupby(row)] for row in packed]


# ---- the curves: each a loss for every step ------------------------------------------------


def sftjax_curve(task, micro_batches=1, change=lambda batch: batch, warmup=WARMUP):
    state, step = _prepared(task.path, len(task.steps), micro_batches, warmup)
    losses = []
    for batch in task.batches():
        state, metrics = step(state, change(batch))
        losses.append(float(metrics["loss"]))
    return losses


@functools.cache  # compiled once for all curves and data sets
def _prepared(path, steps, micro_batches, warmup):
    """The state at step 0, and the jitted train_step."""
    model, params = sftjax.load_pretrained(path)
    c = config_lib.get_default().optim
    c.update(lr=LR, weight_decay=DECAY, clip=CLIP)
    everything = params_lib.map_named(lambda *_: True, model.abstract)
    lr = optim.schedule("cosine", c.lr, steps, warmup)
    tx = optim.make(c, lr, model.abstract, everything)
    loss_fn = sftjax.losses.causal_lm(model)
    step = functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=micro_batches)
    return sftjax.TrainState.create(params=params, tx=tx), jax.jit(step)


def torch_curve(task):
    model = transformers.AutoModelForCausalLM.from_pretrained(task.path, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, len(task.steps))
    losses = []
    for step in task.steps:
        loss = _mean_cross_entropy(model, list(task.pieces(step)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _mean_cross_entropy(model, documents):
    """Over the trained tokens of documents that each stand in a right-padded row of their own."""

    def padded(arrays):
        tensors = [torch.tensor(x) for x in arrays]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    tokens = padded([tokens for tokens, _ in documents]).long()
    trained = padded([weights > 0 for _, weights in documents])
    mask = padded([np.ones(len(tokens), np.int64) for tokens, _ in documents])
    logits = model(input_ids=tokens, attention_mask=mask).logits
    labels = tokens.masked_fill(~trained, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Recorder(trl.SFTTrainer):
    """SFTTrainer that takes the rows in a given order and keeps what its model was given."""

    def __init__(self, order, **kwargs):
        super().__init__(**kwargs)
        self.order, self.given = order, []

    def _get_train_sampler(self, *args):
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.given.append((inputs, loss.item(), int(num_items_in_batch)))
        return loss


def trl_curve(task, accumulation=1):
    """Raises ValueError where TRL's model was given other rows than sftjax's."""
    with tempfile.TemporaryDirectory() as out:
        settings = trl.SFTConfig(
            output_dir=out, max_steps=len(task.steps), packing=True, packing_strategy="bfd",
            max_length=LENGTH, assistant_only_loss=task.chat, shuffle_dataset=False,
            per_device_train_batch_size=ROWS // accumulation,
            gradient_accumulation_steps=accumulation, learning_rate=LR, weight_decay=DECAY,
            max_grad_norm=CLIP, lr_scheduler_type="cosine", warmup_steps=WARMUP, bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Recorder(
            order=list(itertools.chain(*task.steps)),
            model=transformers.AutoModelForCausalLM.from_pretrained(task.path, dtype=torch.float32),
            args=settings,
            train_dataset=datasets.Dataset.from_list(task.records),
            processing_class=task.tokenizer(),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = []
    for step, batch in enumerate(task.batches(), 1):
        given = trainer.given[(step - 1) * accumulation : step * accumulation]
        _check_given(f"step {step}, accumulation {accumulation}", given, batch)
        losses.append(sum(loss for _, loss, _ in given))  # each is divided by the step's tokens
    return losses


def _check_given(where, given, batch):
    """What TRL gave its model is `batch`, its rows run together, divided by its trained tokens."""
    real = batch["segments"] > 0
    tokens, trained = batch["tokens"][real], batch["weights"][real] > 0
    expected = {
        "input_ids": tokens,
        "position_ids": batch["positions"][real],
        "labels": np.where(np.roll(trained, 1), tokens, -100),  # a row's last target is untrained
    }
    for key, ours in expected.items():
        theirs = np.concatenate([inputs[key].numpy()[0] for inputs, *_ in given])
        if not np.array_equal(theirs, ours):
            raise ValueError(f"{where}: TRL's {key} differ from sftjax's: {theirs} and {ours}")
    if {divisor for *_, divisor in given} != {int(trained.sum())}:
        found = [divisor for *_, divisor in given]
        raise ValueError(f"{where}: TRL divides by {found}, expected {trained.sum()} each time")


# ---- comparison ----------------------------------------------------------------------------

CURVES = {
    "sftjax": sftjax_curve,
    "sftjax x4": functools.partial(sftjax_curve, micro_batches=4),
    "torch": torch_curve,
    "TRL": trl_curve,
    "TRL x4": functools.partial(trl_curve, accumulation=4),
}
PAIRS = [("sftjax", "torch"), ("sftjax", "TRL"), ("sftjax x4", "TRL x4")]
REFERENCES = ("TRL", "torch")  # printed as well: how far the references are from each other

PLOTTED = ("sftjax", "torch", "TRL", "no isolation")

CONTROLS = {
    "no isolation": dict(change=lambda b: b | {"segments": np.minimum(b["segments"], 1)}),
    "mean of row means": dict(
        change=lambda b: b | {"weights": b["weights"] / b["weights"].sum(1, keepdims=True).clip(1)}
    ),
    "longer warm-up": dict(warmup=WARMUP + 1),
}


def differences(ours, theirs):
    """Of each step, relative."""
    return (np.array(ours) - theirs) / theirs


def summary(ours, theirs):
    relative = differences(ours, theirs)
    worst, mean = float(np.abs(relative).max()), float(np.abs(relative).mean())
    return dict(
        max=worst, mean=mean, mean_signed=float(relative.mean()),
        passed=bool(worst <= EACH and mean <= MEAN),
    )  # fmt: skip


def measure(name, fixtures, steps, controls=CONTROLS):
    task = Task(name, fixtures, steps)
    curves = {curve: make(task) for curve, make in CURVES.items()}
    wrong = {control: sftjax_curve(task, **how) for control, how in controls.items()}
    return dict(
        rows=steps * ROWS,
        documents=sum(len(list(task.pieces(step))) for step in task.steps),
        trained_tokens=int(sum(batch["weights"].sum() for batch in task.batches())),
        differences={f"{a} - {b}": summary(curves[a], curves[b]) for a, b in [*PAIRS, REFERENCES]},
        controls={control: summary(curve, curves["torch"]) for control, curve in wrong.items()},
        curves=curves | wrong,
    )


def show(name, result):
    curves = result["curves"]
    print(
        f"\n{name}: {result['rows']} rows, {result['documents']:,} documents, "
        f"{result['trained_tokens']:,} trained tokens; relative differences in 1e-6"
    )
    heads = [f"{a} - {b}" for a, b in PAIRS]
    print("step" + "".join(f"{c:>12}" for c in CURVES) + "".join(f"{h:>20}" for h in heads))
    columns = [differences(curves[a], curves[b]) * 1e6 for a, b in PAIRS]
    for i in range(len(curves["torch"])):
        losses = "".join(f"{curves[c][i]:>12.6f}" for c in CURVES)
        print(f"{i + 1:>4}{losses}" + "".join(f"{column[i]:>+20.2f}" for column in columns))
    print(f"\n{'':<30}{'max |.|':>10}{'mean |.|':>10}{'mean':>10}   bounds: {EACH:g}, {MEAN:g}")
    for group in ("differences", "controls"):
        for title, facts in result[group].items():
            numbers = [facts[k] for k in ("max", "mean", "mean_signed")]
            verdict = "within" if facts["passed"] else "OUT OF BOUNDS"
            print(f"{title:<30}" + "".join(f"{x:>10.1e}" for x in numbers) + f"   {verdict}")


def save(out, command, results):
    """loss_curve.json, and a loss_curve_<data>.svg for each data set."""
    out.mkdir(parents=True, exist_ok=True)
    packages = ("jax", "optax", "torch", "transformers", "trl", "accelerate")
    facts = dict(
        command=command,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        python=platform.python_version(),
        packages={p: importlib.metadata.version(p) for p in packages},
        settings=dict(model=MODEL, length=LENGTH, rows=ROWS, lr=LR, warmup=WARMUP,
                      weight_decay=DECAY, clip=CLIP, each=EACH, mean=MEAN),
        results=results,
    )  # fmt: skip
    (out / "loss_curve.json").write_text(json.dumps(facts, indent=1) + "\n")
    for name, result in results.items():
        series = {f"{c}/loss": list(enumerate(result["curves"][c], 1)) for c in PLOTTED}
        title = f"Loss on {name}"
        figure = curves_lib.loss_figure(series, title)
        curves_lib.save(figure, out / f"loss_curve_{name}.svg", title)


def main(argv=None):
    beside = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/loss_curve"))
    args = parser.parse_args(argv)
    fixtures = Path(os.environ.get("SFTJAX_FIXTURES") or beside)
    if not fixtures.is_dir():
        parser.error(f"no fixtures directory at {fixtures}; set SFTJAX_FIXTURES to where it lies")
    torch.set_num_threads(1)  # sums in one order, and no threads that wait for a busy core
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = {name: measure(name, fixtures, args.steps) for name in args.data}
    for name, result in results.items():
        show(name, result)
    command = f"python benchmarks/loss_curve.py --data {' '.join(args.data)} --steps={args.steps}"
    save(args.out, command, results)
    passed = [facts["passed"] for r in results.values() for facts in r["differences"].values()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
