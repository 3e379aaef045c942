"""The disk is full, fails, forgets, flips bits, or holds what a killed process left (4-9, 12, 13, 22)."""

import dataclasses
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from deltaw.errors import RunError
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.checkpoint import is_whole, latest_checkpoint, list_checkpoints, save_checkpoint
from deltaw.training.learner import Learner
from deltaw.training.log import EventLog
from deltaw.training.measuring import Attempts
from deltaw.training.opening import Opened, begin, open_run
from deltaw.training.run import Steps
from deltaw.training.stop import StopRequest
from deltaw.training.underway import Underway
from tests.faults import shim
from tests.faults.common import (
    QUIET,
    child,
    clear_error,
    command,
    command_for,
    config,
    copy,
    digest,
    expect_exit,
    finished_run,
    metrics,
    place,
)
from tests.faults.disk import can_mount, small_disk, with_mounts
from tests.faults.fault import expect, fault

FILES = ("factors.safetensors", "moments.safetensors", "state.json", "manifest.sha256")  # as they are written

SIZE = r"[\d.,]+ (bytes|[KMG]iB)"
ROOM = rf"needs {SIZE}, (but|and) (only )?{SIZE} are free"


@cache
def trained() -> tuple[Opened, Learner]:
    """A run with something to save: two steps, moments that aren't zero."""
    settings = config(place() / "trained", train={"steps": 2})
    run = Run(Path(settings.output))
    opened = open_run(settings, QUIET)
    learner = opened.learner(QUIET)
    with run.claimed(new=True):
        begin(opened, run, QUIET)
        attempts = Attempts(opened.device, QUIET.say, lambda error: None)
        Steps(Underway(opened, learner, run, StopRequest(), QUIET, attempts, EventLog(run, QUIET.say))).take()
    return opened, learner


def save(folder: Path, step: int) -> Path:
    """The checkpoint that a run would write after `step` steps; the newest two stay."""
    saved = trained()[1].saved()
    state = dataclasses.replace(saved.state, step=step, best_step=0)
    return save_checkpoint(folder, saved._replace(state=state), keep=2)


@cache
def committed() -> Path:
    """A folder with checkpoints 1 and 2. Tries must not change it."""
    folder = place() / "committed" / "checkpoints"
    save(folder, 1)
    save(folder, 2)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newest(folder: Path, display: Display = QUIET) -> int:
    """The step that a resumed run would go on from; 0 for none."""
    saved = latest_checkpoint(folder, display)
    return saved.state.step if saved else 0


@cache
def offsets() -> list[int]:
    """Byte numbers of a save at which the disk fills up: around each file's ends, and 7 times through all of it."""
    sizes = [(committed() / "step-000002" / name).stat().st_size for name in FILES]
    ends = [0, *itertools.accumulate(sizes)]
    near = {end + d for end in ends for d in range(-12, 13)}
    spread = {round(ends[-1] * i / 283) for i in range(283)}
    return sorted(n for n in near | spread if 0 <= n < ends[-1])


@fault(
    4,
    "the disk is full from byte n of a checkpoint on, n at each file's ends and all through it: the error has "
    "the bytes "
    "needed and free, nothing is left behind, the old checkpoints are the same to the bit",
    tries=380,
    sample=20,
    at_once=95,
    preload=True,
)
def full_at_byte(n: int, scratch: Path) -> None:
    folder = scratch / "checkpoints"
    if not folder.exists():
        copy(committed(), folder)
    at = offsets()[n * 7 % len(offsets())]
    before = contents(scratch)
    with shim.full_after(scratch, at):
        said = clear_error(lambda: save(folder, 3), "step-000003")
    expect(shim.written() == at, f"{shim.written()} bytes were written, not {at}")
    expect(
        re.search(ROOM, said),
        said,
    )
    expect(contents(scratch) == before and newest(folder) == 2, os.listdir(folder))


if can_mount():

    @fault(
        4,
        "a real disk of 1 MiB with n free pages of 4 KiB: refused with what is needed and free, or saved whole",
        tries=24,
        sample=3,
        at_once=12,
    )
    def full_small_disk(n: int, scratch: Path) -> None:
        committed()

        def work() -> None:
            disk = small_disk(scratch / "disk", "size=1m")
            folder = copy(committed(), disk / "checkpoints")
            free = os.statvfs(disk).f_bfree * 4096 - n * 4096
            with (disk / "filler").open("wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, free)
            try:
                save(folder, 3)
            except RunError as error:
                expect(
                    re.search(ROOM, str(error)),
                    error,
                )
                expect(len(os.listdir(folder)) == 2 and newest(folder) == 2, os.listdir(folder))
                expect(n < 18, f"{n} pages didn't suffice: {error}")
            else:
                expect(newest(folder) == 3 and n > 13, f"{n} pages did suffice")

        ended = with_mounts(work)
        expect(ended.code == 0, ended.output[-300:])


def _write_adapter(folder: Path) -> Callable[[], object]:
    opened, _ = trained()
    return lambda: opened.attached.adapter(opened.id).save(folder / "adapter")


WRITERS: list[Callable[[Path], Callable[[], object]]] = [
    _write_adapter,
    lambda folder: lambda: Run(folder).append_metrics({"step": 7, "loss": 1.0}),
    lambda folder: lambda: Run(folder).write_config(trained()[0].config),
    lambda folder: lambda: Run(folder).write_json(Run(folder).result, {"steps": 6}),
]


@fault(
    4,
    "the disk is full while the adapter, metrics, config or result is written: a clear error; each file is the old one "
    "or the new one, and nothing else is left",
    tries=40,
    sample=4,
    at_once=40,
    preload=True,
)
def full_elsewhere(n: int, scratch: Path) -> None:
    run = copy(finished_run(), scratch / "run")
    work = WRITERS[n % len(WRITERS)](run)
    before, lines = contents(run), Run(run).read_metrics()
    with shim.full_after(run, 10**9):
        work()
    total, after = shim.written(), contents(run)
    copy(finished_run(), run)
    with shim.full_after(run, n // len(WRITERS) * total // 10):
        clear_error(work, str(run))
    found = contents(run)
    metrics_file = found.pop("metrics.jsonl")
    expect(found.keys() == before.keys() - {"metrics.jsonl"}, found.keys())
    expect(all(data in (before[name], after[name]) for name, data in found.items()), "a file is neither old nor new")
    expect(metrics_file.startswith(before["metrics.jsonl"]) and Run(run).read_metrics() == lines, "metrics were lost")


ERRORS = [(errno.EIO, False), (errno.EIO, True), (errno.EDQUOT, False), (errno.EDQUOT, True), (errno.EINTR, False)]
FAILURES = [(kind, *failure) for kind in shim.KINDS for failure in ERRORS]


@fault(
    5,
    "the nth open, write, fsync, rename or mkdir of a save fails with EIO, EDQUOT (once, or from then on) or EINTR; "
    "n = 1, 2, … until a clean run, which is one try: a clear error or none, nothing lost, the next save works",
    tries=len(FAILURES),
    sample=5,
    at_once=5,
    preload=True,
)
def nth_call_fails(n: int, scratch: Path) -> None:
    kind, error, lasting = FAILURES[n * 6 % len(FAILURES)]
    for nth in itertools.count(1):
        folder = copy(committed(), scratch / "checkpoints")
        before, said = contents(folder), ""
        with shim.failing(scratch, kind, nth, error, lasting=lasting):
            try:
                save(folder, 3)
            except RunError as problem:
                said = str(problem)
        case = f"{kind} {nth}, {errno.errorcode[error]}: {said}"
        expect(len(said.splitlines()) <= 5, case)
        expect(all(is_whole(path) for path in list_checkpoints(folder)), case)
        expect(newest(folder) == 3 or (said and newest(folder) == 2), case)
        kept = {name: data for name, data in contents(folder).items() if not name.startswith("step-000003")}
        expect(newest(folder) == 3 or lasting or kept == before, case)
        if shim.calls(kind) < nth:
            expect(not said and nth > 1, f"{kind}: {nth - 1} calls")
            return
        save(folder, 4)
        expect(newest(folder) == 4 and not list(folder.glob(".*")), f"{case}: {os.listdir(folder)}")


CALLS = [("write", errno.ENOSPC), ("open", errno.EIO), ("fsync", errno.EIO), ("rename", errno.EDQUOT)]


@fault(
    5,
    "the nth open, write, fsync or rename of a whole run and all after it fail: a clear error; when the disk is well "
    "again the run goes on to the same bits",
    tries=60,
    sample=2,
    at_once=10,
    preload=True,
)
def run_on_a_failing_disk(n: int, scratch: Path) -> None:
    kind, error = CALLS[n % len(CALLS)]
    total = {"write": 60, "open": 240, "fsync": 70, "rename": 50}[kind]
    nth = 1 + n * 37 % 60 * total // 60
    shutil.rmtree(scratch / "run", ignore_errors=True)
    work = command_for(config(scratch / "run"))

    def failing() -> None:
        with shim.failing(scratch / "run", kind, nth, error, lasting=True):
            work()

    finished_run()
    ended = child(failing)
    expect_exit(ended, 1, 2, 0)
    go_on(scratch / "run")


def go_on(run: Path) -> None:
    """As a user would: resume what can be resumed, start what can't; then it is the run that nothing happened to."""
    if (run / "config.yaml").is_file() and not (run / "result.json").is_file():
        expect_exit(child(command("train", run, "--quiet")), 0)
    elif not (run / "config.yaml").is_file():
        expect_exit(child(command_for(config(run))), 0)
    expect(digest(run) == digest(finished_run()), "other bits")
    expect(metrics(run) == metrics(finished_run()), "metrics with a gap or a line twice")
    stale = [path for path in run.rglob(".*") if path.name != ".lock"]
    expect(not stale, f"left behind: {stale}")
