"""Pictures of updates and runs as inline SVG: lines, heat maps, bars, spectra, scatters.

Each function takes plain lists and returns one `<svg>` element for a page (page.py). matplotlib (its object API; pyplot
would keep figures and a backend for the whole process) knows scales and paths; what a reader sees is decided here:

    size      the viewBox is in CSS pixels at natural size and grows with the content; the page may shrink the picture
    text      stays text, in the page's own font. matplotlib measures with another one, so nothing leans on a measured
              width: margins come from a generous estimate, and texts hang on an anchor
    colour    text, axes and grid are `INK`, which becomes `currentColor`: they follow the page into dark mode.
              `SERIES` are mid-tones with a contrast of 3 on white and on near-black, apart also for colour-blind eyes
    ramps     viridis without its ends; deviations fade from both sides into the page, which is zero in either mode
    words     y labels lie flat above the plot and the legend under them: no head to turn, no overlap
    hover     cells, bars and points say their value in a `<title>`, without a script

Which numbers can be drawn, ranges and ticks: axis.py. Where things stand: layout.py. What matplotlib writes is cleaned
by svg.py. Labels are a stranger's: no mathtext, control characters made visible, long ones shortened (the table under
the picture has them whole). The same input gives the same bytes.

Rejected: PNG (blurred when zoomed, one colour mode, no text) and text as paths (four times the size, unsearchable).
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltaw.analysis.axis import Scale, Values, curve_of, drawable, rows_of, scale
from deltaw.analysis.layout import SIZE, Box, Entry, beside, grid_of, legend_of, shortened, slots_of, told_apart, width
from deltaw.analysis.page import number
from deltaw.analysis.svg import HALO, inline

INK = "#010203"  # stands for currentColor
SERIES = ("#2c73cb", "#d4701d", "#a14b87", "#526e41", "#3f99d9", "#ac7f9b")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 2, 2)))  # each round of colours has its own
BELOW, ABOVE, MOST = "#2c73cb", "#c4570c", 0.8  # deviations; at this opacity text on them can still be read
WIDE, TALL = 528.0, 220.0  # of a picture, of a plot area in it

Points = tuple[Sequence[float], Values]
Level = tuple[str, float]
P = ParamSpec("P")


def _alone(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw under matplotlib's defaults, not the user's matplotlibrc, and leave its settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with warnings.catch_warnings(), mpl.rc_context():
            warnings.simplefilter("ignore")  # a letter that the measuring font lacks: the reader's font has it
            mpl.rcdefaults()
            mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "deltaw", "path.simplify": False})
            return draw(*args, **kwargs)

    return drawn


@_alone
def lines(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    bands: Mapping[str, tuple[Sequence[float], Values, Values]] | None = None,
    marks: Mapping[str, Points] | None = None,
    baseline: Level | None = None,
) -> str:
    """Curves (xs, ys) by name. `bands` are (xs, low, high), in the colour of the series of their name; `marks` single
    points that stand out, by name; `baseline` a dashed level (label, y)."""
    curves = {name: rows_of(points, log_x, log_y) for name, points in series.items()}
    areas = {name: rows_of(band, log_x, log_y) for name, band in (bands or {}).items()}
    spots = {name: rows_of(points, log_x, log_y) for name, points in (marks or {}).items()}
    rows = [row for shapes in (curves, areas, spots) for found in shapes.values() for row in found]
    x = scale([row[0] for row in rows], log_x, exact=True, air=0.02)
    y = scale([value for row in rows for value in row[1:]] + _known(baseline, log_y), log_y)
    looks = {name: _look(i) for i, name in enumerate({**curves, **areas})}
    entries = [Entry(name, "line", *looks[name]) for name in curves] + [Entry(name, "ring", INK) for name in spots]
    canvas, axes = _plot(x, y, entries, x_label, y_label, baseline)
    for name, found in areas.items():
        if found:
            xs, low, high = zip(*found, strict=True)
            axes.fill_between(xs, low, high, color=looks[name][0], alpha=0.18, linewidth=0, clip_on=False)
    for name, found in curves.items():
        (colour, dash), xys = looks[name], curve_of(series[name], log_x, log_y)
        look: dict[str, Any] = {"linewidth": 1.8} if len(found) <= 200 else {"linewidth": 1.1}
        look |= {"marker": "o", "markersize": 5.5, "mew": 0} if len(found) <= 16 else {}
        axes.plot(*xys, color=colour, linestyle=dash, clip_on=False, **look)
    for found in spots.values():
        axes.plot([x for x, _ in found], [y for _, y in found], "o", ms=8, mfc="none", mec=INK, mew=1.4, clip_on=False)
    return canvas.svg()


def spectrum(series: Mapping[str, Sequence[float]], *, log_y: bool = True) -> str:
    """Singular values against their index, which begins with 1, by name."""
    numbered = {name: (range(1, len(sigma_K) + 1), sigma_K) for name, sigma_K in series.items()}
    return lines(numbered, x_label="index", y_label="singular value", log_y=log_y)


@_alone
def scatter(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Points (xs, ys) by name. `labels`, one a point, stand beside it where there is room, and in its hover."""
    dots: dict[str, list[tuple[Any, ...]]] = {}
    for name, points in series.items():
        words = (labels or {}).get(name, [""] * len(points[0]))
        known = [bool(rows_of(([x], [y]), log_x, log_y)) for x, y in zip(*points, strict=True)]
        dots[name] = [row for row, keep in zip(zip(*points, words, strict=True), known, strict=True) if keep]
    rows = [row for found in dots.values() for row in found]
    x, y = scale([row[0] for row in rows], log_x, exact=True), scale([row[1] for row in rows], log_y)
    entries = [Entry(name, "dot", _look(i)[0]) for i, name in enumerate(dots)]
    canvas, axes = _plot(x, y, entries, x_label, y_label)
    for entry, found in zip(entries, dots.values(), strict=True):
        look: dict[str, Any] = {"color": entry.colour, "linewidths": 0, "clip_on": False}
        drawn = axes.scatter([x for x, *_ in found], [y for _, y, _ in found], s=40, **look)
        titles = [f"{word or entry.name}: {x_label} {number(x)}, {y_label} {number(y)}" for x, y, word in found]
        canvas.hover(drawn, titles)
    spots = [canvas.place(axes, x, y) for x, y, _ in rows]
    taken = [(left - 5, top - 5, left + 5, top + 5) for left, top in spots]
    for (left, top), (*_, word) in zip(spots, rows, strict=True):
        label = shortened(word, 24)
        if label and (side := beside((left, top), label, canvas.width, taken)):
            canvas.text(left + 8 * side, top + 4, label, "left" if side > 0 else "right", size=11, gid=HALO)
    return canvas.svg()


class _Bar(NamedTuple):
    group: int
    value: float
    spread: float  # half-width of its whisker
    title: str


@_alone
def bars(
    groups: Sequence[str],
    series: Mapping[str, Values],
    *,
    y_label: str,
    log_y: bool = False,
    errors: Mapping[str, Values] | None = None,
    baseline: Level | None = None,
) -> str:
    """A bar for each group and series. `errors` are half-widths of their whiskers, `baseline` a level (label, y)."""
    found = {name: _bars(groups, name, values, (errors or {}).get(name), log_y) for name, values in series.items()}
    ends = [bar.value + side * bar.spread for each in found.values() for bar in each for side in (-1, 0, 1)]
    y = scale([end for end in ends if drawable(end, log_y)] + _known(baseline, log_y), log_y, zero=True)
    slots = slots_of(groups, len(series))
    entries = [Entry(name, "box", _look(i)[0]) for i, name in enumerate(series)]
    x = Scale(-0.5, max(1, len(groups)) - 0.5, False, {})
    canvas, axes = _plot(x, y, entries, "", y_label, baseline, wide=slots.width, left=slots.left, below=slots.below)
    for g, label in enumerate(slots.labels):
        left, top = canvas.place(axes, g, y.low)
        for i, line in enumerate(label):
            how = ("right", 35) if slots.turned else ("center", 0)
            canvas.text(left + 4 * slots.turned, top + 17 + 15 * i, line, *how)
    for i, (entry, mine) in enumerate(zip(entries, found.values(), strict=True)):
        at = [bar.group + (i - (len(series) - 1) / 2) * slots.bar for bar in mine]
        _draw_bars(canvas, axes, y, at, slots.bar * 0.46, mine, entry.colour)
    return canvas.svg()


def _bars(groups: Sequence[str], name: str, values: Values, spreads: Values | None, log: bool) -> list[_Bar]:
    bars = []
    for g, (group, value, spread) in enumerate(zip(groups, values, spreads or [0.0] * len(values), strict=True)):
        if drawable(value, log):
            half = abs(spread) if drawable(spread) else 0.0
            title = f"{group} · {name}: {number(value)}" + (f" ± {number(half)}" if half else "")
            bars.append(_Bar(g, float(value), half, title))
    return bars


def _draw_bars(
    canvas: "_Canvas", axes: Axes, y: Scale, at: list[float], half: float, bars: list[_Bar], colour: str
) -> None:
    floor = y.low if y.log else 0.0
    boxes = [(x - half, floor, x + half, bar.value) for x, bar in zip(at, bars, strict=True)]
    canvas.boxes(axes, boxes, [colour] * len(bars), [bar.title for bar in bars])
    tops = [bar.value + bar.spread for bar in bars]
    whiskers = [(x, max(bar.value - bar.spread, y.low), top) for x, bar, top in zip(at, bars, tops, strict=True)]
    whiskers = [whisker for whisker, bar in zip(whiskers, bars, strict=True) if bar.spread]
    for x, low, high in whiskers:
        axes.plot([x, x], [low, high], color=INK, linewidth=1.3, clip_on=False)
    left, right = (canvas.place(axes, side, floor)[0] for side in (-half, half))
    if right - left > max((width(number(bar.value), 10) for bar in bars), default=0.0) - 6:
        for x, top, bar in zip(at, tops, bars, strict=True):
            middle, up = canvas.place(axes, x, max(top, floor))
            canvas.text(middle, up - 5, number(bar.value), "center", size=10.5, gid=HALO)


@_alone
def heatmap(
    values: Sequence[Values],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    value_label: str,
    diverging: bool = False,
    annotate: Literal["auto"] | bool = "auto",
) -> str:
    """A cell for each number of `values` (rows of them). `diverging`: the colour shows the distance from 0, to either
    side. `annotate`: the numbers stand in the cells, "auto" when they are few. No number: a cell with a dashed edge."""
    rows, columns = told_apart(row_labels, 28), told_apart(column_labels, 20)
    grid = grid_of(rows, columns)
    canvas, axes = _sheet(max(grid.width, width(value_label) * 1.1, 260), grid.height)
    canvas.text(0, 12, value_label, weight="bold")
    for r in range(0, len(rows), grid.row_stride):
        canvas.text(grid.left - 8, grid.top + (r + 0.5) * grid.cell_h + 4, rows[r], "right")
    for c in range(0, len(columns), grid.column_stride):
        left, look = grid.left + (c + 0.5) * grid.cell_w, ("left", 45) if grid.turned else ("center", 0)
        canvas.text(left, grid.top - 7, columns[c], *look)
    cells = [
        (grid.cell(r, c), f"{row_label} · {column_label}: {number(value)}", value)
        for r, (row, row_label) in enumerate(zip(values, row_labels, strict=True))
        for c, (value, column_label) in enumerate(zip(row, column_labels, strict=True))
    ]
    full = [(box, title, value) for box, title, value in cells if drawable(value)]
    empty = [(box, title) for box, title, value in cells if not drawable(value)]
    known = [value for *_, value in full]
    paint = _ramp(known, diverging)
    _key(canvas, axes, known, diverging)
    canvas.boxes(axes, [box for box, *_ in full], [paint(value) for value in known], [title for _, title, _ in full])
    canvas.boxes(axes, [box for box, _ in empty], None, [title for _, title in empty])
    for left, top, right, bottom in (box for box, _ in empty if grid.cell_h > SIZE and len(empty) <= 64):
        canvas.text((left + right) / 2, (top + bottom) / 2 + 4, "–", "center", alpha=0.8)
    if annotate is True or (annotate == "auto" and len(cells) <= 64 and grid.cell_w >= 40):
        for (left, top, right, bottom), _, value in full:
            ink = INK if diverging else _ink_on(paint(value))
            canvas.text((left + right) / 2, (top + bottom) / 2 + 4, number(value), "center", size=11, colour=ink)
    return canvas.svg()


def _ramp(known: Sequence[float], diverging: bool) -> Callable[[float], tuple[float, ...]]:
    """The colour, with opacity, of a number among `known`."""
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    most = max(abs(low), abs(high)) or 1.0
    viridis = mpl.colormaps["viridis"]

    def paint(value: float) -> tuple[float, ...]:
        if diverging:
            return to_rgba(ABOVE if value > 0 else BELOW, max(0.004, MOST * abs(value) / most))
        return viridis(0.08 + 0.88 * ((value - low) / (high - low) if high > low else 0.5))

    return paint


def _ink_on(colour: Sequence[float]) -> str:
    """White or black, whichever stands out more (WCAG 2's relative luminance)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return "#ffffff" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179 else "#000000"


def _key(canvas: "_Canvas", axes: Axes, known: Sequence[float], diverging: bool) -> None:
    """The colours of a heat map between its least and its greatest number, under its title."""
    if not known:
        canvas.text(0, 32, "no values", alpha=0.8)
        return
    low, high = min(known), max(known)
    if diverging:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    steps, paint = 11 if high > low else 1, _ramp([low, high], diverging)
    begin = width(number(low)) + 4
    boxes = [(begin + 13 * i, 23.0, begin + 13 * i + 12, 33.0) for i in range(steps)]
    canvas.text(0, 32, number(low), alpha=0.8)
    canvas.boxes(axes, boxes, [paint(low + (high - low) * i / max(1, steps - 1)) for i in range(steps)], [])
    if high > low:
        canvas.text(boxes[-1][2] + 6, 32, number(high), alpha=0.8)


class _Canvas:
    """A matplotlib figure, measured in CSS pixels from its top left corner, and the hover texts of its shapes."""

    def __init__(self, wide: float, tall: float) -> None:
        self.width, self.height = wide, tall
        self.figure = Figure(figsize=(wide / 72, tall / 72), dpi=72)  # so that a point is a pixel
        self.titles: dict[str, Sequence[str]] = {}

    def axes(self, left: float, top: float, wide: float, tall: float) -> Axes:
        bottom = 1 - (top + tall) / self.height
        return self.figure.add_axes((left / self.width, bottom, wide / self.width, tall / self.height))

    def place(self, axes: Axes, x: float, y: float) -> tuple[float, float]:
        """(from the left, from the top) of a point of the data."""
        left, bottom = axes.transData.transform((x, y))
        return float(left), self.height - float(bottom)

    def text(self, left: float, top: float, text: str, anchor: str = "left", angle: float = 0, **look: Any) -> None:
        """One line whose baseline is at `top`; dollars are dollars. `look`: size, colour, alpha, weight."""
        look = {"size": SIZE, "color": look.pop("colour", INK), "ha": anchor, "va": "baseline"} | look
        place = left / self.width, 1 - top / self.height
        self.figure.text(*place, shortened(text, 120), rotation=angle, rotation_mode="anchor", parse_math=False, **look)

    def boxes(self, axes: Axes, boxes: Sequence[Box], colours: Sequence[Any] | None, titles: Sequence[str]) -> None:
        """Rectangles of the data's units; without colours, only their dashed edges."""
        corners = [[(a, b), (c, b), (c, d), (a, d)] for a, b, c, d in boxes]
        look: dict[str, Any] = {"facecolors": colours, "linewidths": 0}
        if colours is None:
            look = {"facecolors": "none", "edgecolors": to_rgba(INK, 0.4), "linewidths": 0.8, "linestyles": DASHES[2]}
        self.hover(axes.add_collection(PolyCollection(corners, clip_on=False, **look), autolim=False), titles)

    def hover(self, artist: Artist, titles: Sequence[str]) -> None:
        artist.set_gid(f"hover-{len(self.titles)}")
        self.titles[f"hover-{len(self.titles)}"] = titles

    def svg(self) -> str:
        FigureCanvasSVG(self.figure)
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(written, format="svg", transparent=True, metadata=nothing)
        return inline(written.getvalue(), INK, self.titles)


def _sheet(wide: float, tall: float) -> tuple[_Canvas, Axes]:
    """A canvas with axes of which a unit is a pixel, from the top left."""
    canvas = _Canvas(wide, tall)
    axes = canvas.axes(0, 0, wide, tall)
    axes.set(xlim=(0, wide), ylim=(tall, 0))
    axes.axis("off")
    return canvas, axes


def _plot(
    x: Scale,
    y: Scale,
    entries: Sequence[Entry],
    x_label: str,
    y_label: str,
    level: Level | None = None,
    *,
    wide: float = WIDE,
    left: float = 0.0,
    below: float = 24.0,
) -> tuple[_Canvas, Axes]:
    """An empty plot: labels, legend, grid, the dashed level. `left`, `below`: pixels for what stands there."""
    known = _known(level, y.log)
    if level and known:
        entries = [*entries, Entry(level[0], "line", INK, DASHES[2])]
    placed, top = legend_of(entries, wide) if len(entries) > 1 else ([], 26.0)
    left = max([left, *map(width, y.ticks.values())]) + 8
    canvas = _Canvas(wide, top + TALL + below + 20 * bool(x_label))
    axes = canvas.axes(left, top, wide - left - 10, TALL)
    canvas.text(0, 12, y_label, weight="bold")
    canvas.text(left + (wide - left - 10) / 2, canvas.height - 5, x_label, "center", alpha=0.8)
    for at, down, entry in placed:
        _sample(canvas, at, down, entry)
    axes.set(xscale="log" if x.log else "linear", yscale="log" if y.log else "linear")
    axes.set_xticks(list(x.ticks), list(x.ticks.values()))
    axes.set_yticks(list(y.ticks), list(y.ticks.values()))
    axes.minorticks_off()
    axes.set(xlim=(x.low, x.high), ylim=(y.low, y.high), axisbelow=True)
    axes.tick_params(length=0, pad=6, labelsize=SIZE, labelcolor=INK)
    axes.grid(axis="y", color=INK, alpha=0.13, linewidth=1, clip_on=False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=INK, alpha=0.4, linewidth=1)
    for height in known:
        axes.axhline(height, color=INK, alpha=0.75, linewidth=1.3, linestyle=DASHES[2], clip_on=False)
    if not y.ticks:
        canvas.text(wide / 2, top + TALL / 2, "no values", "center", alpha=0.8)
    return canvas, axes


def _sample(canvas: _Canvas, left: float, baseline: float, entry: Entry) -> None:
    """A series' name in the legend, after what it looks like."""
    look: dict[str, Any] = {"color": entry.colour, "linestyle": entry.dash, "linewidth": 2.2}
    if entry.kind != "line":
        size, hollow = 10 if entry.kind == "box" else 8, entry.kind == "ring"
        look = {"marker": "s" if entry.kind == "box" else "o", "markersize": size, "linestyle": "none"}
        look |= {"mec": entry.colour, "mew": 1.4 * hollow, "mfc": "none" if hollow else entry.colour}
    xs = [left, left + 18] if entry.kind == "line" else [left + 9]
    xs, ys = [at / canvas.width for at in xs], [1 - (baseline - 4) / canvas.height] * len(xs)
    canvas.figure.add_artist(Line2D(xs, ys, transform=canvas.figure.transFigure, **look))
    canvas.text(left + 24, baseline, shortened(entry.name, 36))


def _look(i: int) -> tuple[str, Any]:
    return SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]


def _known(level: Level | None, log: bool) -> list[float]:
    return [float(level[1])] if level is not None and drawable(level[1], log) else []
