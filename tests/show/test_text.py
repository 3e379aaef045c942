"""Values, tables and charts as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from deltaw.files.output import gib
from deltaw.show.chart import bar, columns
from deltaw.show.table import table
from deltaw.show.text import clock, figure_name, framed, one_line, percent, rounded

# Of letters that have a width: a Hangul vowel sign alone has none, and what stands beside it decides how it is drawn.
CELLS = st.text(st.characters(exclude_categories=["C", "Z", "M"]).filter(cell_len), min_size=1, max_size=12)


@given(st.text(max_size=60), st.integers(2, 40), st.booleans())
def test_one_line_is_one_line_that_fits(text: str, limit: int, end: bool) -> None:
    line = one_line(text, limit, end=end)
    assert len(line) <= limit and line.isprintable() and len(line.splitlines()) <= 1
    line.encode()
    whole = one_line(text, 1000)
    assert whole.endswith(line.lstrip("…")) if end else whole.startswith(line.rstrip("…"))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_bytes() -> None:
    assert gib(20 << 20) == "20 MiB" and gib(3 << 29) == "1.5 GiB"


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_every_cell_stands_below_the_one_before(rows: list[list[str]]) -> None:
    lines = table(rows, align="l" * (len(rows[0]) - 1) + "r").splitlines()
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for line, row in zip(lines, rows, strict=True):
        *left, last = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        assert line == "  ".join([*left, " " * (widths[-1] - cell_len(row[-1])) + row[-1]]) and last


def test_a_head_and_a_rule() -> None:
    text = table([["a", "1"], ["[bold]b", "1000"]], ["name", "count"], align="lr", rule=True)
    assert text.splitlines() == ["name     count", "─" * 14, "a            1", "[bold]b   1000"]


def test_a_table_without_rows() -> None:
    assert table([], ["name"]) == "name" and table([]) == ""


def test_columns_are_as_high_as_their_values() -> None:
    heights = [24, 8, 0, 13]
    lines = columns(heights, rows=3, top="3", bottom="1", first="a", last="z", width=2).splitlines()
    assert lines[-1].split() == ["a", "z"] and len(lines) == 5
    drawn = [line.partition("│")[2].ljust(8) for line in lines[:3]]
    for number, height in enumerate(heights):
        column = [" ▁▂▃▄▅▆▇█".index(line[2 * number]) for line in drawn]
        assert sum(column) == height and all(line[2 * number] == line[2 * number + 1] for line in drawn)


def test_a_bar_is_seen() -> None:
    assert [len(bar(share, 10)) for share in (0, 0.5, 1)] == [1, 5, 10]


@given(st.text(max_size=40), st.lists(st.text(max_size=12), min_size=1, max_size=5), st.text(max_size=40))
def test_a_frame_and_what_stands_in_it_are_the_texts(start: str, middles: list[str], end: str) -> None:
    texts = [start + middle + end for middle in middles]
    before, own, after = framed(texts)
    assert [before + middle + after for middle in own] == texts


def test_a_frame_is_what_a_template_and_a_system_prompt_put_around_a_question() -> None:
    system, header = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    asked = ["What is 1 + 2?", "What is 30 + 4?"]
    before, own, after = framed([system + question + header for question in asked])
    assert own == asked and before == system and after == header
    assert framed(["Translate this: one", "Translate this: two"]) == ("Translate this: ", ["one", "two"], "")
    assert framed(["a b ->", "c d ->"]) == ("", ["a b ->", "c d ->"], "")
    assert framed([system]) == ("", [system], "") and framed([]) == ("", [], "")


def test_shares() -> None:
    assert percent(0.268) == "27 %" and percent(0.0292, 2) == "2.92 %" and percent(-0.005, 1) == "-0.5 %"


def test_the_ends_of_a_short_axis_stay_apart() -> None:
    axis = columns([1, 2, 3], rows=1, top="1", bottom="0", first="step 1", last="step 3").splitlines()[-1]
    assert axis.split() == ["step", "1", "step", "3"]


@given(st.floats(-1e9, 1e9))
def test_a_rounded_figure_is_short_and_near(figure: float) -> None:
    text = rounded(figure)
    assert len(text) <= 11 and float(text.replace(",", "")) == pytest.approx(figure, rel=1e-2, abs=1e-4)


def test_a_figures_name_is_words() -> None:
    assert figure_name("exact_match") == "exact match" and figure_name("judge.py:as_long") == "as long"
