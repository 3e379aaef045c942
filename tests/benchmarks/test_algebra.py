"""benchmarks/algebra.py with tiny matrices, and its arithmetic on made-up rows. Nothing is held to a time."""

from pathlib import Path

import pytest
import torch

from benchmarks import algebra
from benchmarks.algebra import COLUMNS, FULL, Size, falling, measure, read, row, section, targets, write
from benchmarks.results import Row


def made_up(*, vectors: float = 2.0, randomised: float = 1.0, error: float = 1.004) -> list[Row]:
    rows = [row(number, "values", "all modules", 64, 0.5 * number, modules=224) for number in (1, 2, 3)]
    rows += [row(number, "vectors", "all modules", 64, vectors, modules=224) for number in (1, 2, 3)]
    rows += [row(1, "full", "Gaussian", 64, 40.0)]
    errors = [(1.001, 1.02), (error, 1.03), (1.002, 1.04)]
    rows += [row(i + 1, "randomised", "Gaussian", 64, randomised, errors=pair) for i, pair in enumerate(errors)]
    return [*rows, row(1, "dense", "8 x 8", 64, 10.0, modules=20), row(1, "dense", "8 x 2", 64, 1.0, modules=50)]


def test_targets_are_medians_and_the_worst_error() -> None:
    assert [target.measured for target in targets(made_up())] == pytest.approx([1.0, 2.0, 125.0, 40.0, 1.004])
    assert all(target.met for target in targets(made_up()))
    slow = targets(made_up(vectors=6.0, randomised=3.0, error=1.02))
    assert [target.met for target in slow] == [True, False, False, False, False]


def test_the_section_says_what_was_missed_and_what_was_worked_out() -> None:
    page = section(made_up(vectors=5.0))
    assert "| values and vectors, against SVDs of the dense updates | ≥ 100.00 x | 50.00 x | NO | 50% |" in page
    assert "the sum over all, 250 s, is worked out from the counts" in page
    assert "| Gaussian | 40.00 s | 1.000 s | 1.0020 | 1.0300 |" in page
    assert "224 modules of rank 64; medians of 3 rounds" in page
    assert section([]) == ""


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    write(tmp_path, made_up())
    assert read(tmp_path) == made_up()


def test_the_full_size_is_that_of_llama_8b() -> None:
    assert FULL.layers * len(FULL.shapes) == 224
    # Its blocks' linear layers hold 6.98e9 numbers.
    assert FULL.layers * sum(m * n for m, n in FULL.shapes) == 32 * 218_103_808


def test_the_falling_spectrum_is_what_it_says() -> None:
    torch.testing.assert_close(torch.linalg.svdvals(falling(30)), torch.arange(1.0, 31) ** -0.5)


def test_every_module_is_timed_and_every_error_is_at_least_the_best() -> None:
    rows = list(measure(Size(2, ((6, 5), (3, 5), (6, 5)), 2, 20), 2, lambda line: None))
    assert all(tuple(one) == COLUMNS and float(one["seconds"]) > 0 for one in rows)
    kinds = [(one["what"], one["matrix"], one["round"], one["modules"]) for one in rows if one["what"] != "randomised"]
    assert kinds == [
        ("values", "all modules", "1", "6"),
        ("vectors", "all modules", "1", "6"),
        ("values", "all modules", "2", "6"),
        ("vectors", "all modules", "2", "6"),
        ("full", "Gaussian", "1", "1"),
        ("full", "i^-½", "1", "1"),
        ("dense", "6 x 5", "1", "4"),
        ("dense", "3 x 5", "1", "2"),
    ]
    near = [one for one in rows if one["what"] == "randomised"]
    assert [(one["matrix"], one["round"]) for one in near] == [(x, r) for x in ("Gaussian", "i^-½") for r in "12"]
    assert all(0.9999 < float(one["error_frobenius"]) < 1.05 for one in near)
    assert all(0.9 < float(one["error_two"]) < 1.2 for one in near)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algebra.main(["--small", "--rounds", "1", "--out", str(tmp_path)])
    assert "## Algebra of updates" in capsys.readouterr().out
    assert len(read(tmp_path)) == 2 + 2 + 2 + 4
    with pytest.raises(SystemExit):
        algebra.main(["--rounds", "0"])
