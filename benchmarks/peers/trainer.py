"""What transformers' Trainer does when the same happens to it, with a PEFT model, as documented: `Trainer.train()`,
killed or harmed, then `Trainer.train(resume_from_checkpoint=True)` with the same arguments in the same folder.
"""

import math
import os
import random
import re
import resource
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState

from benchmarks.peers.tools import (
    At,
    Row,
    adapted,
    base,
    came_of,
    copied,
    resumed,
    rows,
    stopped,
    tune,
    weights,
)
from tests.faults.common import child
from tests.faults.fault import peer
from tests.tiny import tiny_base

NEWEST = "checkpoint-4"


def stop_at(step: int) -> At:
    """Ends a run after `step`, saved."""

    def stop(control: Any) -> None:
        control.should_training_stop = True

    return At(step, stop)


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(outcomes: list[str]) -> str:
    """`refuses (ValueError) 2, resumes … 1`."""
    return "; ".join(f"{what} ({count} of {len(outcomes)})" for what, count in Counter(outcomes).most_common())


@peer(1, "Trainer")
def killed_while_saving(scratch: Path) -> str:
    """SIGKILL at three moments of writing checkpoint-4: before optimizer.pt, rng_state.pth, trainer_state.json."""
    moments = [(Trainer, "_save_optimizer_and_scheduler"), (Trainer, "_save_rng_state"), (TrainerState, "save_to_json")]
    outcomes = []
    for owner, name in moments:
        folder = scratch / name
        ended = child(lambda: _run_killed_in(owner, name, folder))  # noqa: B023  (called at once)
        assert ended.code == 128 + signal.SIGKILL, ended.output[-300:]
        outcomes.append(resumed(folder))
    return f"the next start {counted(outcomes)}"


def _run_killed_in(owner: Any, name: str, folder: Path) -> None:
    original = getattr(owner, name)

    def at_4(self: Any, *args: Any, **more: Any) -> Any:
        state = self if isinstance(self, TrainerState) else self.state
        return kill() if state.global_step == 4 else original(self, *args, **more)

    setattr(owner, name, at_4)
    tune(folder)


@peer(2, "Trainer")
def terminated(scratch: Path) -> str:
    """SIGTERM during step 6 of a run that saves every two."""
    at = At(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    ended = child(lambda: tune(scratch / "run", at=at))
    saved = max(int(path.name.split("-")[1]) for path in (scratch / "run").glob("checkpoint-*"))
    return f"exit {ended.code}, {5 - saved} of 5 steps lost"


@peer(4, "Trainer")
def disk_full(scratch: Path) -> str:
    """Files may not grow beyond half an optimizer.pt (RLIMIT_FSIZE) from step 3 on; then the limit is gone."""
    half = (stopped() / NEWEST / "optimizer.pt").stat().st_size // 2

    def fill(_: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))

    ended = child(lambda: tune(scratch / "run", at=At(3, fill)))
    kind = re.findall(r"^(\w*Error)\b", ended.output, re.MULTILINE)
    left = "leaves a broken checkpoint-4" if (scratch / "run" / NEWEST).exists() else "leaves checkpoint-2"
    return f"{kind[-1] if kind else f'exit {ended.code}'}, {left}; the next start {resumed(scratch / 'run')}"


@peer(7, "Trainer")
def bits_flipped(scratch: Path) -> str:
    """One random bit of the newest checkpoint's adapter or optimiser, twenty times each."""
    return "; ".join(f"{name}: {_flipped(scratch, name)}" for name in ("adapter_model.safetensors", "optimizer.pt"))


def _flipped(scratch: Path, name: str) -> str:
    outcomes = []
    for n in range(20):
        dice = random.Random(f"{name}-{n}")
        file = copied(scratch / "run") / NEWEST / name
        data = bytearray(file.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        file.write_bytes(data)
        outcomes.append(resumed(scratch / "run"))
    return counted(outcomes)


@peer(11, "Trainer")
def two_on_one_folder(scratch: Path) -> str:
    """A second run with another seed on the same folder while the first is at step 3."""
    folder = scratch / "run"
    second: list[str] = []
    at = At(3, lambda _: second.append(came_of(lambda: f"the second runs to step {_steps(folder, seed=7)}")))

    def first() -> str:
        tune(folder, at=at)
        return "the first goes on"

    return f"{came_of(first)}; {second[0]}; the folder's checkpoint-2 is {_whose(folder, 2)}"


def _steps(folder: Path, **changes: Any) -> int:
    return int(tune(folder, **changes).state.global_step)


def _whose(folder: Path, step: int) -> str:
    one, other = (
        (path / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes() for path in (folder, stopped())
    )
    return "the first's" if one == other else "the second's"


@peer(14, "Trainer")
def other_settings(scratch: Path) -> str:
    """Resume with another learning rate, seed, or rank."""
    lr = came_of(lambda: f"resumes, {_rate(copied(scratch / 'lr'))}")
    seed = resumed(copied(scratch / "seed"), seed=7, compare=False)
    rank = resumed(copied(scratch / "rank"), model=adapted(rank=8))
    return f"lr: {lr}; seed: {seed}; rank: {rank}"


def _rate(folder: Path) -> str:
    """Resume with ten times the rate: which rate do the steps have?"""
    rates = [line["learning_rate"] for line in tune(folder, resume=True, learning_rate=0.1).state.log_history[4:6]]
    return "with the old rate" if max(rates) < 0.01 else "with the new rate"


@peer(15, "Trainer")
def other_base(scratch: Path) -> str:
    """Resume on a base of the same shape with other weights."""
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM.from_pretrained(tiny_base(scratch / "other", seed=1))
    return resumed(copied(scratch / "run"), model=adapted(model=other), compare=False)


@peer(16, "Trainer")
def other_rows(scratch: Path) -> str:
    """Resume with the rows in reverse order."""
    return resumed(copied(scratch / "run"), data=rows()[::-1], compare=False)


@peer(17, "Trainer")
def other_accumulation(scratch: Path) -> str:
    """Resume with half the batch and twice the accumulation, which is the same step."""
    return resumed(copied(scratch / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2, compare=False)


@peer(18, "Trainer")
def files_missing(scratch: Path) -> str:
    """A file of the newest checkpoint is gone."""
    said = []
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (copied(scratch / "run") / NEWEST / name).unlink()
        said.append(f"{name}: {resumed(scratch / 'run')}")
    return "; ".join(said)


@peer(21, "Trainer")
def folder_moved(scratch: Path) -> str:
    """`load_best_model_at_end`, the best at step 2; stopped at 4, the folder moved, resumed there."""

    def run(name: str, **more: Any) -> Tensor:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
        watch = {"held_out": rows(4), "eval_strategy": "steps", "eval_steps": 2}
        return weights(tune(scratch / name, **best, **watch, **more).model)

    def go_on() -> str:
        kept = torch.equal(run("moved", resume=True), run("unmoved"))
        return f"ends with {'the best' if kept else 'another than the best'}"

    run("run", at=stop_at(4))
    (scratch / "run").rename(scratch / "moved")
    return came_of(go_on)


@peer(22, "Trainer")
def times_reversed(scratch: Path) -> str:
    """The clock was an hour ahead when checkpoint-2 was written; resumed with `save_total_limit` 1 and 2."""
    said = []
    for keep in (1, 2):
        folder = copied(scratch / "run")
        later = time.time() + 3600
        os.utime(folder / "checkpoint-2", (later, later))
        tune(folder, resume=True, save_total_limit=keep)
        left = ", ".join(sorted(path.name for path in folder.glob("checkpoint-*")))
        said.append(f"where {keep} may stay, {left} {'does' if keep == 1 else 'do'} after step 6")
    return "; ".join(said)


@peer(23, "Trainer")
def nan_in_the_loss(scratch: Path) -> str:
    """The loss of step 3 is NaN."""
    model = adapted()
    model.register_forward_hook(_third(_nan_loss))
    return came_of(lambda: _aftermath(scratch, model))


@peer(24, "Trainer")
def inf_in_the_gradient(scratch: Path) -> str:
    """One gradient of step 3 is inf, the loss is finite."""
    model = adapted()
    factor = next(value for name, value in model.named_parameters() if "lora_B" in name)
    factor.register_hook(_third(lambda gradient: gradient * torch.inf))
    return came_of(lambda: _aftermath(scratch, model))


def _third(spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    """A hook that spoils what came out, the third time."""
    calls = count(1)
    return lambda *given: spoil(given[-1]) if next(calls) == 3 else None


def _nan_loss(output: Any) -> None:
    output.loss.mul_(torch.nan)


def _aftermath(scratch: Path, model: Any) -> str:
    trainer = tune(scratch / "run", model=model)
    bad = (~weights(model).isfinite()).float().mean()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    logged = "finite" if all(map(math.isfinite, losses)) else "NaN"
    return f"goes on to step {trainer.state.global_step}, {bad:.0%} of the weights NaN, the losses it logs {logged}"


@peer(27, "Trainer")
def all_masked(scratch: Path) -> str:
    """Every label of every row is -100."""
    return came_of(lambda: trained_on(scratch, [{**row, "labels": [-100] * len(row["labels"])} for row in rows()]))


@peer(54, "Trainer")
def hardly_any_rows(scratch: Path) -> str:
    """No row, and one."""
    return f"none: {came_of(lambda: trained_on(scratch, []))}; one: {came_of(lambda: trained_on(scratch, rows(1)))}"


def trained_on(folder: Path, data: list[Row]) -> str:
    """Six steps on `data`: the losses it logs and whether the weights moved."""
    trainer = tune(folder / "run", data=data)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    moved = "unchanged" if torch.equal(weights(trainer.model), weights(adapted())) else "trained"
    bad = "NaN" if weights(trainer.model).isnan().any() else moved
    return f"{trainer.state.global_step} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}, weights {bad}"


@peer(28, "Trainer")
def nan_in_the_base(scratch: Path) -> str:
    """One weight of the base is NaN on disk."""
    model = base()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(scratch / "base")

    def run() -> str:
        return "loads it, " + _aftermath(scratch, adapted(model=type(model).from_pretrained(scratch / "base")))

    return came_of(run)


@peer(32, "Trainer")
def pickles(scratch: Path) -> str:
    """What of a checkpoint is a pickle."""
    files = sorted((stopped() / NEWEST).iterdir())
    found = [path.name for path in files if zipfile.is_zipfile(path)]
    return f"{len(found)} of a checkpoint's {len(files)} files are pickles: {', '.join(found)}"
