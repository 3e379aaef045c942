"""The text at a run's end."""

from deltaw.training.result import plot


def test_a_falling_loss_is_a_falling_curve() -> None:
    lines = plot([4.0, 3.0, 2.0, 1.0], height=4).splitlines()
    heights = [sum(line[10 + column : 11 + column] not in ("", " ") for line in lines[:4]) for column in range(4)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 4
    assert "4.000" in lines[0] and "1.000" in lines[3] and "step 4" in lines[-1]


def test_a_constant_or_a_single_value_is_drawn_too() -> None:
    assert "2.000" in plot([2.0, 2.0, 2.0])
    assert "step 1" in plot([2.0])


def test_many_values_share_columns() -> None:
    assert all(len(line) <= 75 for line in plot([float(i) for i in range(1000)], width=64).splitlines())
