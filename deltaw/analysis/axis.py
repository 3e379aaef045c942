"""Numbers on an axis: which of them can be drawn, from where to where it runs, what stands along it.

    linear        the data with some air; up to six ticks at 1, 2, 2.5 or 5 times a power of ten, with the decimals
                  that tell neighbours apart
    logarithmic   the decades; 1, 2 and 5 of each where there are fewer than three; the data's own values where they
                  are few and chosen (ranks 1, 4, 16, 64; learning rates)

Range and ticks are fixed from the data before anything is drawn, since a picture's margins follow the labels.
A number that is None, NaN, infinite or, on a logarithmic axis, not positive is a gap in a curve, never an error.
Rejected: matplotlib's locators and formatters (offsets like "+1.2e3" in a corner, 0.0003 and 10⁻³ on one axis).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

from deltaw.analysis.page import number

HUGE = 1e290  # beyond it a range overflows
COUNT = 6  # ticks, at most about
BUCKETS = 500  # of a long curve, each about a pixel wide

Values = Sequence[float | None]


class Scale(NamedTuple):
    """The range of an axis and the labels along it, by position."""

    low: float
    high: float
    log: bool
    ticks: dict[float, str]


def drawable(value: float | None, log: bool = False) -> TypeGuard[float]:
    """Whether a number has a place on an axis: finite, and positive on a logarithmic one."""
    return value is not None and abs(value) < HUGE and (not log or value > 1 / HUGE)


def rows_of(columns: Sequence[Sequence[Any]], log_x: bool, log_y: bool) -> list[tuple[Any, ...]]:
    """(x, y, …) of columns of one length (else ValueError), without the rows that have no place."""
    rows = zip(*columns, strict=True)
    return [row for row in rows if drawable(row[0], log_x) and all(drawable(value, log_y) for value in row[1:])]


def curve_of(points: tuple[Sequence[float], Values], log_x: bool, log_y: bool) -> tuple[list[float], list[float]]:
    """xs and ys of a line, NaN where it breaks; of a long one each bucket's least and greatest, so no spike is lost."""
    kept = [(x, y if drawable(y, log_y) else math.nan) for x, y in zip(*points, strict=True) if drawable(x, log_x)]
    shown = [kept[i] for i in thinned([y for _, y in kept], 2 * BUCKETS)]
    return [float(x) for x, _ in shown], [float(y) for _, y in shown]


def thinned(values: Values, most: int) -> list[int]:
    """At most `most` places in a long row of numbers: of each of `most` / 2 stretches the least and the greatest."""
    size = math.ceil(len(values) / (most // 2))
    if size <= 2:
        return list(range(len(values)))
    return [place for i in range(0, len(values), size) for place in _extremes(values, i, min(len(values), i + size))]


def evenly(length: int, most: int) -> list[int]:
    """At most `most` places of a row, the first and the last among them."""
    return list(range(length)) if length <= most else [round(i * (length - 1) / (most - 1)) for i in range(most)]


def scale(
    values: Sequence[float], log: bool = False, *, zero: bool = False, exact: bool = False, air: float = 0.05
) -> Scale:
    """Of drawable values, with `air` (a share of their range) at both ends. `zero`: bars stand on 0, or on a power of
    ten; `exact`: a few values of a logarithmic axis are its ticks."""
    if not values:
        return Scale(0.1 if log else 0.0, 1.0, log, {})
    low, high = float(min(values)), float(max(values))
    if log:
        room = min(air * (math.log10(high) - math.log10(low)) or 0.2, 1.0)
        bottom = 10.0 ** math.floor(math.log10(low) - 0.01) if zero else low / 10**room
        return Scale(bottom, high * 10**room, True, _log_ticks(bottom, high * 10**room, values if exact else ()))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = air * (high - low)
    if room <= 1e-9 * max(abs(low), abs(high)):  # a single value, or as good as
        room = 0.1 * max(abs(low), abs(high)) or 1.0
    bottom = low - room if low != 0 or not zero else low
    top = high + room if high != 0 or not zero or low == 0 else high
    return Scale(bottom, top, False, _linear_ticks(bottom, top, all(float(value).is_integer() for value in values)))


def labels(ticks: Sequence[float]) -> dict[float, str]:
    """Round numbers as one writes them: 0.001 and 20 000, or 3e−4 and 1 as soon as one of them is too long."""
    long = any(tick and not 1e-3 <= abs(tick) < 1e6 for tick in ticks)
    return {tick: _power(tick) if long else _plain(tick) for tick in ticks}


def _plain(value: float) -> str:
    return number(round(value)) if float(value).is_integer() else f"{value:g}".replace("-", "−")


def _power(value: float) -> str:
    mantissa, _, power = f"{value:.12e}".partition("e")
    digits = mantissa.rstrip("0").rstrip(".")
    return (f"{digits}e{int(power)}" if int(power) else digits).replace("-", "−")


def _extremes(values: Values, begin: int, end: int) -> list[int]:
    known = [(value, i) for i in range(begin, end) if drawable(value := values[i])]
    return sorted({min(known)[1], max(known)[1]}) if known else [begin]


def _linear_ticks(low: float, high: float, whole: bool) -> dict[float, str]:
    """The multiples of a round step; `whole` numbers have no ticks between them."""
    rough = (high - low) / COUNT
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= rough * 0.999)
    if whole and not step.is_integer():
        step = float(math.ceil(step))
    ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += abs(round(step, decimals) - step) > 1e-6 * step
    if not 1e-3 <= max(map(abs, ticks)) < 1e6:
        return labels(ticks)
    return {tick: f"{tick:.{decimals}f}".replace("-", "−") if decimals else number(round(tick)) for tick in ticks}


def _log_ticks(low: float, high: float, known: Sequence[float]) -> dict[float, str]:
    few, span = sorted(set(known)), math.log(high) - math.log(low)
    if 1 < len(few) <= 8 and min(math.log(b) - math.log(a) for a, b in pairwise(few)) > 0.08 * span:
        return labels(few)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(decades) >= 3:
        return labels(decades[:: math.ceil(len(decades) / 6)])
    finer = [m * 10.0**power for power in powers for m in (1, 2, 5) if low <= m * 10.0**power <= high]
    if len(finer) >= 3:
        return labels(finer)
    return {tick: label for tick, label in _linear_ticks(low, high, False).items() if tick > 0}
