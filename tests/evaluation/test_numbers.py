"""The number that a text ends in."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.evaluation.numbers import equal, last_number

NUMBERS = {
    "so it is $1,234.50.": Fraction("1234.5"), "−3": -3, "it is -.5": Fraction(-1, 2), "1e-3": Fraction(1, 1000),
    "1.5 × 10^3": 1500, r"1.5\times 10^{-2}": Fraction("0.015"), "3/4": Fraction(3, 4), "1 1/2": Fraction(3, 2),
    r"\frac{3}{4}": Fraction(3, 4), r"-\dfrac34": Fraction(-3, 4), r"1{,}000": 1000, r"\$5": 5, "50 %": 50, r"50\%": 50,
    "x=-5": -5, "10-5": 5, "7 - 4": 4, r"\boxed{\frac{1}{2}} and 7": Fraction(1, 2), "3 #### 72\n": 72, "-$5": -5,
    "72.": 72, "1,23": 23, "v1.5": Fraction(3, 2), "1" * 5000: None, "1e999999999": None, "9 × 10^99999": None,
    "3/0": None, "": None, "none": None, "²": None, "$": None, "1/3 of it": Fraction(1, 3), "EUR 7,000": 7000,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20])
def test_it_is_found(text: str) -> None:
    assert last_number(text) == NUMBERS[text]


@given(st.fractions(max_denominator=10**6), st.text(alphabet="abc .:=€$", max_size=10))
def test_a_number_is_found_however_it_is_written(number: Fraction, before: str) -> None:
    whole = int(number)
    texts = {f"{number}": number, f"{whole:,}": whole, f"{whole}.0": whole, rf"\boxed{{{number}}} 7": number}
    for text, value in texts.items():
        assert last_number(f"{before} {text}") == value and equal(f"{before} {text}.", str(value))


@given(st.text() | st.text(alphabet="0123456789,./-$\\{}e ^×frac#boxed"))
def test_no_text_makes_it_crash(text: str) -> None:
    number = last_number(text)
    assert number is None or isinstance(number, Fraction)


def test_tolerance_is_relative_above_one_and_absolute_below() -> None:
    assert equal("1000.0009", "1000") and not equal("1000.01", "1000") and equal("1000.01", "1000", 1e-4)
    assert equal("0.0000009", "0") and not equal("0.00001", "0") and not equal("none", "0") and equal("none", "none")
