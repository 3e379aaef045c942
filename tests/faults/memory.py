"""Memory runs out (30): in the first batch, at a later step, in an evaluation. What is advised is taken and must do."""

import json
import re
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.config import RunConfig, parse_config
from deltaw.training import memory
from deltaw.training import run as loop
from deltaw.training.checkpoint import list_checkpoints
from tests.faults.common import (
    Ended,
    changed,
    child,
    command,
    command_for,
    config,
    digest,
    expect_exit,
    finished_run,
    metrics,
    place,
)
from tests.faults.fault import expect, fault
from tests.tiny import run_file, tiny_base, words

MIB = 1 << 20
NOTHING = {"general": None, "report": False, "samples": 0}


@cache
def wide() -> Path:
    """A base and rows whose largest batch takes some hundred MiB."""
    folder = place() / "wide"
    tiny_base(folder / "base", hidden_size=128, intermediate_size=384)
    words(folder / "train.jsonl", 1200)
    return folder


def wide_config(output: Path) -> RunConfig:
    """One step of one batch of 8,192 tokens, or of several smaller ones."""
    sizes = {"steps": 1, "tokens_per_step": 8192, "tokens_per_batch": 8192, "dtype": "float32", "device": "cpu"}
    return parse_config({**run_file(wide(), output=str(output), evaluate=NOTHING), "train": sizes})


def under(room: int, limit: int | None, work: Callable[[], object]) -> Callable[[], object]:
    """`work` with `room` bytes left once the model is loaded: to the address space (`ulimit -v`) where `limit` names
    that, else to the whole machine, which sends no error by itself but kills."""
    open_run = loop.open_run

    def opened(*args: Any, **options: Any) -> Any:
        made = open_run(*args, **options)
        if limit is None:
            held = memory._status("VmRSS")
            memory._available = lambda: max(0, held + room - memory._status("VmRSS"))  # type: ignore[assignment]
        else:
            resource.setrlimit(limit, (memory._status("VmSize") + room, resource.getrlimit(limit)[1]))
        return made

    def limited() -> None:
        with changed(loop, "open_run", opened):
            work()

    return limited


def advised(ended: Ended, *words: str) -> list[str]:
    """The settings that a run's last words name: it ended with 1, and said what it was about."""
    expect_exit(ended, 1)
    said = ended.output[ended.output.rfind("error:") :].strip().splitlines()
    for word in words:
        expect(any(word in line for line in said), said)
    return [line.strip() for line in said[1:-1]]


def go_on(run: Path, setting: str) -> Callable[[], object]:
    """The command that the advice is."""
    return command("train", run, setting.split(":")[0], "--allow", "--quiet")


@fault(
    30, "memory runs out in the first batch: estimate and three settings, the first of which fits", tries=12, sample=2
)
def first_batch(n: int, scratch: Path) -> None:
    limit = (resource.RLIMIT_AS, None)[n % 2]
    room, run = (64 + 8 * (n // 2)) * MIB, scratch / f"first-{n}"  # 40 is within what the estimate is off by
    settings = wide_config(run)
    ended = child(under(room, limit, command_for(settings)))
    found = advised(
        ended, "out of memory in step 1 of 1", "a batch of 8,", "takes about", "nothing has been trained yet"
    )
    expect(len(found) == 3 and all("about" in line and "=" in line for line in found), found)
    needed, there = _amounts(ended.output)
    expect(there < needed < 6 * there, (there, needed))
    expect(re.match(r"train\.tokens_per_batch=\d+:", found[0]), found)
    expect_exit(child(under(room, limit, go_on(run, found[0]))), 0)


@fault(30, "a GPU's memory runs out in step 1: the same, and the advice holds", tries=5, sample=1)
def gpu_first_batch(n: int, scratch: Path) -> None:
    most, run = (10, 18, 24, 36, 48)[n], scratch / f"gpu-{n}"
    with changed(Forward, "loss", _at_most(most)):
        ended = child(command_for(config(run, evaluate=NOTHING)))
        found = advised(ended, "out of memory in step 1 of 6", "takes about", "nothing has been trained yet")
        expect(len(found) == 3, found)
        fitting = [line for line in found if _tokens(line) <= most]
        if fitting:
            expect_exit(child(go_on(run, fitting[0])), 0 if "data." not in fitting[0] else 2)


@fault(
    30, "memory runs out at step k: the newest checkpoint remains, resuming ends with the same bits", tries=5, sample=1
)
def later_step(n: int, scratch: Path) -> None:
    step, run = n + 2, scratch / f"later-{n}"
    step_of = loop.step

    def failing(forward: Any, learners: Any, *args: Any) -> Any:
        if learners[0].state.step == step - 1:
            _run_out()
        return step_of(forward, learners, *args)

    with changed(loop, "step", failing):
        ended = child(command_for(config(run)))
    saved = (0, 2, 3, 4, 4)[n]  # every second step, and the third, the best so far
    remains = f"step-{saved:06} remains" if saved else "nothing has been trained yet"
    found = advised(ended, f"out of memory in step {step} of 6", "takes about", remains)
    expect(len(found) == 3, found)
    expect(
        [path.name for path in list_checkpoints(run / "checkpoints")][-1:] == [f"step-{saved:06}"] * bool(saved), found
    )
    expect_exit(child(command("train", run, "--quiet")), 0)
    expect(digest(run) == digest(finished_run()) and metrics(run) == metrics(finished_run()), "other bits")


@fault(
    30,
    "memory runs out in an evaluation: which, and the setting that leaves it out; after the last step the run is whole",
    tries=3,
    sample=1,
)
def evaluation(n: int, scratch: Path) -> None:
    target, doing, setting = (
        ("deltaw.evaluation.forgetting.batches", "measuring what was forgotten", "evaluate.general=null"),
        ("deltaw.generate.batches.padded", "answering rows", "evaluate.max_new_tokens=2"),
        ("deltaw.evaluation.held_out.batches", "measuring the loss on held-out rows", "train.dtype=bfloat16"),
    )[n]
    module, name = target.rsplit(".", 1)
    run = scratch / f"evaluation-{n}"
    asked = {"metrics": ["exact_match"], "max_new_tokens": 4, "general": "builtin:general", "report": False}

    def broken() -> None:
        with changed(__import__(module, fromlist=[name]), name, lambda *args, **how: _run_out()):
            command_for(config(run, evaluate=asked))()

    if n == 0:  # the general text is tried at once only where memory is short
        ended = child(broken)
        expect_exit(ended, 0)
        why = json.loads((run / "result.json").read_text())["failed"]["forgetting"]
        expect(f"out of memory {doing} after step 6 of 6" in why and why in ended.output, ended.output)
        expect(digest(run) == digest(finished_run()), "another adapter")
    else:
        found = advised(child(broken), f"out of memory {doing} after step 0 of 6", "it takes more than")
        expect(setting in found, found)
    if setting.startswith("evaluate."):
        expect_exit(child(go_on(run, setting)), 0)


def _run_out() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 MiB."
    )


def _at_most(tokens: int) -> Any:
    """A loss whose backward's memory suffices for so many tokens."""
    loss = Forward.loss

    def limited(self: Forward, batch: Batch) -> Any:
        if torch.is_grad_enabled() and len(batch.tokens_T) > tokens:
            _run_out()
        return loss(self, batch)

    return limited


def _tokens(setting: str) -> int:
    found = re.search(r"tokens_per_batch=(\d+)", setting)
    return int(found.group(1)) if found else 1 << 60


def _amounts(said: str) -> tuple[float, float]:
    """(what a batch takes, what is there) in bytes, as the message has them."""
    units = {"MiB": 1 << 20, "GiB": 1 << 30}
    there, needed, *_ = [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (MiB|GiB)", said)]
    return needed, there
