"""The section on GPUs: shares of the same day's product, the best of each side, and what couldn't be measured."""

from benchmarks.gpu_page import section

DAYS = {"2026-01-01": "800.0 TFLOP/s", "2026-01-02": "400.0 TFLOP/s"}


def row(
    date: str, arm: str, model: str, tokens: str = "", rate: str = "", share: str = "", note: str = "", gib: str = ""
) -> dict[str, str]:
    same = {"gpu": "Card", "torch": "2", "date": date, "arm": arm, "model": model, "tokens": tokens}
    return {**same, "tokens_per_s": rate, "share_of_gemm": share, "note": note, "allocated_gib": gib}


PRODUCTS = [row(day, "gemm", "8192^3", "8192", note=note) for day, note in DAYS.items()]


def test_a_share_is_of_the_product_of_its_own_day() -> None:
    first, second = DAYS
    text = section(
        [
            *PRODUCTS,
            row(first, "deltaw", "1b", "8192", "100.0", "0.4"),
            row(first, "unsloth", "1b", "8192", "50.0", "0.2", "LOSS DIFFERS from deltaw's"),
            row(first, "peft", "1b", "2048", note="out of memory"),
            row(second, "train", "1b", "8192", "75.0"),
        ]
    )
    assert "| 1B, 8,192 a step | 50 (20.0%) | 100 (40.0%) | 75 (60.0%) |" in text
    assert "| 1B, 8,192 a step, of the product's rate | ≥ 65% | 40% | NO | 38% |" in text
    assert "| 1B, 8,192 a step, against Unsloth | ≥ 1.50 x | 2.00 x | yes |  |" in text
    assert "| 8B, 2,048 a step, of the product's rate | ≥ 65% |  | not measured |  |" in text
    assert "- PEFT, 1B, 2048: out of memory" in text and "- Unsloth, 1B, 8192: LOSS DIFFERS" in text


def test_the_newest_day_counts_wherever_its_rows_stand() -> None:
    first, second = DAYS
    text = section(
        [
            row(second, "deltaw", "8b", "8192", "90.0", "0.75", gib="43.4"),
            row(second, "profile", "8b", "8192", note="new"),
            *PRODUCTS,
            row(first, "deltaw", "8b", "8192", "100.0", "0.4", gib="50.0"),
            row(first, "profile", "8b", "8192", note="old"),
            row(first, "deltaw", "8b", "2048", "70.0", "0.3"),
        ]
    )
    assert "| 8B, 8,192 a step, of the product's rate | ≥ 70% | 75% | yes |  |" in text
    assert "| 8B, 8,192 a step, memory | ≤ 43.5 GiB | 43.4 GiB | yes |  |" in text
    assert "| 8B, 2,048 a step | 70 (" in text, "another size's newest day is its own"
    assert ": new" in text and ": old" not in text


def test_train_is_held_to_its_own_steps_and_8b_to_what_others_publish() -> None:
    first, _ = DAYS
    text = section(
        [
            *PRODUCTS,
            row(first, "deltaw", "135m", "8192", "300.0", "0.4"),
            row(first, "loop", "135m", "8192", "200.0"),
            row(first, "train", "135m", "8192", "170.0"),
            row(first, "deltaw", "8b-4k", "8192", "18709.5", "0.5"),
            row("2025-12-31", "train", "1b", "8192", "75.0"),  # of a day without a product: no share
        ]
    )
    assert "| 135M, 8,192 a step, `deltaw train` against its steps alone | ≥ 0.90 x | 0.85 x | NO | 6% |" in text
    assert (
        "| 8B, documents of 4,096 tokens, against NeMo AutoModel's 12,473 tokens/s | ≥ 1.40 x | 1.50 x | yes |  |"
        in text
    )
    assert "| 8B, documents of 4,096, 8,192 a step | 18,710 (50.0%) |" in text
    assert "| 1B, 8,192 a step |  |  | 75 |" in text


def test_nothing_measured_is_no_section() -> None:
    assert not section([])
