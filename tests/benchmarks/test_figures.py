"""Single figures: kept, replaced, and shown beside what was wanted."""

from pathlib import Path

from benchmarks.figures import Measured, note, read, sections


def test_a_figure_is_kept_with_its_command_and_replaced_by_a_later_one(tmp_path: Path) -> None:
    file = tmp_path / "figures.csv"
    for value in (0.5, 0.25):
        note(Measured("A", "bytes, of all", value, bound=0.4, at_most=True), file)
    note(Measured("A", "speed", 120.0, "tokens/s"), file)
    one, two = read(file)
    assert (one.value, one.bound, one.at_most) == (0.25, 0.4, True) and one.command and one.date and one.machine
    assert (two.value, two.bound, two.unit) == (120.0, None, "tokens/s")


def test_the_section_says_what_was_wanted_and_whether_it_was_met(tmp_path: Path) -> None:
    lines = sections(
        [
            Measured("A", "speed", 0.6, bound=0.8, command="python -m a"),
            Measured("A", "peak", 2.5, "GB", 3.0, at_most=True, command="python -m b"),
            Measured("B", "rate", 150.0, "tokens/s", command="python -m c"),
        ]
    ).splitlines()
    assert "| speed | ≥ 0.80 x | 0.60 x | NO | 25% | `python -m a` |" in lines
    assert "| peak | ≤ 3.00 GB | 2.50 GB | yes |  | `python -m b` |" in lines
    assert "| rate |  | 150 tokens/s |  |  | `python -m c` |" in lines
    assert [line for line in lines if line.startswith("## ")] == ["## A", "## B"] and not sections([])
