"""Several processes train what one trains; one that fails, dies, hangs or is stopped ends all of them, and is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.adapter.file import Adapter
from deltaw.data.loader import Plan, dealt
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.training.checkpoint import read_checkpoint
from deltaw.training.run import train
from deltaw.training.stop import StopRequest
from tests.faults.common import command
from tests.tiny import run_file, tiny_base, words
from tests.training.processes import Rank, checkpoints, free_port, in_step, together


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and the run `one` that a single process has taken."""
    folder = tmp_path_factory.mktemp("together")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    train(file_of(folder, "one"), display=QUIET)
    return folder


def file_of(place: Path, name: str, **changes: Any) -> Path:
    fields = run_file(place, output=str(place / name))
    fields["evaluate"] = {"samples": 0, "general": None, "report": False}
    for section, values in changes.items():
        fields[section] = {**fields[section], **values}
    file = place / f"{name}.yaml"
    file.write_text(json.dumps(fields))
    return file


def trained(place: Path, name: str, size: int, file: Path | None = None) -> list[Rank]:
    work = command("train", file or file_of(place, name), "--quiet")
    return together(size, lambda rank: work())


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in Run(run).read_metrics()]


def same_run(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), rel=1e-6)
    mine, its = Adapter.load(run), Adapter.load(other)
    assert mine.factors.keys() == its.factors.keys()
    for path, update in mine.factors.items():
        for name, tensor in update.tensors().items():
            torch.testing.assert_close(tensor, its.factors[path].tensors()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_what_one_trains(place: Path, size: int) -> None:
    def work(rank: int) -> None:
        adapter = train(file_of(place, f"by-{size}"), display=QUIET)
        (place / f"by-{size}.{rank}.txt").write_text(adapter.fingerprint)

    ended = together(size, work)
    assert [rank.code for rank in ended] == [0] * size, ended
    same_run(place / f"by-{size}", place / "one")
    prints = {(place / f"by-{size}.{rank}.txt").read_text() for rank in range(size)}
    assert prints == {Adapter.load(place / f"by-{size}").fingerprint}
    result = json.loads((place / f"by-{size}/result.json").read_text())
    assert (
        result["processes"] == size
        and result["tokens"] == json.loads((place / "one/result.json").read_text())["tokens"]
    )
    assert not any(rank.output for rank in ended), "only rank 0 prints"


def test_a_run_goes_on_at_any_number_of_processes(place: Path) -> None:
    """1, then 2 (of which one alone is told to stop), then 1 again: the run of one process."""
    file, run = file_of(place, "moved"), place / "moved"

    def until(step: int, who: int) -> Callable[[int], object]:
        def work(rank: int) -> None:
            arguments = ("train", run if (run / "config.yaml").exists() else file, "--quiet")
            with in_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == who else None):
                command(*arguments)()

        return work

    stopped = [together(1, until(2, 0)), together(2, until(4, 1))]
    assert [[rank.code for rank in ended] for ended in stopped] == [[143], [143, 143]], stopped
    assert checkpoints(run)[-1] == "step-000004"
    assert sum("stopped after step 4" in rank.output for rank in stopped[1]) == 1
    assert together(1, lambda rank: command("train", run, "--quiet")())[0].code == 0
    same_run(run, place / "one")


def test_a_rank_that_is_killed_is_named_and_no_step_is_lost(place: Path) -> None:
    def work(rank: int) -> None:
        with in_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None):
            command("train", file_of(place, "killed"), "--quiet")()

    first, second = together(2, work)
    assert (first.code, second.code) == (1, 137)
    assert "rank 1" in first.output and len(first.output.strip().splitlines()) <= 5, first.output
    assert checkpoints(place / "killed")[-1] == "step-000003"
    assert together(1, lambda rank: command("train", place / "killed", "--quiet")())[0].code == 0
    same_run(place / "killed", place / "one")


def test_rank_0_killed_ends_the_others(place: Path) -> None:
    def work(rank: int) -> None:
        with in_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else None):
            command("train", file_of(place, "killed-0"), "--quiet")()

    first, second = together(2, work)
    assert (first.code, second.code) == (137, 1) and "rank 0" in second.output, second.output
    assert checkpoints(place / "killed-0")[-1] == "step-000003"


@pytest.mark.parametrize("how", [pytest.param("asleep", marks=pytest.mark.slow), "stopped"])
def test_a_rank_that_hangs_is_named_in_time(place: Path, how: str) -> None:
    def hang() -> None:
        time.sleep(60) if how == "asleep" else os.kill(os.getpid(), signal.SIGSTOP)

    def work(rank: int) -> None:
        with in_step(3, lambda: hang() if rank == 1 else None):
            command("train", file_of(place, f"hung-{how}"), "--quiet")()

    began = time.monotonic()
    first, second = together(2, work, timeout=1.0, hung=1)
    assert first.code == 1 and "rank 1" in first.output and second.code != 0, (first, second)
    assert checkpoints(place / f"hung-{how}")[-1] == "step-000002" and time.monotonic() - began < 20


def test_a_loss_that_is_no_number_on_one_rank_is_seen_by_all_and_named(place: Path) -> None:
    class Poisoned:
        def __init__(self, forward: Any) -> None:
            self._forward = forward

        def __getattr__(self, name: str) -> Any:
            return getattr(self._forward, name)

        def loss(self, *batch: Any) -> Any:
            loss, count = self._forward.loss(*batch)
            return loss * float("nan"), count

    def work(rank: int) -> None:
        from deltaw.training import run as loop

        original: Any = loop.step

        def stepping(forward: Any, learners: Any, *more: Any) -> Any:
            poisoned = rank == 1 and learners[0].state.step == 3
            return original(Poisoned(forward) if poisoned else forward, learners, *more)

        loop.step = stepping
        command("train", file_of(place, "nan"), "--quiet")()

    ended = together(2, work)
    assert [rank.code for rank in ended] == [1, 1]
    said = ended[0].output
    assert "step 4" in said and "rank 1" in said and "train.jsonl:" in said and not ended[1].output, ended
    assert checkpoints(place / "nan")[-1] == "step-000003"
    kept, healthy = (read_checkpoint(place / name / "checkpoints/step-000003") for name in ("nan", "nan"))
    assert (
        kept.state.step == 3 and all(t.isfinite().all() for t in kept.factors.values()) and healthy.state.skipped == 0
    )


def test_bad_input_is_said_once_with_exit_2(place: Path) -> None:
    broken = [
        trained(place, "one", 2),  # holds a run already
        trained(place, "many", 3, file_of(place, "many", train={"tokens_per_step": 8})),
        trained(place, "no-base", 2, file_of(place, "no-base", data={"train": "nowhere.jsonl"})),
    ]
    for ended in broken:
        assert {rank.code for rank in ended} == {2}, ended
        said = [rank.output for rank in ended if rank.output]
        assert len(said) == 1 and len(said[0].strip().splitlines()) <= 5, ended
    assert "tokens_per_step" in "".join(rank.output for rank in broken[1])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 3))
def test_the_documents_of_a_step_are_the_same_for_every_number_of_ranks(
    lengths: list[int], ranks: int, seed: int
) -> None:
    sizes = {"tokens_per_step": 100, "tokens_per_batch": 50, "seed": seed, "epoch": 0}
    alone, several = Plan(lengths, **sizes), Plan(lengths, **sizes, ranks=ranks)
    flat = [[[n for batch in step for n in batch] for step in one] for one in (alone, several)]
    assert flat[0] == flat[1]
    for before, step in zip(alone, several, strict=True):
        assert all(step) and len(step) >= min(ranks, sum(map(len, step)))
        assert step == before or len(step) <= ranks
        shares = dealt([sum(lengths[n] for n in batch) for batch in step], ranks)
        assert sorted(np.concatenate(shares).astype(int).tolist()) == list(range(len(step)))
        assert sum(not share for share in shares) == max(0, ranks - len(step)), "none idles while another has two"


def test_a_plan_is_made_by_the_first_of_them(place: Path) -> None:
    first, second = together(2, lambda rank: command("plan", file_of(place, "planned"), "--json")())
    assert (first.code, second.code) == (0, 0)
    assert '"peak_memory_bytes"' in first.output and not second.output.strip()
    assert not (place / "planned").exists()


def test_a_signal_that_torchrun_hands_on_is_the_same_wish() -> None:
    with StopRequest(relayed=True) as stop, pytest.raises(BaseException) as raised, stop.held():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert not raised.value.at_once and raised.value.exit_code == 130  # type: ignore[attr-defined]


def torchrun(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run([*line, *map(str, arguments)], capture_output=True, text=True, env=known, timeout=300)


@pytest.mark.slow
def test_torchrun_itself_and_its_restarts(place: Path) -> None:
    """A rank that kills itself in step 4 of the first start: the second one goes on from the newest checkpoint."""
    dying = place / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        "from deltaw.cli import main\n"
        "from tests.training.processes import in_step\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1'\n"
        "def act():\n    if first: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with in_step(4, act): main()\n"
    )
    done = torchrun("--max-restarts", "1", dying, "train", file_of(place, "elastic"), "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(place / "elastic", place / "one")
    again = torchrun("--max-restarts", "1", "-m", "deltaw", "train", file_of(place, "elastic"), "--quiet")
    assert again.returncode != 0 and "already holds a run" in again.stderr, "another job's run isn't resumed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment_it_resumes_to_the_same_run(place: Path, seed: int) -> None:
    chance, run = np.random.RandomState(seed), place / f"random-{seed}"
    file, victim, moment = file_of(place, run.name), int(chance.randint(2)), float(chance.uniform(0.0, 1.5))

    def work(rank: int) -> None:
        if rank == victim:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, max(moment, 1e-3))
        command("train", file, "--quiet")()

    ended = together(2, work)
    assert ended[victim].code in (137, 0) and all(rank.code in (0, 1, 137) for rank in ended), ended
    if not (run / "result.json").exists():
        start = run if (run / "config.yaml").exists() else file
        assert [rank.code for rank in together(2, lambda rank: command("train", start, "--quiet")())] == [0, 0]
    same_run(run, place / "one")
    shutil.rmtree(run)
