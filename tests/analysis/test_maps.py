"""Maps of a model: which cell a module stands in, and that none is dropped where several share one."""

import pytest

from deltaw.analysis.maps import CELLS, layer_map


def cells(values: dict[str, float | None]) -> dict[tuple[object, str], object]:
    table = layer_map(values, "l", "c").table
    return {(row[0], head): cell for row in table.rows for head, cell in zip(table.head[1:], row[1:], strict=True)}


def test_a_module_has_its_own_cell() -> None:
    found = cells({"layers.0.q_proj": 1.0, "layers.1.q_proj": 2.0, "layers.1.up_proj": None, "lm_head": 4.0})
    assert found["0", "q"] == 1 and found["1", "q"] == 2 and found["lm_head", "lm_head"] == 4
    assert found["0", "up"] is None and found["1", "up"] is None


def test_experts_of_a_layer_share_a_cell_with_their_mean() -> None:
    picture = layer_map({f"layers.3.experts.{e}.up_proj": float(e) for e in range(5)}, "l", "c")
    assert picture.table.rows == [["3", 2.0]] and "mean of its modules, 5" in picture.caption


@pytest.mark.parametrize("layers", [80, 200, 5000])
def test_neighbouring_layers_share_a_row_where_there_are_many(layers: int) -> None:
    values = {f"layers.{i}.{kind}": float(i) for i in range(layers) for kind in "abcdefg"}
    rows = layer_map(values, "l", "c").table.rows
    assert len(rows) * 7 <= CELLS and (len(rows) == layers) == (layers * 7 <= CELLS)
    assert sum(float(row[1]) for row in rows) / len(rows) == pytest.approx((layers - 1) / 2, rel=0.02)  # type: ignore[arg-type]


def test_many_kinds_end_in_other() -> None:
    table = layer_map({f"layers.0.k{i}": float(i) for i in range(40)}, "l", "c").table
    assert table.head[-1] == "other" and len(table.head) == 17 and table.rows[0][-1] == pytest.approx(27.0, abs=20)
