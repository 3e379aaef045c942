"""builtin:general-train: text to remember by, none of which is what forgetting is measured on."""

import re

from deltaw.data.builtin import read_builtin
from deltaw.data.row import Row


def words(row: Row) -> list[str]:
    return re.findall(r"\w+", str(row.value["text"]).lower())


def test_it_has_no_eight_words_in_a_row_of_the_text_that_is_measured() -> None:
    measured, trained = (list(read_builtin(name)) for name in ("general", "general-train"))
    assert len(trained) > 2 * len(measured) and len({row.origin for row in trained}) == len(trained)
    runs = {tuple(some[n : n + 8]) for some in map(words, measured) for n in range(len(some) - 7)}
    assert not any(tuple(some[n : n + 8]) in runs for some in map(words, trained) for n in range(len(some) - 7))
    assert all(len(words(row)) > 30 for row in trained)
