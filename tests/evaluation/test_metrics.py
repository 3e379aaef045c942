"""Task metrics against known answers, the laws that they keep, and plain twins of what is computed in bits."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.config import METRICS as HIGHER_IS_BETTER
from deltaw.evaluation.metrics import METRICS, Answer, Metric, common_subsequence, edit_distance

texts = st.text("abc", max_size=8)
prose = st.text("ab The a,. 漢字é\n$1", max_size=20)
RATES = [name for name, higher in HIGHER_IS_BETTER.items() if not higher]
SHARES = [name for name, higher in HIGHER_IS_BETTER.items() if higher]


def rows(given: list[str], wanted: list[str]) -> list[Answer]:
    return [Answer("", g, w, f"t:{n}") for n, (g, w) in enumerate(zip(given, wanted, strict=True), 1)]


def score(name: str, given: str, truth: str) -> float:
    return METRICS[name].score(Answer("", given, truth, "t:1"))


def test_every_metric_of_the_run_file_has_its_definition() -> None:
    assert {name: metric.higher_is_better for name, metric in METRICS.items()} == HIGHER_IS_BETTER
    assert all(metric.name == name and not metric.code for name, metric in METRICS.items())


@given(a=texts, b=texts, c=texts)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def plain_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def plain_subsequence(a: str, b: str) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if not i or not j:
            return 0
        return longest(i - 1, j - 1) + 1 if a[i - 1] == b[j - 1] else max(longest(i - 1, j), longest(i, j - 1))

    return longest(len(a), len(b))


@given(a=st.text("abcd", max_size=90), b=st.text("abcd", max_size=90))
def test_what_is_computed_in_bits_is_what_a_table_gives(a: str, b: str) -> None:
    assert edit_distance(a, b) == plain_distance(a, b)
    assert common_subsequence(a, b) == plain_subsequence(a, b)


@given(answer=prose, truth=prose)
def test_bounds_and_identity(answer: str, truth: str) -> None:
    for name in SHARES:
        assert 0 <= score(name, answer, truth) <= 1 == score(name, truth, truth)
    for name in RATES:
        assert score(name, answer, truth) >= 0 == score(name, truth, truth)
    assert score("contains", answer, truth) >= score("exact_match", answer, truth)
    for name in ("f1", "rouge_l"):
        assert score(name, answer, truth) == score(name, truth, answer)
    assert (score("character_error_rate", answer, truth) == 0) == (answer.strip() == truth.strip())


@given(pairs=st.lists(st.tuples(prose, prose), max_size=6))
def test_order_of_rows_does_not_matter_and_shares_are_means(pairs: list[tuple[str, str]]) -> None:
    answers = rows([a for a, _ in pairs], [b for _, b in pairs])
    for name, metric in METRICS.items():
        assert metric.mean(answers) == pytest.approx(metric.mean(answers[::-1]))
        if answers and name in SHARES:
            assert metric.mean(answers) == pytest.approx(sum(map(metric.score, answers)) / len(answers))


@pytest.mark.parametrize(
    ("name", "answer", "truth", "wanted"),
    [
        ("exact_match", " K AE T ", "K AE T", 1),
        ("exact_match", "k", "K", 0),
        ("contains", "It is 42, I think.", "42", 1),
        ("contains", "It is 4 2.", "42", 0),
        ("f1", "The cat sat.", "a cat, sat", 1),  # SQuAD: articles, punctuation and case don't count
        ("f1", "cat sat on the mat", "the cat", 2 / 5),  # 4 words and 1, one in common
        ("f1", "no", "yes", 0),
        ("f1", "...", "!", 1),  # SQuAD 2.0: two without a word
        ("f1", "...", "yes", 0),
        ("f1", "北京市", "北京", 4 / 5),  # CMRC: each character is a word
        ("rouge_l", "police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("rouge_l", "the gunman kill police", "police killed the gunman", 2 / 4),
        ("rouge_l", "Don't stop", "don t STOP!", 1),
        ("rouge_l", "今天天气好", "天气好", 6 / 8),
        ("character_error_rate", "sitting", "kitten", 3 / 6),
        ("character_error_rate", "", "abc", 1),
        ("word_error_rate", "a b c d", "x", 4),
        ("phoneme_error_rate", "D AO", "D AO G", 1 / 3),
    ],
)
def test_known_values(name: str, answer: str, truth: str, wanted: float) -> None:
    assert score(name, answer, truth) == pytest.approx(wanted)


def test_an_error_rate_counts_errors_over_the_whole_truth() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert METRICS["phoneme_error_rate"].mean(rows([" K AE T", "D AO"], ["K AE T", "D AO G"])) == pytest.approx(1 / 6)
    assert all(metric.mean([]) == 0 for metric in METRICS.values())


def test_a_metric_of_points_and_weights_divides_once() -> None:
    weighed = Metric("m", True, lambda answer: (float(answer.given), float(answer.truth)))
    assert weighed.mean(rows(["1", "2"], ["4", "6"])) == 0.3
