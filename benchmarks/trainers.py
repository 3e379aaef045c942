"""The peers' own trainers: transformers' Trainer with PEFT as documented, and TRL's SFTTrainer with PEFT made strong.

Made strong means: base in the fast dtype, no gradient checkpointing (TRL's default turns it on), rows of like length
together (workloads.py), TRL's own chunked head that skips tokens without a label, fused AdamW, no logging after the
first step, no evaluation, no worker processes, tokens prepared beforehand. `trl-free` is TRL's padding-free mode: on a
CPU it works (sdpa gets a dense mask of blocks) and is no faster once rows of like length share a batch. Neither were
factors in bfloat16 (`autocast_adapter_dtype=False`), nor autocast with PEFT's casting of inputs off.

Both get the rows in the order of the steps, in batches of a step's size, so that they see the same steps as the bare
loops. A step's seconds run from the end of the step before: fetching and padding count, as they do elsewhere.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.loops import TRAIN, peft_model
from benchmarks.workloads import BASE, Step
from deltaw.base.source import find_base
from deltaw.data.render import open_tokenizer
from deltaw.kernels.logprobs import IGNORE


@dataclass
class Clock(TrainerCallback):
    """The seconds of every step. `before` is called before the first, `after` after it."""

    before: Callable[[], None]
    after: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    last: float = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before()
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if len(self.seconds) == 1:
            self.after()


def settings(
    folder: str, steps: int, rows: int, rate: float, *, decay: float = 0.0, clip: float = 1.0
) -> dict[str, Any]:
    """What makes a trainer of transformers, or one of TRL's, strong and quiet: a batch of `rows` per step at a constant
    rate, on the CPU."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": decay,
        "max_grad_norm": clip,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def train(arm: str, factors: Path, dtype: torch.dtype, steps: list[Step], clock: Clock) -> float:
    """Take the steps under `clock`; the loss of the first. Raises ValueError when steps differ in their rows."""
    sizes = {len(step) for step in steps}
    if len(sizes) > 1:
        raise ValueError("a trainer takes steps of one number of rows; this workload has steps of several")
    model, tokenizer = peft_model(factors, dtype), open_tokenizer(find_base(BASE).directory)
    with tempfile.TemporaryDirectory() as folder:
        common = settings(folder, len(steps), sizes.pop(), TRAIN.lr, decay=TRAIN.weight_decay, clip=TRAIN.clip)
        common |= {"train_sampling_strategy": "sequential", "logging_first_step": True, "logging_steps": 10**6}
        trainer: Trainer
        if arm == "peft-trainer":
            trainer = Trainer(
                model,
                TrainingArguments(**common),
                train_dataset=dataset(steps, mask=True),
                data_collator=DataCollatorForSeq2Seq(tokenizer),
                callbacks=[clock],
            )
        else:
            ours: dict[str, Any] = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
            trainer = SFTTrainer(
                model,
                SFTConfig(**common, **ours, padding_free=arm == "trl-free"),
                train_dataset=dataset(steps, mask=False),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])


def dataset(steps: list[Step], *, mask: bool) -> Dataset:
    """The rows in order: input_ids and labels (not yet shifted), an attention mask where the collator wants one."""
    rows = [
        {"input_ids": row.tokens.tolist(), "labels": np.where(row.loss_mask, row.tokens, IGNORE).tolist()}
        for step in steps
        for row in step
    ]
    return Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"])} for row in rows] if mask else rows)
