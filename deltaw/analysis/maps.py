"""A map of a model: a number for each module, layers down, kinds of module across.

Modules that share a place (say, the experts of a layer) share its cell, which shows their mean. So do neighbouring
layers, where there are more than a page should hold: it must not grow with the model.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.analysis.words import columns_of, place, short

CELLS, LONE = 560, 8  # of a map; rows for paths without a layer


def layer_map(values: Mapping[str, float | None], label: str, caption: str, *, diverging: bool = False) -> Picture:
    """`values` by module path; None is an empty cell. A path without a layer has a row of its own, of a few."""
    kinds = columns_of(values)
    columns = list(dict.fromkeys(kinds.values()))
    rows = _rows_of(list(values), CELLS // len(columns))
    shared: dict[tuple[str, str], list[float]] = {}
    for path, value in values.items():
        mine = shared.setdefault((rows[path], kinds[path]), [])
        if value is not None:
            mine.append(value)
    names = list(dict.fromkeys(rows.values()))
    grid = [[fmean(known) if (known := shared.get((row, kind))) else None for kind in columns] for row in names]
    if len(values) > len(shared):
        caption += f" A cell is the mean of its modules, {len(values) / len(shared):.3g} on average."
    heads = list(map(short, columns))
    svg = pictures.heatmap(grid, row_labels=names, column_labels=heads, value_label=label, diverging=diverging)
    lines: list[list[Cell]] = [[row, *cells] for row, cells in zip(names, grid, strict=True)]
    return Picture(
        svg, caption, f"{label}: layers down, kinds of module across", Table(["layer", *heads], lines, label)
    )


def _rows_of(paths: Sequence[str], most: int) -> dict[str, str]:
    """The row of each path: its layer, a band of neighbouring layers, or itself."""
    places = {path: place(path)[0] for path in paths}
    lone = [path for path, layer in places.items() if layer is None]
    layers = sorted({layer for layer in places.values() if layer is not None})
    band = math.ceil(len(layers) / max(1, most))
    bands = [layers[i : i + band] for i in range(0, len(layers), band)] if layers else []
    ends = {layer: f"{each[0]} to {each[-1]}" if each[0] < each[-1] else f"{layer}" for each in bands for layer in each}
    own = {path: path if len(lone) <= min(LONE, most) else "no layer" for path in lone}
    return {path: own[path] if layer is None else ends[layer] for path, layer in places.items()}
