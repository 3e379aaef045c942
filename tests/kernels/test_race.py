"""The race of attention kernels: what is right, what is out, who wins.

Kernels and times are made up here; on a GPU those that are installed are raced as a run races them.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.errors import InputError
from deltaw.kernels import flash, race, varlen
from deltaw.kernels.attention import packed_attention_plain
from deltaw.kernels.flash import OWN, Attend, Heads
from deltaw.kernels.race import EMPTY, Course, decide, fastest_attention, installed, layout

HEADS = Heads(4, 2, 16, torch.bfloat16)
CPU = torch.device("cpu")


def plain(q: Tensor, k: Tensor, v: Tensor, starts_S: Tensor, longest: int, scale: float, /) -> Tensor:
    return packed_attention_plain(q, k, v, starts_S.tolist(), scale=scale)


@pytest.fixture(scope="module")
def course() -> Course:
    return Course(HEADS, layout(400, 150), CPU, plain)


@pytest.fixture(autouse=True)
def nothing_is_preferred() -> Iterator[None]:
    yield
    flash.prefer(HEADS, None)


def wrapped(change: Callable[..., Tensor]) -> Attend:
    """`plain`, of which the output is changed."""
    return lambda *call: change(plain(*call), *call)


def without_far_keys(q: Tensor, k: Tensor, v: Tensor, starts_S: Tensor, longest: int, scale: float, /) -> Tensor:
    return packed_attention_plain(q, k, v, starts_S.tolist(), scale=scale, window=longest - 10)


def across_documents(q: Tensor, k: Tensor, v: Tensor, starts_S: Tensor, longest: int, scale: float, /) -> Tensor:
    starts = starts_S.tolist()
    return packed_attention_plain(q, k, v, [*starts[:2], *starts[3:]], scale=scale)


def gradient_of_a_detached_key(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    return plain(q, k.detach() + 0 * k, *rest)


def wrongly_scaled(*call: Any) -> Tensor:
    return plain(*call[:5], call[5] * 1.02)


def test_what_is_as_good_as_the_own_one_is_right(course: Course) -> None:
    def in_float32(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return plain(q.float(), k.float(), v.float(), *rest).to(q.dtype)

    assert course.off(plain) <= 1
    assert course.off(in_float32) <= 1


@pytest.mark.parametrize(
    "attend",
    [
        without_far_keys,
        across_documents,
        gradient_of_a_detached_key,
        wrongly_scaled,
        wrapped(lambda out, *_: out.masked_fill(torch.arange(400)[:, None, None] == 399, torch.nan)),
        wrapped(lambda out, *_: out.roll(1, 1)),
        wrapped(lambda out, *_: torch.zeros_like(out) + 0 * out),
    ],
)
def test_what_is_wrong_is_out_however_fast_it_is(course: Course, attend: Attend) -> None:
    found, chosen = decide({"wrong": attend}, course, lambda work: 1.0)
    assert found.winner == OWN and chosen is None and set(found.out) == {"wrong"} and set(found.ms) == {OWN}
    assert "wrong" in found.lines()[-1]


class Times:
    """A clock that says what it was given, call by call."""

    def __init__(self, *ms: float) -> None:
        self.ms = iter(ms)

    def __call__(self, work: Callable[[], object]) -> float:
        work()
        return next(self.ms)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ((1.0, 0.6, 0.5), "b"),
        ((1.0, 0.5, 0.6), "a"),
        ((1.0, 1.2, 0.94), "b"),
        ((1.0, 0.97, 0.96), OWN),  # that may be noise
        ((1.0, 1.5, 2.0), OWN),
    ],
)
def test_the_fastest_wins_if_that_is_more_than_noise(course: Course, times: tuple[float, ...], winner: str) -> None:
    kernels: dict[str, Attend] = {"a": lambda *call: plain(*call), "b": lambda *call: plain(*call)}
    found, chosen = decide(kernels, course, Times(*times))
    assert found.winner == winner and chosen is kernels.get(winner)
    assert found.ms == dict(zip((OWN, "a", "b"), times, strict=True)) and not found.out
    (line,) = found.lines()
    assert winner in line and all(f"{ms:.2f}" in line for ms in times)


def test_what_fails_or_cannot_be_recorded_is_out(course: Course) -> None:
    def fails(*call: Any) -> Tensor:
        raise RuntimeError("no kernel for this head size\nand much more")

    def clock(work: Callable[[], object]) -> float:
        if work_number.append(0) or len(work_number) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1.0

    work_number: list[int] = []
    found, chosen = decide({"fails": fails, "waits": wrapped(lambda out, *_: out)}, course, clock)
    assert chosen is None and found.winner == OWN
    assert found.out["fails"] == "no kernel for this head size" and "capturing" in found.out["waits"]


def test_a_kernel_that_breaks_the_gpu_is_named(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*call: Any, **options: Any) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    def breaks(*call: Any) -> Tensor:
        monkeypatch.setattr(torch, "zeros", broken)
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(InputError, match="breaks"):
        decide({"breaks": breaks}, course, lambda work: 1.0)


def test_what_is_not_installed_is_silent_and_what_is_broken_is_not() -> None:
    def broken() -> Attend:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    kernels, out = installed({"absent": lambda: None, "broken": broken, "fine": lambda: plain})
    assert kernels == {"fine": plain} and set(out) == {"broken"}


@pytest.mark.parametrize("major", [8, 9, 10])
def test_packages_that_are_not_there_offer_nothing(major: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "")  # put back afterwards
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "")
    assert installed(flash.offers(CPU, tmp_path)) == ({}, {})
    found = fastest_attention.__wrapped__(HEADS, 100, CPU, tmp_path)
    assert found.winner == OWN and not found.lines() and flash.preferred(*queries_and_keys()) is None


def queries_and_keys() -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(3, heads, 16, dtype=torch.bfloat16) for heads in (4, 2))  # type: ignore[return-value]


def test_the_winner_is_preferred_for_calls_with_its_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fast(*call: Any) -> Tensor:
        return plain(*call)

    monkeypatch.setattr(flash, "offers", lambda device, kept: {"fast": lambda: fast})
    monkeypatch.setattr(race, "TOKENS", 200)
    monkeypatch.setattr(race, "Course", lambda *how: Course(*how, own=plain))
    monkeypatch.setattr(race, "_recorded_ms", Times(2.0, 1.0))
    found = fastest_attention.__wrapped__(HEADS, 100, CPU, tmp_path)
    q, k = queries_and_keys()
    assert found.winner == "fast" and flash.preferred(q, k) is fast
    assert flash.preferred(q.half(), k.half()) is None and flash.preferred(q, q) is None


@pytest.mark.parametrize(("options", "is_taken"), [({}, True), ({"scale": 0.3}, True), ({"window": 2}, False)])
def test_only_calls_that_were_raced_go_to_it(options: dict, is_taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def fast(q: Tensor, k: Tensor, v: Tensor, starts_S: Tensor, longest: int, scale: float, /) -> Tensor:
        calls.append(scale)
        return q

    q, k = queries_and_keys()
    flash.prefer(HEADS, fast)
    monkeypatch.setattr(varlen, "_way", lambda *arguments: "flash")
    monkeypatch.setattr(varlen, "_parameters", lambda: {"window_size": None, "scale": None})
    monkeypatch.setattr(varlen.varlen, "varlen_attn", lambda q, *rest, **more: q)
    starts_S = torch.tensor([0, 3], dtype=torch.int32)
    varlen.varlen_attention(q, k, k, starts_S, 3, **options)
    assert calls == ([options.get("scale", 0.25)] if is_taken else [])
    calls.clear()
    varlen.varlen_attention(q, k, k, starts_S, 3, seen=(starts_S, 3), **options)
    assert not calls


def test_what_packages_are_told() -> None:
    told: dict[str, Any] = {}

    def package(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        told.update(options)
        return q, None

    q, k = queries_and_keys()
    starts_S = torch.tensor([0, 3, 3], dtype=torch.int32)
    assert flash._of_package(package)(q, k, k, starts_S, 3, 0.5) is q
    assert told.pop("cu_seqlens_q") is starts_S and told.pop("cu_seqlens_k") is starts_S
    assert told == {
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
        "softmax_scale": 0.5,
        "causal": True,
        "deterministic": False,
    }


@settings(deadline=None)
@given(tokens=st.integers(1, 3000), share=st.floats(0, 1))
def test_the_layout_fills_the_batch_with_documents_of_all_lengths(tokens: int, share: float) -> None:
    longest = max(1, round(share * tokens))
    starts = layout(tokens, longest)
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == tokens and lengths[-EMPTY:] == [0] * EMPTY
    assert min(lengths[:-EMPTY]) >= 1 and max(lengths) == longest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on a GPU only")
@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 64), (32, 8, 128)])
def test_a_race_on_a_gpu(heads: tuple[int, int, int], tmp_path: Path) -> None:
    asked, device = Heads(*heads, torch.bfloat16), torch.device("cuda", torch.cuda.current_device())
    try:
        found = fastest_attention(asked, 2048, device, tmp_path)
        for line in found.lines():
            print(line)
        assert not found.out
        course = Course(asked, layout(8192, 2048), device)
        kernels, _ = installed(flash.offers(device, tmp_path))
        assert all(course.off(attend) <= 1 for attend in kernels.values())
        assert course.off(varlen.own_attention) <= 1
    finally:
        flash.prefer(asked, None)
