"""The section on GPUs: shares of the same day's product, the best of each side, and what couldn't be measured."""

from benchmarks.gpu_page import section

DAYS = {"2026-01-01": "800.0 TFLOP/s", "2026-01-02": "400.0 TFLOP/s"}


def row(
    date: str, arm: str, model: str, tokens: str = "", rate: str = "", share: str = "", note: str = ""
) -> dict[str, str]:
    same = {"gpu": "Card", "torch": "2", "date": date, "arm": arm, "model": model, "tokens": tokens}
    return {**same, "tokens_per_s": rate, "share_of_gemm": share, "note": note}


def test_a_share_is_of_the_product_of_its_own_day() -> None:
    products = [row(day, "gemm", "8192^3", "8192", note=note) for day, note in DAYS.items()]
    first, second = DAYS
    text = section(
        [
            *products,
            row(first, "deltaw", "1b", "8192", "100.0", "0.4"),
            row(first, "peft", "1b", "8192", "50.0", "0.2", "LOSS DIFFERS from deltaw's"),
            row(first, "peft", "1b", "2048", note="out of memory"),
            row(second, "train", "1b", "8192", "75.0"),
        ]
    )
    assert "| 1B, 8,192 a step | 50 (20.0%) | 100 (40.0%) | 75 (60.0%) |" in text
    assert "| 1B, 8,192 a step, of the product's rate | ≥ 65% | 40% | NO | 38% |" in text
    assert "| 1B, 8,192 a step, against the fastest peer | ≥ 1.50 x | 2.00 x | yes |  |" in text
    assert "| 8B, 2,048 a step, of the product's rate | ≥ 65% |  | not measured |  |" in text
    assert "- PEFT, 1B, 2048: out of memory" in text and "- PEFT, 1B, 8192: LOSS DIFFERS" in text


def test_nothing_measured_is_no_section() -> None:
    assert not section([])
