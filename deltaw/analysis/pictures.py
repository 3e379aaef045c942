"""Pictures of updates and runs as inline SVG: lines, heat maps, bars, spectra, scatters.

Each function takes plain lists and returns one `<svg>` element for a page (page.py). matplotlib draws, through its
object API (pyplot would keep figures and a backend for the whole process), and decides ranges, ticks, legends and how
wide a text is; what it writes is cleaned by svg.py. Decided here:

    size      a plot's or a cell's size is fixed in CSS pixels, and the picture is as large as what stands around it
              (savefig's tight box). The page may shrink it
    text      stays text, in the page's own font. matplotlib measures with DejaVu Sans, which is wider than most
    colour    text, axes and grid are `INK`, which becomes `currentColor`: they follow the page into dark mode.
              `SERIES` are mid-tones with a contrast of 3 on white and on near-black, apart also for colour-blind eyes
    ramps     viridis without its ends; deviations fade from both sides into the page, which is zero in either mode
    words     the y label lies flat above the plot, as the legend's title: no head to turn, no overlap
    hover     cells, bars and points say their value in a `<title>`, without a script

A number that is None, NaN, infinite or, on a logarithmic axis, not positive is a gap, never an error. Labels are a
stranger's: no mathtext, control characters made visible, long ones shortened (the table under the picture has them
whole). The same input gives the same bytes, whatever the user's matplotlibrc says.

Rejected: PNG (blurred when zoomed, one colour mode, no text); text as paths (four times the size, unsearchable);
constrained layout (it shrinks the plot to fit a figure whose size must be known before); `colorbar` (more than fifty
colours become a PNG).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any

from deltaw.analysis.page import number, thinned, visible
from deltaw.analysis.svg import DASHES, HALO, INK, SERIES, Figure, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

BELOW, ABOVE, MOST = "#2c73cb", "#c4570c", 0.8  # deviations; at this opacity text on them can still be read
WIDE, TALL = 400.0, 210.0  # of a plot, without what stands around it: shrunk as far as it can be read, a phone holds it
LETTER = 7.0  # pixels, about, of a text's letters
MAX_LABEL = 36  # letters
MOST_POINTS = 1000  # of a curve, of a longer one each stretch's least and greatest
HUGE = 1e150  # beyond it a range overflows

Values = Sequence[float | None]
Points = tuple[Sequence[float], Values]
Level = tuple[str, float]


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
    with figure() as picture:
        axes = _plot(picture, x_label, log_x, log_y)
        colours, known_xs = {}, set()
        for name, points in series.items():
            xs, ys = _columns(points, (log_x, log_y))
            known = [x for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
            look: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgewidth": 0} if len(known) <= 16 else {}
            places = thinned(ys, MOST_POINTS)
            xs, ys = [xs[i] for i in places], [ys[i] for i in places]
            (line,) = axes.plot(xs, ys, linewidth=1.8 if len(known) <= 200 else 1.1, clip_on=False, **look)
            picture.entries.append((line, name))
            colours[name] = line.get_color()
            known_xs |= set(known)
        for name, band in (bands or {}).items():
            xs, low, high = _columns(band, (log_x, log_y, log_y))
            axes.fill_between(
                xs, low, high, color=colours.get(name, SERIES[-1]), alpha=0.18, linewidth=0, clip_on=False
            )
        for name, points in (marks or {}).items():
            ring: dict[str, Any] = {"markersize": 8, "markerfacecolor": "none", "markeredgecolor": INK}
            (spots,) = axes.plot(*_columns(points, (log_x, log_y)), "o", clip_on=False, **ring)
            picture.entries.append((spots, name))
        _finish(picture, axes, y_label, baseline, sorted(known_xs))
        return picture.svg()


def spectrum(series: Mapping[str, Sequence[float]], *, log_y: bool = True) -> str:
    """Singular values against their index, which begins with 1, by name."""
    numbered = {name: (range(1, len(sigma_K) + 1), sigma_K) for name, sigma_K in series.items()}
    return lines(numbered, x_label="index", y_label="singular value", log_y=log_y)


def scatter(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    labels: Mapping[str, Sequence[str]] | None = None,
    joined: bool = False,
) -> str:
    """Points (xs, ys) by name. `labels`, one per point, stand beside it where there is room, and in its hover.
    `joined`: by a line, in their order."""
    with figure() as picture:
        axes = _plot(picture, x_label, log_x, log_y)
        dots: list[tuple[float, float, str]] = []
        for name, points in series.items():
            words = (labels or {}).get(name, [""] * len(points[0]))
            columns = zip(*_columns(points, (log_x, log_y)), words, strict=True)
            known = [(x, y, word) for x, y, word in columns if math.isfinite(x) and math.isfinite(y)]
            xs, ys = [x for x, _, _ in known], [y for _, y, _ in known]
            drawn = axes.scatter(xs, ys, s=40, linewidths=0, clip_on=False)
            if joined:
                axes.plot(xs, ys, color=drawn.get_facecolor()[0], linewidth=1.3, linestyle="-", clip_on=False)
            picture.entries.append((drawn, name))
            says = [f"{word or name}: {x_label} {number(x)}, {y_label} {number(y)}" for x, y, word in known]
            picture.hover(drawn, says)
            dots += known
        _finish(picture, axes, y_label, None, sorted({x for x, _, _ in dots}))
        _label_points(axes, dots)
        return picture.svg()


def _label_points(axes: "Axes", dots: Sequence[tuple[float, float, str]]) -> None:
    """Each label to the right of its point, or to the left, or nowhere: where it is on no point and no other label."""
    from matplotlib.transforms import Bbox

    spots = [axes.transData.transform((x, y)) for x, y, _ in dots]
    taken = [Bbox.from_bounds(left - 5, bottom - 5, 10, 10) for left, bottom in spots]
    for x, y, word in dots:
        for side, anchor in ((8, "left"), (-8, "right")) if word else ():
            label = axes.annotate(
                shortened(word, 24), (x, y), (side, 0), textcoords="offset points", ha=anchor, va="center", size=11
            )
            label.set_gid(HALO)
            box = label.get_window_extent()
            if not box.count_overlaps(taken) and axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 + 40:
                taken.append(box)
                break
            label.remove()


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
    count, each = max(1, len(groups)), max(1, len(series))
    slot = max(84.0, 26.0 * each + 24, 280 / count)  # of a group, in pixels
    names = [fill(shortened(name, 60), int(slot / LETTER), break_long_words=False) for name in groups]
    slanted = any(name.count("\n") > 2 or LETTER * max(map(len, [*name.split("\n"), ""])) > slot for name in names)
    if slanted:
        slot, names = max(40.0, 18.0 * each), [shortened(name, 24) for name in groups]
    wide = min(34.0, slot * 0.8 / each) / slot
    with figure() as picture:
        axes = _plot(picture, "", False, log_y, wide=slot * count)
        columns = [_columns((values,), (log_y,))[0] for values in series.values()]
        known = [value for values in columns for value in values if math.isfinite(value)]
        floor = 10.0 ** math.floor(math.log10(min(known)) - 0.01) if log_y and known else 0.0
        for i, (name, values) in enumerate(zip(series, columns, strict=True)):
            halves = _columns(((errors or {}).get(name, [None] * len(values)),), (False,))[0]
            places = [g + (i - (each - 1) / 2) * wide for g in range(len(groups))]
            heights = [value - floor for value in values]
            whiskers: dict[str, Any] = {"ecolor": INK, "elinewidth": 1.3, "clip_on": False}
            drawn = axes.bar(
                places, heights, wide * 0.92, floor, yerr=list(map(abs, halves)), error_kw=whiskers, clip_on=False
            )
            picture.entries.append((drawn, name))
            for bar, group, value, half in zip(drawn, groups, values, halves, strict=True):
                spread = f" ± {number(abs(half))}" if math.isfinite(half) and half else ""
                if math.isfinite(value):
                    picture.hover(bar, [f"{group} · {name}: {number(value)}{spread}"])
            says = [number(value) if math.isfinite(value) else "" for value in values]
            if max(map(len, says), default=0) * LETTER < wide * slot + 6:
                for label in axes.bar_label(drawn, says, padding=3, size=10.5):
                    label.set_gid(HALO)
        axes.margins(y=0.1)
        axes.set_xlim(-0.5, count - 0.5)
        _finish(picture, axes, y_label, baseline)
        how: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(range(len(groups)), names, **how)
        return picture.svg()


def heatmap(
    values: Sequence[Values],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    value_label: str,
    diverging: bool = False,
) -> str:
    """A cell for each number of `values` (rows of them). `diverging`: the colour shows the distance from 0, to either
    side. The numbers stand in the cells when they are few. No number: a grey cell."""
    from matplotlib.collections import PolyCollection

    columns = [shortened(name, 20) for name in column_labels]
    longest = LETTER * max(map(len, columns), default=0)
    wide = min(max(longest + 10, 44.0), 78.0) if len(columns) <= 12 else max(4.0, min(28.0, 620 / len(columns)))
    tall = next((tall for most, tall in ((8, 30.0), (16, 24.0), (40, 17.0)) if len(values) <= most), 0.0)
    tall = tall or max(3.0, 680 / len(values))
    named = [
        (f"{row_label} · {column_label}", value)
        for row, row_label in zip(values, row_labels, strict=True)
        for value, column_label in zip(_columns((row,), (False,))[0], column_labels, strict=True)
    ]
    known = [value for _, value in named]
    spots = [(i % len(columns), i // len(columns)) for i in range(len(known))]
    gap_x, gap_y = (0.75 / wide, 0.75 / tall) if min(wide, tall) >= 8 else (0.0, 0.0)
    corners = [(gap_x, gap_y), (1 - gap_x, gap_y), (1 - gap_x, 1 - gap_y), (gap_x, 1 - gap_y)]
    with figure() as picture:
        axes = picture.axes(wide * max(1, len(columns)), tall * max(1, len(values)))
        axes.set(xlim=(0, max(1, len(columns))), ylim=(max(1, len(values)), 0))
        axes.axis("off")  # labels are texts: ticks take twenty times as long
        for r in range(0, len(values), _stride(14 / tall)):
            axes.text(-6 / wide, r + 0.5, shortened(row_labels[r], 28), ha="right", va="center")
        short = longest <= 3 * LETTER  # so short that every second or fifth will do
        slanted = longest > wide - 4 and not short
        how: dict[str, Any] = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if slanted else {"ha": "center"}
        heads = range(0, len(columns), _stride(((longest if short else 12) + 3) / wide))
        labels = [axes.text(c + 0.5, -6 / tall, columns[c], va="baseline", **how) for c in heads]
        ramp, norm = _ramp(known, diverging)

        def cells(boxes: Sequence[Any], numbers: Sequence[float]) -> PolyCollection:
            drawn = PolyCollection(boxes, array=numbers, cmap=ramp, norm=norm, linewidths=0, clip_on=False)
            axes.add_collection(drawn, autolim=False)
            return drawn

        boxes = [[(x + right, y + down) for right, down in corners] for x, y in spots]
        picture.hover(cells(boxes, known), [f"{name}: {number(value)}" for name, value in named])
        for (x, y), value in zip(spots, known, strict=True) if len(known) <= 64 and wide >= 40 else ():
            ink = _ink_on(ramp(norm(value))) if math.isfinite(value) and not diverging else INK
            axes.text(x + 0.5, y + 0.5, number(value), ha="center", va="center", size=11, color=ink)
        top = max((label.get_window_extent().y1 for label in labels), default=axes.bbox.y1) - axes.bbox.y1
        axes.text(0, -(top + 22) / tall, shortened(value_label, 120), weight="bold")
        _key(axes, cells, (wide, tall), top, [value for value in known if math.isfinite(value)], diverging)
        return picture.svg()


def _ramp(known: Sequence[float], diverging: bool) -> "tuple[Colormap, Normalize]":
    """The colours, with opacity, of the numbers among `known`."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize, to_rgba

    finite = [value for value in known if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if diverging:
        most = max(abs(low), abs(high)) or 1.0
        faint = 0.004  # drawn, so that it can be hovered over, but not seen
        sides = [(0.0, to_rgba(BELOW, MOST)), (0.5, to_rgba(BELOW, faint))]
        sides += [(0.5, to_rgba(ABOVE, faint)), (1.0, to_rgba(ABOVE, MOST))]
        ramp: Colormap = LinearSegmentedColormap.from_list("", sides)
        norm = Normalize(-most, most)
    else:
        ramp = ListedColormap(mpl.colormaps["viridis"]([0.08 + 0.88 * i / 255 for i in range(256)]))
        norm = Normalize(low, high) if high > low else Normalize(low - 1, high + 1)
    return ramp.with_extremes(bad=to_rgba(INK, 0.1)), norm


def _ink_on(colour: Sequence[float]) -> str:
    """White or black, whichever stands out more (WCAG 2's relative luminance)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return "#ffffff" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179 else "#000000"


def _key(
    axes: "Axes", cells: Callable[..., Any], size: tuple[float, float], top: float, known: Sequence[float],
    diverging: bool,
) -> None:  # fmt: skip
    """A heat map's colours between the least and the greatest number, `top` pixels and a little above it."""
    if not known:
        axes.text(0, -(top + 11) / size[1], "no values", va="center", alpha=0.8)
        return
    low, high = min(known), max(known)
    if diverging:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    steps, begin = 11 if high > low else 1, LETTER * len(number(low)) + 6
    down, up = -(top + 6) / size[1], -(top + 16) / size[1]
    lefts = [(begin + 13 * i) / size[0] for i in range(steps)]
    boxes = [[(x, up), (x + 12 / size[0], up), (x + 12 / size[0], down), (x, down)] for x in lefts]
    cells(boxes, [low + (high - low) * i / max(1, steps - 1) for i in range(steps)])
    look: dict[str, Any] = {"va": "center", "alpha": 0.8}
    axes.text((begin - 4) / size[0], (up + down) / 2, number(low), ha="right", **look)
    if high > low:
        axes.text((begin + 13 * steps + 3) / size[0], (up + down) / 2, number(high), **look)


def _plot(picture: Figure, x_label: str, log_x: bool, log_y: bool, wide: float = WIDE) -> "Axes":
    axes = picture.axes(wide, TALL)
    axes.grid(axis="y", clip_on=False)
    axes.spines["bottom"].set_alpha(0.4)
    axes.set_xlabel(shortened(x_label, 120), alpha=0.8)
    axes.set(**{f"{axis}scale": "log" for axis, log in (("x", log_x), ("y", log_y)) if log})
    return axes


def _finish(
    picture: Figure, axes: "Axes", y_label: str, baseline: Level | None = None, xs: Sequence[float] = ()
) -> None:
    """Ticks, the dashed level, the legend under the y label. `xs`, the data's own: whole numbers have no ticks between
    them, and of a logarithmic axis a few are the ticks themselves (ranks 1, 4, 16, 64; learning rates)."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if baseline and math.isfinite(level := _columns(([baseline[1]],), (axes.get_yscale() == "log",))[0][0]):
        line = axes.axhline(level, color=INK, alpha=0.75, linewidth=1.3, linestyle=DASHES[2], clip_on=False)
        picture.entries.append((line, baseline[0]))
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_formatter(FuncFormatter(_tick))
        if axis.get_scale() == "log":
            decades = math.log10(limits[1] / limits[0])
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=8))
            axis.set_minor_locator(NullLocator())
    if axes.get_xscale() == "linear":
        axes.locator_params(axis="x", integer=all(float(x).is_integer() for x in xs))
    elif 1 < len(xs) <= 8 and min(b / a for a, b in pairwise(xs)) > (xs[-1] / xs[0]) ** 0.08:
        axes.xaxis.set_major_locator(FixedLocator(xs))
    shown = picture.entries if len(picture.entries) > 1 else []
    names = [shortened(name) for _, name in shown]
    columns = int(max(WIDE, axes.bbox.width) / (LETTER * max(map(len, names), default=1) + 46))
    axes.legend(
        [handle for handle, _ in shown], names, ncols=max(1, columns), loc="lower left", bbox_to_anchor=(0, 1),
        title=shortened(y_label, 120), title_fontproperties={"weight": "bold", "size": 12}, alignment="left",
    )  # fmt: skip


def _columns(columns: Sequence[Sequence[float | None]], logs: Sequence[bool]) -> list[list[float]]:
    """Columns of one length (else ValueError), NaN for every number that has no place on its axis."""
    rows = list(zip(*columns, strict=True))
    return [[_drawable(row[i], log) for row in rows] for i, log in enumerate(logs)]


def _drawable(value: float | None, log: bool) -> float:
    return value if value is not None and abs(value) < HUGE and (not log or value > 1 / HUGE) else math.nan


def _tick(value: float, place: int | None = None) -> str:
    """A round number as one writes it: 0.001, 20 000, 3e−5."""
    mantissa, _, power = f"{value:,.10g}".partition("e")
    return (f"{mantissa}e{int(power)}" if power else mantissa).replace("-", "−")


def shortened(text: str, most: int = MAX_LABEL) -> str:
    """One line of at most `most` letters; the middle gives way, since paths differ at both ends."""
    line = " ".join(visible(text[:10_000]).split())
    if len(line) <= most:
        return line
    head = (most - 1) // 3
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"


def _stride(needed: float) -> int:
    """Of so many places one has a label."""
    return next((step for step in (1, 2, 5, 10, 20, 50, 100) if step >= needed), 200)
