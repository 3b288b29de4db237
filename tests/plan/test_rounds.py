"""Loops that data ends: attention's over blocks apart from the loss's, and pairs' own tokens."""

import json

import pytest

from sftjax import config as config_lib
from sftjax.plan import compile as plan
from sftjax.plan import hardware, hlo

BERT = dict(
    model_type="bert", vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=128, max_position_embeddings=512,
)  # fmt: skip
T5 = dict(model_type="t5", vocab_size=256, d_model=64, d_kv=32, d_ff=96, num_heads=2, num_layers=2)


def build(folder, model, **changes):
    (folder / "config.json").write_text(json.dumps(model))
    c = config_lib.get_default()
    c.model.path, c.model.init, c.train.batch_size = str(folder), "random", 8
    for key, value in changes.items():
        config_lib.override(c, key.replace("__", "."), str(value))
    return plan.build(c, hardware.resolve("here"))


@pytest.mark.slow
def test_blocks_of_attention_are_counted_as_often_as_they_meet(tmp_path):
    program = build(tmp_path, BERT, task="classification", data__labels="('a', 'b')", data__max_length=512)
    with plan.use(program.mesh):
        text = program.step.lower(program.state, program.batch).compile().as_text()
    cost = hlo.analyze(text, plan.assumed(text, program))
    # Four blocks of queries, each with four of keys; no loop of a vocabulary.
    assert {x.trips for x in cost.loops if not x.known} == {4}
    assert program.model_flops < 8 * cost.flops < 1.3 * program.model_flops


def test_tokens_of_pairs_are_those_of_both_sides(tmp_path):
    sizes = dict(data__max_length=128, data__max_target_length=32)
    work = build(tmp_path, T5, task="seq2seq", **sizes).work
    assert (work.tokens, work.trained * work.tokens) == (8 * 160, 8 * 32)
