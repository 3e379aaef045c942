"""What is printed of losses stands whatever they are: 0 of a memorised task, none of a model that a factor broke."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.commands.resize import trial_table
from deltaw.commands.scale import BAR, point_table
from deltaw.config import EvaluateConfig, parse_config
from deltaw.errors import InputError
from deltaw.evaluation.budget import Trial
from deltaw.evaluation.held_out import perplexity
from deltaw.evaluation.side_by_side import wanted
from deltaw.evaluation.slider import Point

any_loss = st.floats(0, allow_infinity=True) | st.just(math.nan)


@given(st.lists(st.tuples(any_loss, any_loss), min_size=1, max_size=4))
def test_points_have_a_bar_for_every_finite_loss(losses: list[tuple[float, float]]) -> None:
    lines = point_table([Point(float(n), *pair) for n, pair in enumerate(losses)]).splitlines()[1:]
    for line, pair in zip(lines, losses, strict=True):
        assert line.count("█") <= 2 * BAR and ("█" in line) == any(map(math.isfinite, pair))


@given(st.lists(any_loss, min_size=1, max_size=4))
def test_trials_of_any_losses_have_a_line_each(losses: list[float]) -> None:
    assert len(trial_table([Trial(0.5, 10, 2.0, loss) for loss in losses]).splitlines()) == 1 + len(losses)


@given(st.floats(0, 1e300))
def test_a_perplexity_is_a_number(loss: float) -> None:
    assert math.isfinite(perplexity(loss))


def test_the_longest_answer_is_what_was_asked_for() -> None:
    fields = {"base": "b", "data": {"train": "t", "eval": 5}, "output": "o"}
    run = parse_config({**fields, "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 7}})
    assert wanted(run, None, None) == EvaluateConfig(metrics=("exact_match",), max_new_tokens=7, samples=0)
    assert wanted(run, None, 5).max_new_tokens == 5 == wanted(None, ["exact_match"], 5).max_new_tokens
    assert wanted(run, ["exact_match"], None).max_new_tokens == 7
    with pytest.raises(InputError, match="max-tokens"):
        wanted(None, None, 5)
    with pytest.raises(InputError, match="max_new_tokens"):
        wanted(None, ["exact_match"], 0)
