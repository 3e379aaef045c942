"""chrF (Popović 2015), of all rows together: sacrebleu's counts of character n-grams, and its formula on their sums.

    P_n, R_n   matching n-grams per n-gram of the answers, and of the truths; n = 1 … 6, white space left out
    P, R       their means over those n of which both have any
    chrF       (1 + β²) P R / (β² P + R), β = 2, between 0 and 1 (sacrebleu shows 100 times that)

The figure is of the sums of counts, not a mean over rows, as sacrebleu's `corpus_chrf` is; a test holds the two
together.
"""

import numpy as np

from deltaw.errors import InputError
from deltaw.evaluation.intervals import Array

BETA_2 = 4.0
ORDER = 6


def check_installed() -> None:
    """Raises InputError where sacrebleu isn't there."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise InputError("chrf needs the package sacrebleu", fix="pip install sacrebleu") from None


def counts_of(given: str, truth: str) -> list[float]:
    """[18]: n-grams of the answer, of the truth, and common to both, for n = 1 … 6."""
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    counts: list[float] = []
    pairs = [extract_all_char_ngrams(text, ORDER, include_whitespace=False) for text in (given, truth)]
    for ours, theirs in zip(*pairs, strict=True):
        counts += CHRF._get_match_statistics(ours, theirs)
    return counts


def chrf(sums: Array) -> Array:
    """Of sums [..., 18]."""
    given, truth, common = (sums[..., at::3] for at in range(3))
    both = (given > 0) & (truth > 0)
    orders = np.maximum(both.sum(-1), 1)
    precision = (common / np.where(both, given, np.inf)).sum(-1) / orders
    recall = (common / np.where(both, truth, np.inf)).sum(-1) / orders
    below = BETA_2 * precision + recall
    return np.asarray((1 + BETA_2) * precision * recall / np.where(below > 0, below, 1.0))
