"""The report of a run: what it says of overfitting."""

import pytest

from sftjax.reports.page import overfitting

TRAIN = [(n, 2.0 - n / 100) for n in range(10, 101, 10)]


def test_overfitting_is_said_where_the_losses_part():
    [said] = overfitting({"loss": TRAIN, "dev/loss": [(0, 2.0), (40, 1.5), (80, 1.6), (100, 1.8)]})
    assert said.startswith("The run overfits: the loss of dev was lowest at step 40 (1.5) and rose")
    assert "to 1.8 by step 100" in said and "eval.best=dev/loss" in said


def test_a_loss_that_rises_from_the_start_is_said():
    [said] = overfitting({"loss": TRAIN, "dev/loss": [(0, 1.5), (50, 1.8), (100, 2.2)]})
    assert "lowest at step 0 (1.5) and rose to 2.2 by step 100" in said


@pytest.mark.parametrize(
    "train, points",
    [
        (TRAIN, [(0, 2.0), (50, 1.5), (100, 1.4)]),  # it falls
        (TRAIN, [(0, 2.0), (50, 1.5), (100, 1.505)]),  # it rises by less than is worth a word
        ([(n, 1.0) for n, _ in TRAIN], [(0, 2.0), (50, 1.5), (100, 1.8)]),  # the other stands too
        (TRAIN, [(100, 1.8)]),
    ],
)
def test_nothing_is_said_otherwise(train, points):
    assert overfitting({"loss": train, "dev/loss": points}) == []
