"""docs/scale.md says what the script works out."""

import pytest

from benchmarks import scale


def test_the_page_is_what_the_script_writes() -> None:
    assert scale.PAGE.read_text(encoding="utf-8").partition(scale.MARK)[2].strip() == scale.lines()


def test_an_adapter_is_as_large_as_its_factors() -> None:
    assert scale.SHAPES[1].adapter == pytest.approx(168e6, rel=0.01)
    assert scale.SHAPES[1].blocks + scale.SHAPES[1].embeddings == pytest.approx(8.03e9, rel=0.01)
    assert scale.SHAPES[2].blocks + scale.SHAPES[2].embeddings == pytest.approx(70.6e9, rel=0.01)


def test_one_gpu_sends_nothing_and_what_does_not_fit_says_so() -> None:
    one = scale.row(scale.SHAPES[1], "bf16", 1, False, "InfiniBand")
    assert one[7:9] == ["0.0", "0"] and one[-1] == "computing"
    assert scale.row(scale.SHAPES[2], "bf16", 64, False, "InfiniBand")[-1] == "memory"
