"""What the loss needs of memory, by compiling it at the size of a real model; nothing is run."""

import functools

import jax
import numpy as np

from benchmarks import loss
from sftjax.ops.cross_entropy import linear_cross_entropy

TOKENS, VOCAB, WIDTH = 16_384, 128_256, 2048


def chunks_of_1024(*args):
    return linear_cross_entropy(*args, chunk_tokens=1024)[0]


def test_eight_times_less_than_the_plain_loss():
    plain = loss.temporary_bytes(loss.plain, TOKENS, VOCAB, WIDTH)
    assert plain > 2 * TOKENS * VOCAB * 4  # logits and their gradient, float32
    assert plain / loss.temporary_bytes(loss.fused, TOKENS, VOCAB, WIDTH) >= 8


def test_follows_the_head_not_tokens_times_vocabulary():
    """Twice the tokens cost their hidden states more, however large the vocabulary."""
    size = functools.partial(loss.temporary_bytes, chunks_of_1024)
    base = size(TOKENS, VOCAB, WIDTH)
    more = size(2 * TOKENS, VOCAB, WIDTH) - base
    assert 0 <= more <= 8 * TOKENS * WIDTH
    small = size(TOKENS, VOCAB // 4, WIDTH)
    head = (VOCAB - VOCAB // 4) * WIDTH * 4
    # The head's gradient in float32, the head (bf16 matmuls are float32 ones on a CPU), a chunk.
    assert base - small <= 2 * head + 10 * 1024 * (VOCAB - VOCAB // 4)


def test_the_three_losses_are_one():
    arguments = loss.inputs(256, 512, 32, 0.25)
    found = [jax.value_and_grad(fn, (0, 1))(*arguments) for fn in loss.LOSSES.values()]
    assert len(found) == 3 and arguments[3].mean() == 0.25
    for value, grads in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-6)
        for ours, theirs in zip(grads, found[0][1], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_time_table(capsys):
    times = loss.time_table(256, 512, 32, (0.25,), 2)
    assert times["agree"] < 1e-5 and times["shares"][0]["speed_vs_chunked"][0] > 0
    assert "chunked/ours" in capsys.readouterr().out
