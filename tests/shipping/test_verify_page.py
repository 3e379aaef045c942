"""The page of a verification: what it shows, and that a browser shows it at any width, in light and dark."""

from pathlib import Path

import pytest

from deltaw.analysis.page import render
from deltaw.shipping.verify.alike import Parting
from deltaw.shipping.verify.page import page_of
from deltaw.shipping.verify.sides.side import Numbers
from deltaw.shipping.verify.verdict import Compared, Effect, Tolerance, Verification, reasons_of
from tests.analysis.test_page_in_browser import DARK, WIDTHS, browse

TOLERANCE = Tolerance(0.004, 2.4, 1.1, (0.0009, 0.001), "rounding errors of Q8_0 put into the model 3 times")
HOSTILE = "<script>document.title='ran'</script></pre>\u202e"


def a_verification(agree: bool) -> Verification:
    rows = [
        Compared("cmudict:1", "d e l t a ->", " D EH L T AH", " D EH L T AH", True),
        Compared("cmudict:2", "b a n a n a ->", " B AH", " B AE", True, "", Parting(1, 4, 5, 0.06), True, "a tie"),
    ]
    if not agree:
        rows += [
            Compared(f"row {n}", f"user: {HOSTILE}\n" + "long words " * 90, "x" * 400, HOSTILE, n % 2 == 0,
                     "at token 5, 'a' against 'b'", Parting(0, 1, 2, 8.1), False, f"row {n}, token 1")
            for n in range(4)
        ]  # fmt: skip
    kl, largest, effect = (0.001, 0.7, Effect(7.2, 0.0001, 0.001)) if agree else (0.3, 9.0, Effect(7.2, 0.04, 0.19))
    numbers = (Numbers(), Numbers("Q4_0", ("Q8_0", "float16"), "most of the GGUF is Q4_0"))
    reasons = reasons_of(rows, kl, largest, TOLERANCE, effect)
    sides = ("/a/very/long/path/" * 6 + "runs/demo", "model.gguf+adapter.gguf")
    notes = ["compared are the 1,000 likeliest tokens"]
    return Verification(*sides, numbers, rows, 40, kl, largest, TOLERANCE, effect, reasons, notes)


def test_the_text_begins_with_the_verdict() -> None:
    right, wrong = a_verification(True), a_verification(False)
    assert right.agree and right.text().startswith("AGREE") and len(right.text().splitlines()) <= 8
    assert not wrong.agree and wrong.text().startswith("DIFFERENT")
    assert wrong.count("prompt") == 2 and wrong.count("different") == 4 and wrong.count("near tie") == 1
    assert wrong.to_json()["reasons"] == wrong.reasons


def test_differing_answers_stand_side_by_side_under_the_sides_names() -> None:
    html = render(page_of(a_verification(False)))
    assert html.count("<dt>model.gguf+adapter.gguf</dt>") == 5  # four that differ and a near tie
    assert "<script>" not in html
    assert render(page_of(a_verification(True))).count('class="sample two"') == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(dark: bool, tmp_path: Path) -> None:
    pages = [page_of(a_verification(agree)) for agree in (True, False)]
    found, console = browse([render(page) for page in pages], tmp_path, *([DARK] if dark else []))
    assert not console
    for seen, page in zip(found, (page for page in pages for _ in WIDTHS), strict=True):
        assert seen["title"] == page.title
        assert seen["reach"] <= seen["width"], "the page scrolls sideways"
        assert seen["worst"][0] >= 4.5, seen["worst"]
        assert (max(seen["ground"]) < 64) if dark else (min(seen["ground"]) > 240)
