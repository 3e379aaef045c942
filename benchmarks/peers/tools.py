"""Other tools on the tiny base, and what they say aloud: shared by adapters.py and trainer.py.

Their defaults are kept, but for what a run of six steps on a CPU without network needs. What they warn of in a healthy
run (`usual`) is not counted as a word about the harm that was done.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as their_logging

from tests.faults import common
from tests.faults.common import place

their_logging.disable_progress_bar()
Row = dict[str, list[int]]


@cache
def _base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(place() / "base")


def base() -> LlamaForCausalLM:
    """The tiny base, fresh."""
    return copy.deepcopy(_base())


def adapted(rank: int = 4, model: LlamaForCausalLM | None = None) -> PeftModel:
    """A fresh adapter on the tiny base."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model or base(), config)


def rows(count: int = 24) -> list[Row]:
    """Token sequences to train on."""
    ids = [[3 + (7 * i + j) % 90 for j in range(6)] for i in range(count)]
    return [{"input_ids": some, "labels": list(some)} for some in ids]


class At(TrainerCallback):
    """Calls `act` at the end of step `step`, before it is saved."""

    def __init__(self, step: int, act: Callable[[Any], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act(control)


def tune(
    folder: Path,
    *,
    resume: bool = False,
    model: Any = None,
    data: Sequence[Row] | None = None,
    at: At | None = None,
    loss: Callable[..., Tensor] | None = None,
    held_out: Sequence[Row] | None = None,
    **arguments: Any,
) -> Trainer:
    """Six steps of transformers' Trainer on a PEFT model, a checkpoint every two, logged every one."""
    own = {
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model or adapted(),
        args=TrainingArguments(output_dir=str(folder), **{**own, **arguments}),
        train_dataset=rows() if data is None else data,
        eval_dataset=held_out,
        callbacks=[at] if at else None,
        compute_loss_func=loss,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def weights(model: Any) -> Tensor:
    """All trainable values, flat."""
    return torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])


@cache
def stopped() -> Path:
    """A Trainer's folder with checkpoints of steps 2 and 4 of six. Copy it."""

    def stop(control: Any) -> None:
        control.should_training_stop = True

    tune(place() / "trainer", at=At(4, stop))
    return place() / "trainer"


def copied(folder: Path) -> Path:
    """A copy of `stopped()` to do harm to."""
    return common.copy(stopped(), folder)


@cache
def undisturbed() -> Tensor:
    """The weights that a run has that is never stopped."""
    return weights(tune(place() / "undisturbed").model)


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is warned of inside the block, numbers and paths taken out."""
    lines: list[str] = []
    their_logging.warning_once.cache_clear()  # else what was said in an earlier run isn't said again

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(_plain(record.getMessage()))

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "transformers", "peft", "accelerate", "trl")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines += [_plain(str(item.message)) for item in caught]
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


def _plain(text: str) -> str:
    return re.sub(r"[\d.]+|/\S+", "", text)


@cache
def usual() -> frozenset[str]:
    """What is warned of in a healthy run, a healthy resume and a healthy load."""
    with heard() as lines:
        tune(copied(place() / "usual"), resume=True)
        PeftModel.from_pretrained(base(), adapter())
    return frozenset(lines)


@cache
def adapter() -> Path:
    """An adapter with B ≠ 0, as PEFT saves it. Copy it."""
    model = adapted()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    model.save_pretrained(place() / "peft-adapter")
    return place() / "peft-adapter"


def came_of(work: Callable[[], str], healthy: Callable[[], object] | None = None) -> str:
    """What `work` says, and whether anything was said aloud that isn't in a healthy run; or the kind of error."""
    known = set(usual())
    if healthy:
        with heard() as lines:
            healthy()
        known |= set(lines)
    try:
        with heard() as lines:
            what = work()
    except Exception as error:
        return f"refuses ({type(error).__name__})"
    return f"{what}, {'with a warning' if set(lines) - known else 'no warning'}"


def resumed(folder: Path, *, compare: bool = True, **changes: Any) -> str:
    """Resume as `resume_from_checkpoint=True` does, and say how it ended."""

    def work() -> str:
        trainer = tune(folder, resume=True, **changes)
        same = torch.equal(weights(trainer.model), undisturbed())
        return f"resumes to {'the same end' if same else 'another end'}" if compare else "resumes"

    return came_of(work)
