"""Mixtures as the shipped configs and real data sets describe them."""

import json
import shutil

import numpy as np
import pytest
from test_mix import config, make_feed
from test_train import QUICKSTART

from sftjax import config as config_lib
from sftjax.data import loader


def test_the_curriculum_of_the_configs(tmp_path, monkeypatch):
    from experiments.curriculum import make_data

    monkeypatch.chdir(QUICKSTART.parents[1])
    make_data.main(tmp_path)
    for argument, ends in (("no_replay", (200 * 8, 480 * 8)), ("mixed", ())):
        c = config_lib.load(f"configs/curriculum.py:{argument}")
        c.data.validation = c.data.test = ""
        data = [e["path"].replace("runs/curriculum_data", str(tmp_path)) for e in c.data.sources]
        c.data.sources = tuple(e | {"path": p} for e, p in zip(c.data.sources, data, strict=True))
        shutil.copy(tmp_path / "hard.jsonl", tmp_path / "text.jsonl")
        feed = make_feed(c, tmp_path)
        assert (feed.steps, feed.rows.ends) == (800, ends)
        assert feed.names == ("format", "special", "hard", "text")[: 4 - (argument == "no_replay")]
        assert [len(store) for store in feed.stores[:3]] == [2800, 2100, 2100]


@pytest.mark.fixtures
def test_shares_of_real_data(fixtures, tmp_path):
    """A chat with tools and reasoning, questions under other names, and the quickstart's rows."""
    stories = (fixtures / "tinystories-text" / "tinystories.txt").read_text().split("\n\n")[:300]
    lines = [json.dumps({"text": story}) + "\n" for story in stories if story.strip()]
    (tmp_path / "stories.jsonl").write_text("".join(lines))
    c = config(
        dict(
            path=str(fixtures / "gsm8k" / "train.jsonl"),
            name="gsm8k",
            weight=0.6,
            fields=dict(prompt="question", completion="answer"),
        ),
        dict(path=str(fixtures / "reason-tool-use"), name="tools", weight=0.25),
        dict(path=str(QUICKSTART / "data" / "train.jsonl"), name="tasks", weight=0.05),
        dict(path=str(tmp_path / "stories.jsonl"), replay=0.1),
        tokenizer=str(fixtures / "tokenizer-qwen"),
    )
    c.train.duration, c.train.batch_size = "150 steps", 8
    feed = make_feed(c, tmp_path)
    sources = np.zeros(4)
    for batch in loader(feed.rows, 8):
        sources += np.bincount(batch["sources"][batch["segments"] > 0], minlength=4)
    np.testing.assert_allclose(sources / sources.sum(), [0.6, 0.25, 0.05, 0.1], rtol=0.01)
    assert feed.rows.efficiency > 0.98
