"""Task metrics: text given against text wanted, both as decoded from tokens.

Error rates are of edit distance (Levenshtein 1966): insertions + deletions + substitutions that turn the answer into
the truth, summed over all rows and divided by the truth's length, so they can exceed 1.
"""

from collections.abc import Callable, Sequence


def exact_match(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers equal to the truth, apart from white space at the ends."""
    return sum(g.strip() == w.strip() for g, w in zip(given, wanted, strict=True)) / max(1, len(wanted))


def phoneme_error_rate(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Edit distance over phonemes (separated by white space) / phonemes in the truth."""
    pairs = [(g.split(), w.split()) for g, w in zip(given, wanted, strict=True)]
    return sum(edit_distance(g, w) for g, w in pairs) / max(1, sum(len(w) for _, w in pairs))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance, O(len(a) · len(b)) with one row kept."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "phoneme_error_rate": phoneme_error_rate,
}
