"""Runs that are killed or stopped, can't write where they should, or share a folder (1-3, 10, 11, 20)."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from deltaw.files.lock import locked
from deltaw.run import Run
from deltaw.training.checkpoint import is_whole, list_checkpoints, read_checkpoint
from deltaw.training.run import resume, train
from tests.faults.common import (
    QUIET,
    Ended,
    changed,
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
    stopped_run,
)
from tests.faults.disk import can_mount, read_only, small_disk, with_mounts
from tests.faults.fault import expect, fault

SAVE_EVERY = 2


def start_or_resume(run: Path) -> Callable[[], object]:
    """What a user does with a run folder that a machine left behind."""
    return command("train", run, "--quiet") if (run / "config.yaml").is_file() else command_for(config(run))


def steps_on_disk(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 for none."""
    whole = [path for path in list_checkpoints(run / "checkpoints") if is_whole(path)]
    return int(whole[-1].name[5:]) if whole else 0


def steps_done(run: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    return max([line["step"] for line in Run(run).read_metrics()], default=0)


def finish(run: Path) -> None:
    """Go on until it is done; then nothing shows that anything ever happened."""
    for _ in range(2):
        if (run / "result.json").exists():
            break
        expect_exit(child(start_or_resume(run)), 0)
    expect(digest(run) == digest(finished_run()), "other bits")
    expect(metrics(run) == metrics(finished_run()), "metrics with a gap, or a line twice")
    left = [str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".lock"]
    expect(not left, f"left behind: {left}")


def check_crash(run: Path) -> None:
    """Right after a kill: every checkpoint with a final name is whole, and at most the save interval is lost."""
    broken = [path.name for path in list_checkpoints(run / "checkpoints") if not is_whole(path)]
    expect(not broken, f"half-made under a final name: {broken}")
    lost = steps_done(run) - steps_on_disk(run)
    expect(lost <= SAVE_EVERY, f"{lost} steps lost")


@cache
def usual_seconds() -> float:
    """How long a run takes that nothing happens to."""
    run = Path(finished_run()).with_name("timed")
    ended = child(command_for(config(run)))
    expect_exit(ended, 0)
    return ended.seconds


@fault(
    1,
    "SIGKILL at a random moment from start to end, resumed, killed again one time in three: at most the "
    "save interval "
    "is lost, nothing half-made has a final name, the same bits and metrics at the end",
    tries=200,
    sample=6,
    at_once=20,
)
def killed(n: int, scratch: Path) -> None:
    chance, run = random.Random(n), scratch / f"run-{n}"
    for _ in range(1 + (n % 3 == 0)):
        moment = chance.uniform(0, 1.05) * usual_seconds()
        ended = child(start_or_resume(run), kill=iter([(moment, signal.SIGKILL)]))
        expect(ended.code in (137, 0), ended)
        check_crash(run)
        if (run / "result.json").exists():
            break
    finish(run)
    shutil.rmtree(run)


def killing_itself(work: Callable[[], object], name: str, nth: int) -> Callable[[], object]:
    """`work`, in which the `nth` call of os.`name` or Path.`name` is the last thing that happens: SIGKILL."""
    owner: Any = Path if name in ("rename", "mkdir", "chmod") else os

    def dying() -> None:
        original, calls = getattr(owner, name), []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        with changed(owner, name, call):
            work()

    return dying


@fault(
    1,
    "SIGKILL right before the kth fsync, rename, replace, chmod or mkdir of a run, the midst of every save "
    "included: the same",
    tries=150,
    sample=5,
    at_once=15,
)
def killed_inside_a_save(n: int, scratch: Path) -> None:
    name = ("fsync", "replace", "rename", "chmod", "mkdir")[n % 5]
    run = scratch / f"run-{n}"
    work = killing_itself(start_or_resume(run), name, 1 + n // 5)
    ended = child(work)
    expect(ended.code in (137, 0), ended)
    check_crash(run)
    finish(run)
    shutil.rmtree(run)


def signalled(run: Path, n: int, *numbers: int) -> Ended:
    """A run that is sent `numbers` at a moment of try n after its first checkpoint could be there, 10 ms apart."""
    moment = random.Random(n).uniform(0.35, 0.85) * usual_seconds()
    kill = [(moment, numbers[0]), *((0.01, number) for number in numbers[1:])]
    return child(start_or_resume(run), kill=iter(kill))


@fault(
    2,
    "SIGTERM at a random moment: exit 143, the step that was running is saved (0 lost), the same bits after resuming",
    tries=50,
    sample=3,
    at_once=10,
)
def terminated(n: int, scratch: Path) -> None:
    _stopped(signalled(scratch / "run", n, signal.SIGTERM), scratch / "run", 143)


@fault(
    3, "Ctrl-C once at a random moment: exit 130, saved, the same bits after resuming", tries=50, sample=3, at_once=10
)
def interrupted(n: int, scratch: Path) -> None:
    _stopped(signalled(scratch / "run", 1000 + n, signal.SIGINT), scratch / "run", 130)


def _stopped(ended: Ended, run: Path, code: int) -> None:
    if not (run / "config.yaml").exists():  # before anything of ours could run
        expect(ended.code == code, ended)
    else:
        expect_exit(ended, code, 0)
    if ended.code == code and steps_done(run) and not (run / "result.json").exists():
        lost = steps_done(run) - steps_on_disk(run)
        expect(lost == 0, f"{lost} steps lost: {ended.output}")
        expect("deltaw train" in ended.output, ended.output)
    finish(run)
    shutil.rmtree(run)


@fault(
    3,
    "Ctrl-C twice, or SIGTERM twice: stops at once, nothing that was committed is lost, the same bits after resuming",
    tries=50,
    sample=3,
    at_once=10,
)
def interrupted_twice(n: int, scratch: Path) -> None:
    run, number = scratch / "run", (signal.SIGINT, signal.SIGTERM)[n % 2]
    ended = signalled(run, 2000 + n, number, number)
    expect(ended.code in (0, 128 + number), ended)
    check_crash(run)
    finish(run)
    shutil.rmtree(run)


@fault(
    2,
    "SIGTERM during each step, and during the evaluation after it: that very step is saved",
    tries=12,
    sample=2,
    at_once=6,
)
def terminated_in_step(n: int, scratch: Path) -> None:
    from deltaw.training import measuring
    from deltaw.training import run as loop

    run, step = scratch / f"run-{n}", 1 + n % 6
    step_of, loss_of = loop.step, measuring.held_out_loss
    losses: list[int] = []

    def in_step(forward: Any, learners: Any, *args: Any) -> Any:
        if learners[0].state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(forward, learners, *args)

    def in_evaluation(*args: Any) -> Any:
        losses.append(1)
        if len(losses) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(*args)

    def work() -> None:
        with changed(loop, "step", in_step) if n < 6 else changed(measuring, "held_out_loss", in_evaluation):
            command_for(config(run, train={"eval_every": 1}))()

    ended = child(work)
    expect_exit(ended, 143)
    expect(steps_on_disk(run) == steps_done(run) == step, f"step {steps_on_disk(run)} is saved, not {step}")
    expect_exit(child(start_or_resume(run)), 0)
    straight = scratch / "straight"
    if not straight.exists():
        train(config(straight, train={"eval_every": 1}), display=QUIET)
    expect(digest(run) == digest(straight) and metrics(run) == metrics(straight), "another end")


def _fresh(*arguments: object) -> tuple[int, str, float]:
    """(exit code, what was said, seconds) of a fresh process, as a user starts it."""
    began = time.monotonic()
    code = "import sys; from deltaw.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stderr, time.monotonic() - began


def _no_folder(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file" / "run"


def _read_only(place: Path) -> Path:
    (place / "locked").mkdir()
    return read_only(place / "locked") / "run"


def _no_inodes(place: Path) -> Path:
    disk = small_disk(place / "disk", "size=1m,nr_inodes=3")
    for name in ("a", "b"):
        (disk / name).write_text("")
    return disk / "run"


def _is_a_file(place: Path) -> Path:
    (place / "run").write_text("")
    return place / "run"


PLACES = [_no_folder, _is_a_file, *([_read_only, _no_inodes] if can_mount() else [])]


@fault(
    10,
    "an output below a file, a file itself, on a read-only disk, on one without inodes (fresh processes): "
    "refused with exit "
    "2 within 2 s, before the model is looked at",
    tries=len(PLACES),
    sample=2,
)
def unwritable_output(n: int, scratch: Path) -> None:
    def work() -> None:
        output = PLACES[n](scratch)
        fields = config(scratch / "x").model_copy(update={"output": str(output), "base": "no/such-model"})
        (scratch / "run.yaml").write_text(fields.to_yaml())
        code, said, seconds = _fresh("train", scratch / "run.yaml")
        print(f"exit {code} after {seconds:.2f} s: {said}")
        expect(code == 2 and "output" in said and len(said.splitlines()) <= 5, said)
        expect(seconds < 2.0, f"{seconds:.2f} s")

    ended = with_mounts(work) if can_mount() else child(work)
    expect(ended.code == 0, ended.output[-400:])


@fault(
    11,
    "a second run on a folder that is in use, new, resumed or with --replace: refused, the owner's pid named, "
    "nothing touched",
    tries=12,
    sample=3,
    at_once=12,
)
def two_runs(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    works: list[Callable[[], object]] = [
        lambda: resume(run, display=QUIET),
        lambda: train(config(run), replace=True, display=QUIET),
        lambda: Run.check(config(run), replace=True),
    ]
    with locked(run / ".lock", "x"):
        ended = child(lambda: clear_error(works[n % 3], f"process {os.getppid()}", "in use"))
    expect(ended.code == 0, ended.output[-400:])
    expect(all(path.read_bytes() == data for path, data in before.items()), "it was touched")


@fault(11, "the owner of a run killed with SIGKILL: its lock isn't an obstacle", tries=10, sample=1, at_once=10)
def stale_lock(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")

    def owner() -> None:
        with locked(run / ".lock", "x"):
            os.kill(os.getpid(), signal.SIGKILL)

    expect(child(owner).code == 137 and (run / ".lock").read_text(), "the owner left no lock")
    finish(run)


@fault(
    20,
    "an old checkpoint can't be deleted, or vanishes while one is read: training goes on, the newest and the best stay",
    tries=6,
    sample=2,
)
def deletion_fails(n: int, scratch: Path) -> None:
    from deltaw.training import checkpoint

    def refuse(*args: Any, **kwargs: Any) -> None:
        if not kwargs.get("ignore_errors"):
            raise PermissionError("no")

    def refuse_rename(self: Path, target: Any) -> Path:
        if self.name.startswith("step-") and str(target).endswith(".tmp"):
            raise PermissionError("no")
        return rename(self, target)

    rename, run = Path.rename, scratch / "run"
    block = changed(checkpoint.shutil, "rmtree", refuse) if n % 2 == 0 else changed(Path, "rename", refuse_rename)
    settings = config(run, train={"keep": 1 + n % 3, "eval_every": 1, "save_every": 1})
    with block:
        train(settings, replace=True, display=QUIET)
    found = list_checkpoints(run / "checkpoints")
    expect(found[-1].name == "step-000006" and all(is_whole(path) for path in found), found)
    best = read_checkpoint(found[-1]).state.best_step
    expect((run / "checkpoints" / f"step-{best:06}").is_dir(), f"the best, {best}, is gone")


@fault(
    20,
    "rotation under every `keep`, best steps early and late: the newest and the best of each kept one stay",
    tries=12,
    sample=2,
)
def rotation(n: int, scratch: Path) -> None:
    from deltaw.training import measuring

    chance = random.Random(n)
    losses = [chance.random() for _ in range(6)]
    taken = iter(losses)
    settings = config(scratch / "run", train={"keep": 1 + n % 4, "eval_every": 1, "save_every": 1})
    with changed(measuring, "held_out_loss", lambda *args: (next(taken), 1)):
        train(settings, replace=True, display=QUIET)
    best = losses.index(min(losses)) + 1
    names = [path.name for path in list_checkpoints(scratch / "run/checkpoints")]
    expect(f"step-{best:06}" in names and "step-000006" in names, f"best {best}: {names}")
    expect(len(names) <= 2 * settings.train.keep, names)
