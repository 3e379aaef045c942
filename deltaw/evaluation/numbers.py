r"""The number that an answer ends in, as people and models write it: "so it is $1,234.50." is 1234.5.

Where it is looked for: in the last \boxed{…}, else behind the last ####, else in all of the text. The last number there
counts.

    1,234.5   −3   .5   1e-3   1.5 × 10^3   3/4   1 1/2   \frac{3}{4}   -\dfrac34   1{,}000   $5   50 %   50\%

A comma separates thousands, so "3,5" is a 3 and a 5. Units, currencies and the sign for percent are left out: 50 % is
50. A minus that stands behind a digit, a letter or a bracket is an operator or a hyphen, not a sign. Numbers are exact
(fractions), and what has more than 400 characters, or an exponent beyond ±400, is none: it can't be a row's truth, and
would take all memory.

    number_equal     |a − b| ≤ tolerance · max(1, |b|)      b: the truth's; or the two texts are the same

Rejected: a computer algebra system (it evaluates what a model wrote, for ever if that is 9**9**9); taking the first
number (an answer begins with what it was asked).
"""

import re
from fractions import Fraction

TOLERANCE = 1e-6
LONGEST, LARGEST_EXPONENT = 400, 400
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_PLAIN = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<minus>(?<![\w.)\]}}])-)?[$€£¥]?(?:"
    rf"\\[dtc]?frac(?:\{{(?P<up>-?\d+)\}}\{{(?P<down>\d+)\}}|(?P<one>\d)(?P<other>\d))"
    rf"|(?P<number>(?<![\d.]){_PLAIN})"
    rf"(?:[eE](?P<e>[+-]?\d+)|[ ]?(?:×|\*|\\times|\\cdot)[ ]?10(?:\^|\*\*)\{{?(?P<ten>[+-]?\d+)\}}?)?"
    rf"(?:[ ](?P<top>\d+)/(?P<bottom>\d+)|[ ]?/[ ]?(?P<by>{_PLAIN}))?)"
)
BOXED, GSM8K = "\\boxed{", "####"
CLEANED = str.maketrans({"−": "-", "–": "-", "⁄": "/", "\u00a0": " ", "\u202f": " "})
LATEX = (("{,}", ","), ("\\$", "$"), ("\\!", ""), ("\\,", ""), ("\\ ", " "))


def last_number(text: str) -> Fraction | None:
    """None where there is none."""
    for mark, plain in LATEX:
        text = text.replace(mark, plain)
    text = text.translate(CLEANED)
    if BOXED in text:
        text = _braced(text.rpartition(BOXED)[2])
    elif GSM8K in text:
        text = text.rpartition(GSM8K)[2]
    every = [*NUMBER.finditer(text)]
    return _value(every[-1]) if every and len(every[-1][0]) <= LONGEST else None


def equal(given: str, truth: str, tolerance: float = TOLERANCE) -> bool:
    """Whether both end in a number, and these are equal; or the two are the same text."""
    a, b = last_number(given), last_number(truth)
    return given.strip() == truth.strip() or (
        a is not None and b is not None and abs(a - b) <= Fraction(tolerance) * max(Fraction(1), abs(b))
    )


def _braced(text: str) -> str:
    """Up to the brace that closes what has begun before."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:at]
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["minus"] else 1
    if match["up"] or match["one"]:
        return _ratio(sign * Fraction(match["up"] or match["one"]), match["down"] or match["other"])
    value = _plain(match["number"])
    exponent = int(match["e"] or match["ten"] or 0)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    value *= Fraction(10) ** exponent
    if match["top"]:
        mixed = _ratio(Fraction(match["top"]), match["bottom"])
        return None if mixed is None else sign * (value + mixed)
    return _ratio(sign * value, match["by"]) if match["by"] else sign * value


def _plain(text: str) -> Fraction:
    text = text.replace(",", "")
    return Fraction("0" + text if text.startswith(".") else text)


def _ratio(above: Fraction, below: str) -> Fraction | None:
    divisor = _plain(below)
    return above / divisor if divisor else None
