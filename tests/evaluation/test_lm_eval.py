"""lm-eval: log-likelihoods and answers of its own backend `hf`, on three tasks of local files."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity
FIXTURE = "stories260K-hf"


def tasks(folder):
    """Three tasks: a choice between continuations, the perplexity of texts, and generation."""
    stories = [
        "Once upon a time, there was a little girl named Lily. She loved to play outside.",
        "One day, a boy named Tim found a big red ball in the park.",
        "The cat sat on the mat and looked at the bird in the tree.",
        "Mom said it was time to go home, but Ben wanted to play.",
    ]
    rows = []
    for text in stories:
        words = text.split()
        right, wrong = " ".join(words[5:]), " ".join(reversed(words[5:]))
        rows.append(dict(text=text, start=" ".join(words[:5]), choices=[right, wrong], answer=0))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = dict(dataset_path="json", dataset_kwargs={"data_files": {"test": str(file)}}, test_split="test")
    choice = common | dict(
        task="choose", output_type="multiple_choice", doc_to_text="{{start}}",
        doc_to_choice="{{choices}}", doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    rolling = common | dict(
        task="perplexity", output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    written = common | dict(
        task="write", output_type="generate_until", doc_to_text="{{start}}",
        doc_to_target="{{choices[0]}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["."], "max_gen_toks": 24, "do_sample": False},
    )  # fmt: skip
    return [choice, rolling, written]


def test_equal_to_the_backend_hf(tmp_path, monkeypatch, fixtures):
    lm_eval = pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lm_eval.models.huggingface import HFLM

    from sftjax.files import load_python

    script = Path(__file__).resolve().parents[2] / "benchmarks" / "lm_eval_harness.py"
    SftjaxLM = load_python(str(script), "the script").SftjaxLM

    path = os.fspath(fixtures / FIXTURE)
    ours = SftjaxLM(pretrained=path)
    theirs = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=2)
    found = []
    length = {"choose": 512, "perplexity": 16, "write": 128}  # 16: a text takes several windows
    for lm in (ours, theirs):
        length = {"choose": 512, "perplexity": 16, "write": 128}
        for task in tasks(tmp_path):
            setattr(lm, "max_length" if lm is ours else "_max_length", length[task["task"]])
            out = lm_eval.simple_evaluate(lm, tasks=[task], log_samples=True, bootstrap_iters=0)
            found.append(out["samples"][task["task"]])
    for mine, other in zip(found[:3], found[3:], strict=True):
        for a, b in zip(mine, other, strict=True):
            assert same(a["resps"], b["resps"]), (a["resps"], b["resps"])
    greedy = [x["resps"][0][0] for x in found[2]]
    assert all(greedy) and not any("." in text for text in greedy)


def same(a, b):
    """Equal texts and decisions, numbers within 1e-4."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return abs(a - b) < 1e-4
    return a == b
