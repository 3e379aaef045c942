"""Where things stand: legends and cells keep inside the picture, names that differ still do when shortened."""

from hypothesis import given
from hypothesis import strategies as st

from deltaw.analysis.layout import (
    MAX_ENTRIES,
    Entry,
    beside,
    grid_of,
    legend_of,
    shortened,
    slots_of,
    told_apart,
    width,
)

names = st.text(max_size=60)


@given(st.text(max_size=300), st.integers(5, 40))
def test_a_shortened_name_is_one_line_of_its_length(name: str, most: int) -> None:
    assert len(shortened(name, most)) <= most
    assert "\n" not in shortened(name, most)


def test_a_shortened_path_keeps_both_ends() -> None:
    short = shortened("model.layers.12.self_attn.q_proj", 18)
    assert short.startswith("model") and short.endswith("attn.q_proj") and len(short) == 18


def test_paths_stay_apart() -> None:
    paths = [f"model.layers.{i}.mlp.down_proj" for i in range(30)]
    short = told_apart(paths, 18)
    assert short[7] == "…7.mlp.down_proj" and len(set(short)) == 30
    assert told_apart(["a.b", "a.c"], 18) == ["a.b", "a.c"], "short ones stay whole"
    assert told_apart([], 18) == []


@given(st.lists(names, min_size=2, max_size=40))
def test_a_legend_keeps_inside_its_width(series: list[str]) -> None:
    entries = [Entry(name, "line", "#000000") for name in series]
    placed, top = legend_of(entries, 560)
    assert len(placed) == min(len(series), MAX_ENTRIES)
    for left, baseline, entry in placed:
        assert left + 24 + width(shortened(entry.name, 36)) <= 560 and baseline < top
    if len(series) > MAX_ENTRIES:
        assert placed[-1][2].name == f"and {len(series) - MAX_ENTRIES + 1} more"


@given(st.lists(names, max_size=130), st.lists(names, max_size=130))
def test_cells_lie_inside_the_picture_and_not_on_each_other(rows: list[str], columns: list[str]) -> None:
    grid = grid_of([shortened(row, 28) for row in rows], [shortened(column, 20) for column in columns])
    assert grid.width < 1300 and grid.height < 1300
    if rows and columns:
        right, bottom = grid.cell(len(rows) - 1, len(columns) - 1)[2:]
        assert right <= grid.width and bottom <= grid.height
        assert grid.cell(0, 0)[2] <= grid.left + grid.cell_w and grid.cell(0, 0)[3] <= grid.top + grid.cell_h
    assert grid.row_stride * grid.cell_h >= 13, "labels of rows don't touch"


def test_the_cells_of_an_adapter_fit_a_phone() -> None:
    grid = grid_of([str(i) for i in range(30)], ["q", "k", "v", "o", "gate", "up", "down"])
    assert grid.width <= 360 and grid.row_stride == 1 and not grid.turned
    assert grid_of(["q_proj"] * 7, [str(i) for i in range(30)]).width <= 760


def test_bars_break_their_labels_or_slant_them() -> None:
    slots = slots_of(["SQL", "translation, English to German"], 3)
    assert slots.labels[0] == ["SQL"] and len(slots.labels[1]) > 1 and not slots.turned
    slots = slots_of([f"model.layers.{i}.mlp.down_proj" for i in range(8)], 1)
    assert slots.turned and slots.labels[3] == ["…3.mlp.down_proj"]


def test_a_label_takes_the_side_where_there_is_room() -> None:
    taken = [(95.0, 95.0, 105.0, 105.0)]
    assert beside((100, 100), "label", 560, taken) == 1
    assert beside((100, 100), "label", 560, taken) == -1, "the right side is taken"
    assert beside((100, 100), "label", 560, taken) == 0
    assert beside((550, 50), "label", 560, []) == -1, "the edge is near"
