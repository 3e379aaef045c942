"""What the faults share: tiny bases and runs, made once per process; children that are forked, signalled and killed.

A child is a fork of this process, which has torch, transformers and the tiny base's files at hand, so that it is up in
milliseconds where a fresh `deltaw` would take five seconds: two hundred kills are a minute's work. It runs the same
functions as the command line.
"""

import atexit
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forks

import torch

from deltaw.config import RunConfig, parse_config
from deltaw.show.progress import Display
from tests.tiny import run_file, tiny_base, words

torch.set_num_threads(1)  # forks, and a worker a core
QUIET = Display(quiet=True)


@cache
def place() -> Path:
    """A folder with `base/` and `train.jsonl`, for this process's lifetime. Tries must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    return folder


def config(output: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A run of six small steps on the tiny base into `output`; `train` over its train section, `changes` whole ones."""
    fields = run_file(place(), output=str(output), **changes)
    return parse_config({**fields, "train": {**fields["train"], **(train or {})}})


@cache
def finished_run() -> Path:
    """A run like `config`'s that nothing happened to. Tries must not change it: copy it."""
    from deltaw.training.run import train

    train(config(place() / "finished"), display=QUIET)
    return place() / "finished"


@cache
def stopped_run(step: int = 5) -> Path:
    """A run like `config`'s that was stopped after `step` of its six steps, checkpoints at 2, 4 and there."""
    output = place() / f"stopped-{step}"
    status = child(lambda: train_and_signal(config(output), step, signal.SIGTERM))
    expect_exit(status, 128 + signal.SIGTERM)
    return output


def copy(folder: Path, to: Path) -> Path:
    """A copy of a run to do harm to; what stood at `to` goes."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def digest(run: Path) -> str:
    """Of the bytes of a run's adapter."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (128 + n by signal n, as a shell says it), what it printed, how long it took."""

    code: int
    output: str
    seconds: float


def child(
    work: Callable[[], object], *, kill: Iterator[tuple[float, int]] | tuple[()] = (), limit: float = 120
) -> Ended:
    """Run `work` in a fork; `kill` gives (seconds to wait, signal to send) one after the other. Never hangs: after
    `limit` seconds it is killed, which is an exit code of 137."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _be_the_child(work, out.fileno())
        status = None
        for seconds, number in kill:
            status = _wait(pid, seconds)
            if status is not None:
                break
            os.kill(pid, number)
        if status is None:
            status = _wait(pid, limit)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        out.seek(0)
        text = out.read().decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status)
    return Ended(128 - code if code < 0 else code, text, time.monotonic() - began)


def command(*arguments: object) -> Callable[[], object]:
    """`deltaw ARGUMENTS` as a child's work, with its exit code and its messages."""

    def work() -> None:
        from deltaw.cli import main

        sys.argv = ["deltaw", *map(str, arguments)]
        main()

    return work


def imported_anew(*packages: str) -> None:
    """In this process, a child: these packages' modules are forgotten, so that an import runs them as a fresh
    interpreter does, but for the seconds that torch takes."""
    for name in [name for name in sys.modules if any(f"{name}.".startswith(f"{package}.") for package in packages)]:
        del sys.modules[name]


def train_and_signal(settings: RunConfig, step: int, number: int) -> None:
    """A child's work: train through the command line's door, and send `number` while update `step` is computed."""
    signal_at(step, number)
    command_for(settings)()


def command_for(settings: RunConfig) -> Callable[[], object]:
    """`deltaw train FILE` for a config, the file beside its output."""
    file = Path(settings.output).with_suffix(".yaml")
    file.write_text(settings.to_yaml())
    return command("train", file, "--quiet")


def signal_at(step: int, number: int) -> None:
    """In this process: send `number` to itself while update `step` is computed."""
    from deltaw.training import run as loop

    original = loop.step

    def stepping(forward: Any, learners: Any, *args: Any) -> Any:
        records = original(forward, learners, *args)
        if learners[0].state.step == step:
            os.kill(os.getpid(), number)
        return records

    loop.step = stepping


def expect_exit(ended: Ended, *codes: int) -> None:
    """The child ended with one of `codes`, and not with a traceback nor more than five lines of error."""
    said = ended.output.strip()
    if ended.code not in codes:
        raise AssertionError(f"exit {ended.code}, not {codes}: {said[-600:]}")
    if "Traceback" in said or "defect" in said:
        raise AssertionError(f"a traceback or a defect: {said[-600:]}")
    error = said[said.rfind("error:") :] if "error:" in said else ""
    if len(error.splitlines()) > 5:
        raise AssertionError(f"more than five lines: {error}")


def clear_error(work: Callable[[], object], *words: str, seconds: float = 60.0) -> str:
    """`work` raises InputError or RunError, whose message is at most five lines and has every one of `words`."""
    from deltaw.errors import DeltawError

    began = time.monotonic()
    try:
        got = work()
    except DeltawError as error:
        said = f"error: {error}"
    else:
        raise AssertionError(f"no error: {got!r:.200}")
    took = time.monotonic() - began
    if len(said.splitlines()) > 5 or took > seconds:
        raise AssertionError(f"{took:.2f} s, {len(said.splitlines())} lines: {said}")
    missing = [word for word in words if word not in said]
    if missing:
        raise AssertionError(f"{missing} isn't in: {said}")
    return said


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _be_the_child(work: Callable[[], object], out: int) -> None:
    """Never returns, whatever `work` raises and whenever a signal comes: our caller isn't the child's to go on with."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            code = 0
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, seconds: float) -> int | None:
    """The child's wait status, or None when it still runs after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)
