"""A map of a model: a number for each module, layers down, kinds of module across."""

from collections.abc import Mapping

from deltaw.analysis import plots
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.analysis.sentences import kinds_of, place, short


def layer_map(values: Mapping[str, float | None], label: str, caption: str, *, diverging: bool = False) -> Picture:
    """`values` by module path; None is an empty cell. A path without a layer has a row of its own."""
    kinds = kinds_of(values)
    heads = list(map(short, kinds))
    places = {path: place(path) for path in values}
    names = {path: path if layer is None else str(layer) for path, (layer, _) in places.items()}
    layers = list(dict.fromkeys(names.values()))
    cells = {(names[path], places[path][1]): value for path, value in values.items()}
    grid = [[cells.get((layer, kind)) for kind in kinds] for layer in layers]
    svg = plots.heatmap(grid, row_labels=layers, column_labels=heads, value_label=label, diverging=diverging)
    rows: list[list[Cell]] = [[layer, *row] for layer, row in zip(layers, grid, strict=True)]
    return Picture(svg, caption, f"{label}: layers down, kinds of module across", Table(["layer", *heads], rows, label))
