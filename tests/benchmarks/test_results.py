"""The arithmetic on made-up measurements, and the page and the files made from them. Nothing here is timed."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, results
from benchmarks.results import Figure, Key, Row, Target, figures, flat, p95, quartiles, read_rows, targets, write_rows

MORE: dict[str, Any] = {"date": "2026-01-01", "machine": "made up, 2 cores", "round": 1, "flags": ""}


def row(arm: str, workload: str = "dense", *, rate: float = 100.0, dtype: str = "bfloat16", **more: Any) -> Row:
    """A process of two timed steps of 1000 tokens at `rate`, half of them supervised, after a warm one."""
    made = {
        "arm": arm,
        "workload": workload,
        "dtype": dtype,
        "warm": 1,
        "tokens": [1000] * 3,
        "supervised": [500] * 3,
        "seconds": [99.0, 1000 / rate, 1000 / rate],
        "tokens_per_s": [rate, rate],
        "losses": [2.5],
        "first_step_s": 12.0,
        "peak_bytes": 1_000_000_000,
        "threads": 2,
        "torch": "2.13.0",
        "path": "padded batches",
    }
    return flat({**made, **more}, **MORE)


def everything() -> list[Row]:
    rows = [row("gemm", rate=400.0, gflops=430.0, seconds=[], losses=[])]
    rows += [row("deltaw", rate=280.0, peak_bytes=400_000_000), row("peft", rate=100.0)]
    rows += [row("peft-compile", rate=140.0, compile_s=138.0)]
    rows += [row("deltaw", "words", rate=380.0), row("trl", "words", rate=100.0)]
    rows += [row("deltaw", "chats", rate=450.0), row("trl", "chats", rate=100.0), row("trl-free", "chats", rate=110.0)]
    rows += [row("deltaw", rate=150.0, dtype="float32"), row("peft", rate=100.0, dtype="float32")]
    rows += [row("deltaw", "chats", rate=300.0, without="mlp", of_whole=[0.67, 0.67])]
    rows += [flat({"arm": "deltaw train", "workload": "words", "dtype": "bfloat16", "first_step_s": 9.5}, **MORE)]
    return [*rows, flat({"arm": "peft", "workload": "long", "dtype": "bfloat16", "error": "out of memory"}, **MORE)]


def test_the_warm_step_counts_in_no_rate() -> None:
    made = row("peft", rate=100.0)
    assert (made["tokens_per_s"], made["supervised_per_s"], made["p95_step_s"]) == ("100", "50", "10")
    assert made["step_s"] == "10.0000 10.0000"


def test_every_figure_of_a_row_has_a_column() -> None:
    assert set(row("peft")) == set(results.COLUMNS)


@pytest.mark.parametrize(
    "values, expected", [([], (0, 0, 0)), ([7.0], (7, 7, 7)), ([1.0, 2.0, 3.0, 4.0, 5.0], (2, 3, 4))]
)
def test_quartiles(values: list[float], expected: tuple[float, float, float]) -> None:
    assert quartiles(values) == expected


def test_the_slowest_steps_are_near_the_largest() -> None:
    assert p95([float(number) for number in range(1, 102)]) == pytest.approx(96)
    assert p95([3.0]) == 3


def test_rounds_are_pooled() -> None:
    found = figures([row("peft", rate=rate) for rate in (100.0, 110.0, 150.0)])
    figure = found[Key("peft", "dense", "bfloat16")]
    assert (figure.processes, figure.low, figure.middle, figure.high) == (3, 102.5, 110, 140)
    assert figure.loss == 2.5


def test_targets_are_ratios_of_medians() -> None:
    measured = {target.name: target for target in targets(figures(everything()), "bfloat16")}
    got = [target.measured for target in measured.values()]
    assert got == pytest.approx([2.8, 2, 0.7, 3.8, 450 / 110, 0.4, 9.5])
    assert [target.met for target in measured.values()] == [True, True, True, False, True, True, True]
    assert measured["words, against TRL + PEFT"].shortfall == "5%"  # 3.8 of 4


def test_float32_has_a_target_where_it_is_the_choice() -> None:
    rows = [row("deltaw", dtype="float32", rate=150.0), row("peft", dtype="float32", rate=100.0)]
    assert [t.measured for t in targets(figures(rows), "float32") if "float32" in t.name] == [1.5]
    assert not [t for t in targets(figures(rows), "bfloat16") if "float32" in t.name]


def test_an_ablation_is_judged_by_its_companion_in_the_same_process() -> None:
    rows = [row("deltaw", rate=100.0), row("deltaw", without="mlp", rate=120.0, of_whole=[0.92, 0.94])]
    assert "| dense | mlp | 120 | 93% |" in report.page(rows)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    for target in targets(figures([row("deltaw", rate=280.0)]), "bfloat16"):
        assert (target.measured, target.met, target.shortfall) == (None, None, "")
        assert report.shown(target)[2:] == ["", "not measured", ""]


@pytest.mark.parametrize(
    "measured, met, shortfall", [(0.5, True, ""), (0.6, False, "20%"), (float("nan"), False, "nan%")]
)
def test_a_bound_from_above(measured: float, met: bool, shortfall: str) -> None:
    target = Target("memory", 0.5, measured, at_most=True)
    assert (target.met, target.shortfall) == (met, shortfall)


def test_a_failed_process_is_no_figure_but_is_on_the_page() -> None:
    assert Key("peft", "long", "bfloat16") not in figures(everything())
    assert "- peft on long, bfloat16: out of memory" in report.page(everything())


def test_rows_come_back_from_the_file_as_they_were(tmp_path: Path) -> None:
    write_rows(tmp_path / "results.csv", everything())
    assert read_rows(tmp_path / "results.csv") == everything()


def test_the_page_says_what_was_measured() -> None:
    page = report.page(everything())
    assert "2026-01-01, made up, 2 cores, 2 threads, torch 2.13.0. Main dtype: bfloat16." in page
    assert "| words, against TRL + PEFT | ≥ 4.00 x | 3.80 x | NO | 5% |" in page
    assert "| dense, share of the GEMM limit | ≥ 65% | 70% | yes |  |" in page
    assert "Limit: 400 tokens/s at 430 GFLOP/s." in page
    assert "12.0 s (138 s of it compiling)" in page
    assert "| chats | mlp | 300 | 67% | 1.00 GB |" in page
    assert "**dense**, float32" in page


def test_page_and_picture_are_written_twice_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="comes with the extra `bench`")
    for name in ("one", "two"):
        report.write(everything(), tmp_path / name)
    for file in ("performance.md", "performance.svg"):
        one, two = ((tmp_path / name / "docs" / file).read_bytes() for name in ("one", "two"))
        assert one == two


def test_figure_has_no_rate_where_only_the_start_was_measured() -> None:
    found: Figure = figures(everything())[Key("deltaw train", "words", "bfloat16")]
    assert (found.middle, found.first_step) == (0, 9.5)
