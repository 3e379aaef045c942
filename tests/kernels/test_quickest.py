"""Which way is taken: the quickest by the clock; one that fails isn't."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deltaw.kernels import quickest as module
from deltaw.kernels.quickest import decide, quickest


def fails(*_: object) -> float:
    raise RuntimeError("out of resources")


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 4))
def test_the_quickest_that_can_be_taken(times: list[float], broken: int) -> None:
    ways: list[Callable[[], object]] = [lambda ms=ms: ms for ms in times]
    if broken < len(ways):
        ways[broken] = fails
    number = decide(ways, lambda way: float(way()))  # type: ignore[arg-type]
    whole = [ms for at, ms in enumerate(times) if at != broken]
    assert number == 0 if not whole else times[number] == min(whole) and number != broken


def test_it_is_asked_once_for_like_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "replayed_ms", lambda way: {"slow": 2.0, "quick": 1.0}[way()])

    def ways() -> list[Callable[[], object]]:
        asked.append("")
        return [lambda: "slow", lambda: "quick"]

    assert [quickest("what", rows, (3, 4), ways) for rows in (1000, 600, 1023)] == [1, 1, 1] and len(asked) == 1
    assert quickest("what", 2000, (3, 4), ways) == quickest("what", 1000, (3, 5), ways) == 1 and len(asked) == 3


def test_what_is_recorded_takes_the_first_way_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert quickest("what", 5, (), fails) == 0  # type: ignore[arg-type]
