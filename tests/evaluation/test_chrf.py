"""chrF against sacrebleu's own figure, of whole sets of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.evaluation.chrf import chrf, counts_of

sacrebleu = pytest.importorskip("sacrebleu")
texts = st.text("ab c漢é", max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_it_is_sacrebleus_figure(rows: list[tuple[str, str]]) -> None:
    sums = np.array([counts_of(given, truth) for given, truth in rows], float).sum(0)
    theirs = sacrebleu.corpus_chrf([given for given, _ in rows], [[truth for _, truth in rows]]).score
    assert 100 * float(chrf(sums)) == pytest.approx(theirs, abs=1e-9)
