"""Error rates against known answers and the laws of an edit distance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.evaluate.metrics import edit_distance, exact_match, phoneme_error_rate

texts = st.text("abc", max_size=8)


@given(a=texts, b=texts, c=texts)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_known_values() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert phoneme_error_rate([" K AE T", "D AO"], ["K AE T", "D AO G"]) == pytest.approx(1 / 6)
    assert phoneme_error_rate(["a b c d"], ["x"]) == 4.0
    assert exact_match([" K AE T ", "D"], ["K AE T", "D AO G"]) == 0.5
    assert exact_match([], []) == phoneme_error_rate([], []) == 0.0
