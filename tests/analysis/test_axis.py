"""Numbers on an axis: what can be drawn, ranges that hold it, ticks that tell apart; gaps and spikes stay."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltaw.analysis.axis import curve_of, drawable, rows_of, scale

numbers = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=400)
@given(st.lists(numbers, max_size=12), st.booleans(), st.booleans(), st.booleans())
@example([1e289, 1e-289], True, False, False)
@example([0.0], False, True, False)
def test_a_scale_holds_its_values_and_its_ticks_tell_apart(
    values: list[float], log: bool, zero: bool, exact: bool
) -> None:
    known = [value for value in values if drawable(value, log)]
    axis = scale(known, log, zero=zero, exact=exact)
    assert axis.low < axis.high and math.isfinite(axis.high - axis.low)
    assert all(axis.low <= value <= axis.high for value in known)
    slack = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)
    assert len(axis.ticks) <= 10
    assert bool(axis.ticks) == bool(known)
    if not log and zero and known:
        assert axis.low <= 0 <= axis.high


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans())
def test_labels_of_neighbours_differ(low: float, span: float, whole: bool) -> None:
    values = [float(round(low)), float(round(low + span))] if whole else [low, low + span]
    labels = list(scale(values).ticks.values())
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0.42, 2.9], False, ["0.5", "1.0", "1.5", "2.0", "2.5", "3.0"]),
        ([0, 800], False, ["0", "200", "400", "600", "800"]),
        ([1, 2, 3], False, ["1", "2", "3"]),
        ([0, 20_000], False, ["0", "5\u202f000", "10\u202f000", "15\u202f000", "20\u202f000"]),
        ([-1e-5, 1e-5], False, ["−1e−5", "−5e−6", "0", "5e−6", "1e−5"]),
        ([1, 4, 16, 64], True, ["1", "4", "16", "64"]),
        ([1e-4, 3e-4, 1e-3, 3e-3], True, ["1e−4", "3e−4", "1e−3", "3e−3"]),
        ([1e-8, *(10.0**k for k in range(-7, 1))], True, ["1e−8", "1e−6", "1e−4", "1e−2", "1"]),
        ([0.3 * k for k in range(1, 10)], True, ["0.5", "1", "2"]),
        ([0.03 * k for k in range(1, 400)], True, ["0.1", "1", "10"]),
        ([5.0], False, ["5"]),
        ([0.5], False, ["0.46", "0.48", "0.50", "0.52", "0.54"]),
    ],
)
def test_ticks_as_one_would_write_them(values: list[float], log: bool, labels: list[str]) -> None:
    assert list(scale(values, log, exact=True).ticks.values()) == labels


@pytest.mark.parametrize(
    ("value", "log", "expected"),
    [(1.0, True, True), (0.0, False, True), (0.0, True, False), (-1.0, True, False), (None, False, False)]
    + [(value, False, False) for value in (math.nan, math.inf, -math.inf, 1e300)],
)
def test_what_can_be_drawn(value: float | None, log: bool, expected: bool) -> None:
    assert drawable(value, log) is expected


def test_rows_without_a_place_are_left_out() -> None:
    assert rows_of(([1, 2, 0, 4], [1.0, None, 1.0, 4.0]), True, False) == [(1, 1.0), (4, 4.0)]
    with pytest.raises(ValueError):
        rows_of(([1, 2], [1.0]), False, False)


def test_a_curve_breaks_where_a_number_is_missing() -> None:
    xs, ys = curve_of(([1, 2, 3], [1.0, None, 3.0]), False, False)
    assert xs == [1, 2, 3] and ys[0] == 1 and math.isnan(ys[1]) and ys[2] == 3


@given(st.integers(2_000, 20_000), st.integers(0, 19_999), st.sampled_from([1e3, -1e3]))
def test_a_long_curve_is_thinned_and_keeps_every_spike(count: int, at: int, spike: float) -> None:
    ys = [math.sin(i) for i in range(count)]
    ys[at % count] = spike
    xs, thin = curve_of((range(count), ys), False, False)
    assert len(xs) == len(thin) <= 1000
    assert (at % count, spike) in set(zip(xs, thin, strict=True))
    assert xs == sorted(xs)
