"""What is measured, what is foretold from it, and what is there."""

import platform
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.config import parse_config
from deltaw.data.pack import pack
from deltaw.show.progress import Display
from deltaw.training import memory
from deltaw.training.fit import Point, fit_memory, measure, one_pass
from deltaw.training.learner import Learner
from deltaw.training.memory import Heap, OutOfMemory, bounded, free_memory, held_memory, window, working_on
from deltaw.training.opening import Opened, open_run
from tests.tiny import run_file, tiny_base

CPU = torch.device("cpu")
MIB = 1 << 20


def opened(folder: Path, **changes: Any) -> tuple[Opened, Learner]:
    config, quiet = parse_config(run_file(folder, **changes)), Display(quiet=True)
    run = open_run(config, quiet)
    return run, run.learner(quiet)


def test_the_fit_finds_what_the_points_were_made_of() -> None:
    points = [Point(t, s, 1000 + 7 * t + 3 * s, 0.0) for t, s in ((10, 5), (20, 10), (40, 20), (40, 10))]
    fit = fit_memory(points)
    assert (fit.fixed, fit.token, fit.supervised) == pytest.approx((1000, 7, 3))
    assert fit.bytes_at(100, 50) == 1000 + 700 + 150


def test_a_fit_never_says_that_more_tokens_take_less() -> None:
    noisy = [Point(10, 5, 1100, 0.0), Point(20, 10, 1190, 0.0), Point(40, 20, 1400, 0.0), Point(40, 10, 1500, 0.0)]
    fit = fit_memory(noisy)
    assert fit.supervised == 0 and fit.token > 0
    assert fit_memory(noisy[:2]).token == pytest.approx(9)
    assert fit_memory([replace(point, peak=2000 - point.tokens) for point in noisy]).token == 0


def test_a_window_sees_its_own_peak_and_not_the_one_before() -> None:
    with window(CPU) as first:
        torch.ones(300 * MIB // 4)
    with window(CPU) as second:
        torch.ones(50 * MIB // 4)
    assert 200 * MIB < first.peak - second.peak < 300 * MIB
    assert first.seconds > 0


def test_free_memory_heeds_every_limit(tmp_path: Path) -> None:
    machine = free_memory(CPU)
    assert 0 < machine < memory.UNLIMITED
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory._status("VmSize") + 300 * MIB, before[1]))
    try:
        assert 100 * MIB < free_memory(CPU) <= 300 * MIB
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    for number, (limit, usage, cached) in enumerate(memory.GROUP_FILES):
        group = tmp_path / str(number)
        group.mkdir()
        for name, text in ((limit, "1000\n"), (usage, "700\n"), ("memory.stat", f"anon 1\n{cached} 50\n")):
            (group / name).write_text(text)
        assert memory._left_in(group) == 1000 - (700 - 50)
        (group / limit).write_text("max\n")
        assert memory._left_in(group) == memory.UNLIMITED
    assert memory._left_in(tmp_path) == memory.UNLIMITED


def test_inside_bounds_too_much_memory_is_an_error_and_no_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 200 * MIB)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded(CPU):
        torch.ones(100 * MIB // 4)
        with pytest.raises(RuntimeError) as caught:
            torch.ones(400 * MIB // 4)
    assert memory.is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.ones(400 * MIB // 4)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OutOfMemory("answering rows"), True),
        (KeyboardInterrupt(), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_who_starts_a_piece_of_work_names_it_and_only_want_of_memory_is_named() -> None:
    with pytest.raises(OutOfMemory) as caught, working_on("outside"), working_on("inside"):
        raise MemoryError
    assert caught.value.work == "inside" and caught.value.__suppress_context__
    with pytest.raises(ValueError, match="else"), working_on("outside"):
        raise ValueError("something else")


@pytest.mark.parametrize("accumulating", [False, True])
def test_a_pass_leaves_nothing_behind(folder: Path, accumulating: bool) -> None:
    run, learner = opened(folder, adapter={"rank": 4, "alpha": 8, "dropout": 0.5})
    before = {name: value.clone() for name, value in run.model.base.model.state_dict().items()}
    drawn = torch.get_rng_state()
    one_pass(run.model.forward, learner, pack(run.dataset.train[:3]), accumulating=accumulating)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in run.model.base.model.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.attached.parameters)
    assert not learner.optimizer.state and not any(module.training for module in run.model.base.model.modules())


def test_batches_are_measured_from_small_to_large_and_with_fewer_labels(folder: Path) -> None:
    run, learner = opened(folder)
    rows = run.dataset.train[:10]
    whole = sum(len(row.tokens) for row in rows)
    points = list(measure(run.model.forward, learner, rows, [whole, whole // 4, whole // 2], accumulating=False))
    assert [point.tokens for point in points] == [whole // 4, whole // 2, whole, whole]
    assert points[2].supervised == pack(rows).supervised > points[3].supervised > 0
    assert all(point.peak > 0 and point.seconds > 0 for point in points)


def test_the_heap_is_tidied_when_it_has_grown_by_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    held, released = [100], list[int]()
    monkeypatch.setattr(memory, "held_memory", lambda device: held[0])
    monkeypatch.setattr(memory, "release", lambda device: released.append(held[0]))
    heap = Heap(CPU)
    for held[0] in (100, 105, 109, 112, 90, 98, 100):
        heap.tidy()
    assert released == [112, 100]


def test_release_gives_back_what_was_freed() -> None:
    pieces = [torch.ones(4096) for _ in range(10_000)]  # 160 MB in the C library's heap
    keep, held = pieces[-1], held_memory(CPU)
    del pieces
    memory.release(CPU)
    assert held_memory(CPU) < held - 100 * MIB and keep.sum() == 4096


def test_bound_caches_leaves_a_users_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    memory.bound_caches()
    assert memory.os.environ[name] == "7"
    monkeypatch.delenv(name)
    memory.bound_caches()
    assert memory.os.environ[name] == str(memory.KERNELS)


def test_three_small_batches_foretell_a_large_one(folder: Path) -> None:
    tiny_base(folder / "base", hidden_size=128, intermediate_size=384)
    run, learner = opened(folder)
    sizes = [1000, 2000, 4000, 8000]
    *small, large, _ = measure(run.model.forward, learner, list(run.dataset.train) * 20, sizes, accumulating=False)
    grown = large.peak - small[0].peak
    foretold = fit_memory(small).bytes_at(large.tokens, large.supervised)
    assert grown > 20 * MIB and abs(foretold - large.peak) < 0.2 * grown


HOLES = """
import ctypes, torch
from deltaw.training import memory

def left():
    before, small, large = memory.held_memory(CPU), [], []
    for _ in range(20):
        large.append(torch.ones(10 * MIB // 4))
        small.append(torch.ones(MIB // 4))
    large.clear()
    return memory.held_memory(CPU) - before

CPU, MIB = torch.device("cpu"), 1 << 20
ctypes.CDLL(None).mallopt(memory.M_MMAP_THRESHOLD, 31 * MIB)  # what glibc comes to by itself
holes = left()
memory.few_holes(CPU)
print(holes // MIB, left() // MIB)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_large_tensors_leave_no_holes_where_memory_is_short() -> None:
    holes, none = map(int, subprocess.check_output([sys.executable, "-c", HOLES], text=True).split())
    assert holes > 150 and none < 40
