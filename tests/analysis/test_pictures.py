"""Pictures: sound, small and the same every time; they say every number, follow the page's colours, survive any input.

What svg.py cleans is tested here too, on what matplotlib really writes.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.analysis import pictures
from deltaw.analysis.page import number, visible
from deltaw.analysis.svg import INK, SERIES
from deltaw.analysis.template import STYLE
from tests.faults.common import child, imported_anew

STEPS = list(range(1, 1001))
LOSS = [2.5 * math.exp(-i / 200) + 0.1 * math.sin(i * i) + 0.6 for i in STEPS]
RATES = [1e-4, 3e-4, 1e-3]
LAYERS, MODULES = [str(i) for i in range(30)], ["q", "k", "v", "o", "gate", "up", "down"]
GRID: list[list[float | None]] = [[math.sin(i * 7 + j) for j in range(7)] for i in range(30)]

# Also looked at by a browser (test_page_in_browser.py).
PICTURES: dict[str, Callable[[], str]] = {
    "lines": lambda: pictures.lines(
        {"training": (STEPS, LOSS), "held out": ([1, 500, 1000], [3.0, 1.0, 0.7])},
        x_label="step",
        y_label="loss",
        bands={"held out": ([1, 500, 1000], [2.9, 0.9, 0.6], [3.1, 1.1, 0.8])},
        marks={"spike": ([500], [2.0])},
        baseline=("base", 2.5),
    ),
    "heatmap": lambda: pictures.heatmap(GRID, row_labels=LAYERS, column_labels=MODULES, value_label="‖ΔW‖"),
    "diverging": lambda: pictures.heatmap(
        GRID, row_labels=LAYERS, column_labels=MODULES, value_label="φ less chance", diverging=True
    ),
    "bars": lambda: pictures.bars(
        ["SQL", "sums"], {"LoRA": [70.0, 30.0], "full": [71.0, None]}, y_label="%", errors={"LoRA": [1.0, 2.0]}
    ),
    "spectrum": lambda: pictures.spectrum({"layer 1": [3.0, 1.0, 0.1], "layer 2": [2.0, 1.5]}),
    "scatter": lambda: pictures.scatter(
        {"MLP": ([1, 2], [3.0, 4.0])}, x_label="size", y_label="rank", labels={"MLP": ["up", "down"]}
    ),
    "many curves": lambda: pictures.lines(
        {f"rank {rank}, attention alone": (RATES, [2.0 + rank / 9, 1.5, 1.0 + rank / 9]) for rank in range(1, 9)},
        x_label="learning rate",
        y_label="held-out loss, nats per token",
        log_x=True,
        log_y=True,
        baseline=("full fine-tuning", 1.2),
    ),
    "crowded": lambda: pictures.scatter(
        {"a": ([1.0, 1.01, 1.02, 9.0], [3.0, 3.01, 3.0, 9.0]), "b": ([1.0, 8.9], [3.0, 9.0])},
        x_label="size",
        y_label="rank",
        log_x=True,
        labels={"a": ["3e-4", "1e-3", "3e-3", "1e-2"], "b": ["near", "far"]},
    ),
    "long names": lambda: pictures.bars(
        [f"model.layers.{i}.mlp.down_proj" for i in range(8)],
        {"norm": [10.0**-i for i in range(8)], "after": [None, *(3 * 10.0**-i for i in range(7))]},
        y_label="‖ΔW‖",
        log_y=True,
        baseline=("one", 1.0),
    ),
    "lying": lambda: pictures.heatmap(
        list(zip(*GRID, strict=True)), row_labels=MODULES, column_labels=LAYERS, value_label="‖ΔW‖"
    ),
    "few cells": lambda: pictures.heatmap(
        [[0.3, -0.12, None], [1e-5, 0.0, 1234.5]],
        row_labels=["rank 4", "a name that is much too long to stand beside cells"],
        column_labels=["seed 0", "the same seed, another rate", "x"],
        value_label="difference to rank 16",
        diverging=True,
    ),
}
each_picture = pytest.mark.parametrize("name", PICTURES)


def parsed(svg: str) -> ElementTree.Element:
    assert svg.startswith("<svg ") and svg.endswith("</svg>")
    return ElementTree.fromstring(svg)


def said(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("text")]


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("title")]


@cache
def drawn(name: str) -> str:
    return PICTURES[name]()


@each_picture
def test_a_picture_needs_nothing_and_touches_nothing(name: str) -> None:
    svg = drawn(name)
    root = parsed(svg)
    assert {element.tag for element in root.iter()} <= {"svg", "g", "defs", "path", "use", "text", "title"}
    assert not re.search(r"http|url\(|<style|font-family|<\?|<!|class=|width=\"", svg)
    assert INK not in svg and "currentColor" in svg
    assert "max-width:100%" in root.get("style", "") and "px" not in root.get("style", "")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    links = {element.get("href", "#")[1:] for element in root.iter()} - {""}
    assert len(ids) == len(set(ids)) and set(ids) == links


def test_pictures_on_one_page_share_no_ids() -> None:
    found = [re.findall(r'id="([^"]+)"', drawn(name)) for name in PICTURES]
    assert sum(map(len, found)) == len({name for names in found for name in names}) > 0


@each_picture
def test_the_same_input_gives_the_same_bytes_and_the_users_settings_neither_show_nor_change(name: str) -> None:
    with mpl.rc_context({"font.size": 40, "svg.fonttype": "path", "axes.grid": True, "lines.linewidth": 9}):
        before = dict(mpl.rcParams)
        assert PICTURES[name]() == drawn(name)
        assert dict(mpl.rcParams) == before


def test_no_pyplot() -> None:
    def work() -> None:
        imported_anew("deltaw", "matplotlib")
        import_module("deltaw.analysis.pictures").spectrum({"a": [1.0]})
        assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules

    ended = child(work)
    assert ended.code == 0, ended.output


def test_pictures_are_small() -> None:
    assert len(drawn("heatmap").encode()) < 60_000 and len(drawn("diverging").encode()) < 60_000
    many = (range(100_000), [math.sin(i * i) for i in range(100_000)])
    assert len(pictures.lines({"loss": many}, x_label="step", y_label="loss").encode()) < 30_000


def test_every_cell_says_its_number() -> None:
    values: list[list[float | None]] = [[1.0, None], [math.nan, -2.5]]
    svg = pictures.heatmap(values, row_labels=["0", "1"], column_labels=["q", "k"], value_label="v")
    assert sorted(titles(svg)) == ["0 · k: –", "0 · q: 1.00", "1 · k: −2.50", "1 · q: –"]
    assert {"1.00", "−2.50", "–", "q", "k", "0", "1", "v"} <= set(said(svg)), "few cells have it written in"
    many = pictures.heatmap(GRID, row_labels=LAYERS, column_labels=MODULES, value_label="v")
    assert len(titles(many)) == 210 and number(GRID[3][4]) not in said(many)


def test_colours_order_cells_and_zero_is_the_page() -> None:
    svg = pictures.heatmap(
        [[-1.0, 0.0, 1.0]], row_labels=["0"], column_labels=["a", "b", "c"], value_label="v", diverging=True
    )
    by_title = {
        shape.find("title").text: shape.get("style")  # type: ignore[union-attr]
        for shape in parsed(svg).iter("path")
        if shape.find("title") is not None
    }
    assert by_title["0 · a: −1.00"] == f"fill:{pictures.BELOW};fill-opacity:{pictures.MOST}"
    assert by_title["0 · c: 1.00"] == f"fill:{pictures.ABOVE};fill-opacity:{pictures.MOST}"
    opacity = float(by_title["0 · b: 0"].rpartition(":")[2])
    assert 0 < opacity < 0.01, "drawn, so that it can be hovered over, but not seen"


def test_every_bar_and_point_says_its_number() -> None:
    assert titles(drawn("bars")) == ["SQL · LoRA: 70.0 ± 1.00", "sums · LoRA: 30.0 ± 2.00", "SQL · full: 71.0"]
    assert titles(drawn("scatter")) == ["up: size 1, rank 3.00", "down: size 2, rank 4.00"]
    assert {"SQL", "sums", "LoRA", "full", "%", "70.0"} <= set(said(drawn("bars")))
    assert {"up", "down", "size", "rank"} <= set(said(drawn("scatter")))


def test_axes_legend_and_labels_are_there() -> None:
    assert {"training", "held out", "spike", "base", "step", "loss", "0", "400", "0.5", "1,000"} <= set(
        said(drawn("lines"))
    )
    assert "layer 1" in said(drawn("spectrum")) and "singular value" in said(drawn("spectrum"))
    assert {"0.0001", "0.0003", "0.001"} <= set(said(drawn("many curves"))), "few chosen values are the ticks"
    assert {"1", "0.01", "1e−8"} <= set(said(drawn("long names")))


def test_a_gap_breaks_the_line() -> None:
    svg = pictures.lines({"a": ([1, 2, 3, 4, 5], [1.0, 2.0, None, 2.0, 1.0])}, x_label="x", y_label="y")
    (line,) = [path for path in parsed(svg).iter("path") if SERIES[0] in path.get("style", "") and not path.get("id")]
    assert line.get("d", "").count("M") == 2


def test_labels_are_no_formulas_and_escape() -> None:
    hostile = "$x^2$ </svg><script>alert(1)</script>\x00\u202e _"
    svg = pictures.lines({hostile: ([1], [1.0]), "_b": ([1], [2.0])}, x_label=hostile, y_label=hostile)
    assert said(svg).count(visible(hostile)) == 2 and "_b" in said(svg)
    assert "<script" not in svg and "\x00" not in svg and "\u202e" not in svg


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError):
        pictures.lines({"a": ([1, 2], [1.0])}, x_label="", y_label="")
    with pytest.raises(ValueError):
        pictures.heatmap([[1.0]], row_labels=["a", "b"], column_labels=["c"], value_label="")
    with pytest.raises(ValueError):
        pictures.bars(["a", "b"], {"s": [1.0]}, y_label="")


floats = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1e-320, 1e308, -1e308]))
columns = st.lists(st.tuples(st.floats(), floats, floats), max_size=6)
names = st.text(max_size=20)


@settings(max_examples=8, deadline=None)
@given(st.dictionaries(names, columns, max_size=4), names, st.booleans(), st.booleans(), floats)
def test_no_numbers_and_no_names_break_a_picture(
    data: dict[str, Any], label: str, log_x: bool, log_y: bool, level: float | None
) -> None:
    series = {name: ([x for x, _, _ in rows], [y for _, y, _ in rows]) for name, rows in data.items()}
    bands = {name: tuple([row[i] for row in rows] for i in range(3)) for name, rows in data.items()}
    baseline = None if level is None else (label, level)
    words: dict[str, Any] = {"x_label": label, "y_label": label, "log_x": log_x, "log_y": log_y}
    parsed(pictures.lines(series, bands=bands, marks=series, baseline=baseline, **words))
    parsed(pictures.scatter(series, labels={name: [name] * len(xs) for name, (xs, _) in series.items()}, **words))
    grid = [[y, e] for rows in data.values() for _, y, e in rows]
    heat: dict[str, Any] = {"row_labels": [label] * len(grid), "column_labels": [label, ""], "value_label": label}
    for diverging in (False, True):
        parsed(pictures.heatmap(grid, diverging=diverging, **heat))
    bars = {name: [row[1] for row in (rows * 6)[:6]] for name, rows in data.items() if rows}
    errors = {name: [row[2] for row in (rows * 6)[:6]] for name, rows in data.items() if rows}
    parsed(pictures.bars([label] * 6, bars, y_label=label, log_y=log_y, errors=errors, baseline=baseline))


PAPERS = re.findall(r"--paper:(#\w+)", STYLE)
INKS = re.findall(r"--ink:(#\w+)", STYLE)
# Machado, Oliveira & Fernandes 2009, severity 1: what the three kinds of colour-blind eyes see, in linear RGB.
EYES = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def rgb(colour: str) -> list[float]:
    full = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    return [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def linear(colour: list[float]) -> list[float]:
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]


def contrast(one: list[float], other: list[float]) -> float:
    lights = sorted(
        sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def lab(linear_rgb: list[float]) -> list[float]:
    """Oklab (Ottosson 2020), in which distances are about as the eye sees them."""

    def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    cones = times([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]], linear_rgb)
    roots = [math.copysign(abs(cone) ** (1 / 3), cone) for cone in cones]
    return times([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]], roots)


def test_the_palette_can_be_seen_on_both_grounds_and_by_all_eyes() -> None:
    assert len(PAPERS) == len(INKS) == 2
    assert all(contrast(rgb(colour), rgb(paper)) >= 3 for colour in SERIES for paper in PAPERS)
    for eye, matrix in EYES.items():
        seen = [
            lab([min(1, max(0, sum(a * b for a, b in zip(row, linear(rgb(c)), strict=True)))) for row in matrix])
            for c in SERIES
        ]
        assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 0.08, eye


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_numbers_in_cells_can_be_read(mode: int) -> None:
    ramp, norm = pictures._ramp([0.0, 1.0], False)
    for i in range(101):
        for colour in (pictures.BELOW, pictures.ABOVE):
            share = pictures.MOST * i / 100
            cell = [share * c + (1 - share) * p for c, p in zip(rgb(colour), rgb(PAPERS[mode]), strict=True)]
            assert contrast(rgb(INKS[mode]), cell) >= 4.5, (colour, share)
        painted = ramp(norm(i / 100))
        assert contrast(rgb(pictures._ink_on(painted)), list(painted[:3])) >= 4.5
