"""What a run shows at its end: the table before and after, samples, and where things lie."""

import json
import os
import sys
from pathlib import Path
from shlex import quote

import jax

from sftjax import metrics
from sftjax.errors import writing


def table(before: dict, after: dict) -> str:
    """A before/after table of exact match and of every validation metric."""
    rows = [("", "before", "after")]
    if "exact_match" in after:
        rows.append(
            ("test exact match", f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}")
        )
    for name, value in after["losses"].items():
        share = name.endswith("accuracy")
        old = before["losses"][name]
        rows.append((name, *(f"{v:.1%}" if share else f"{v:.4f}" for v in (old, value))))
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join(
        f"  {r[0].ljust(widths[0])}  {r[1].rjust(widths[1])}  {r[2].rjust(widths[2])}" for r in rows
    )


def samples(questions, before: dict, after: dict, n: int, tokenizer) -> str:
    """The first n test questions with the answers before and after, and the reference."""
    lines = []
    for i, (prompt, reference) in enumerate(questions[:n]):
        prompt = tokenizer.decode(prompt, skip_special_tokens=True)
        lines += [
            f"  prompt  {_line(prompt)}",
            f"  before  {_line(before['answers'][i])}",
            f"  after   {_line(after['answers'][i])}",
            f"  wanted  {_line(reference)}",
            "",
        ]
    return "\n".join(lines)


def _line(text, most=100):
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= most else text[: most - 3] + "..."


def write_answers(path: Path, questions, before: dict, after: dict, tokenizer) -> None:
    """Every test question with its answers, as JSON lines."""
    with writing("the directory", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing("the file", path), open(path, "w") as f:
        rows = zip(questions, before["answers"], after["answers"], strict=True)
        for (prompt, reference), old, new in rows:
            row = {
                "prompt": tokenizer.decode(prompt),
                "reference": reference,
                "before": old,
                "after": new,
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def finish(config, workdir: Path, feed, tokenizer, result: dict) -> None:
    """Print and write what came of the run (process 0 only)."""
    if jax.process_index():
        return
    before, after = result["before"], result["after"]
    if feed.test or feed.sets:
        print(f"\nAfter {result['steps']} steps:\n{table(before, after)}\n")
    if feed.test:
        write_answers(workdir / "samples" / "test.jsonl", feed.test, before, after, tokenizer)
        print(samples(feed.test, before, after, config.eval.samples, tokenizer))
    metrics.curve_svg(workdir / "metrics.jsonl", workdir / "curve.svg")
    numbers = {
        when: {k: v for k, v in result[when].items() if k != "answers"}
        for when in ("before", "after")
    }
    text = json.dumps(numbers | {"steps": result["steps"]}, indent=2)
    with writing("the file", workdir / "result.json"):
        (workdir / "result.json").write_text(text + "\n")
    for what, path in places(workdir):
        print(f"  {what:<22}{path}")
    if config.train.export and feed.test and tokenizer.chat_template:
        python, export = os.path.relpath(sys.executable), os.path.relpath(workdir / "export")
        print("\nAsk the trained model:")
        system = f" --system={quote(config.data.system)}" if config.data.system else ""
        prompt = quote(feed.question(0))
        print(f"  {python} -m sftjax.generate --model={export}{system} --prompt={prompt}")


def places(workdir: Path) -> list[tuple[str, Path]]:
    """(what, where) of everything the run has left."""
    names = {
        "loss curve": "curve.svg",
        "metrics": "metrics.jsonl",
        "TensorBoard log": "tensorboard",
        "checkpoints": "checkpoints",
        "answers to the test": "samples/test.jsonl",
        "exported model": "export",
    }
    return [(what, workdir / name) for what, name in names.items() if _filled(workdir / name)]


def _filled(path: Path) -> bool:
    return path.is_file() or (
        path.is_dir() and any(p.name != "manifest.json" for p in path.iterdir())
    )
