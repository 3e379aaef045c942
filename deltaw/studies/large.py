"""The studies' full scale: SmolLM2-135M, or a model of the user's, each training an ordinary run (training/run.py).

The new task is the demo's, letters to phonemes, which the base can't do at all. Runs lie in <lab>/large/<hash>; one
that was interrupted is resumed. Several of them on one base (deltaw/sweep) would share the opening of the base and no
more: a step of 1,024 tokens fills a product by itself.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaw.base.forward import Forward, plan_forward
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import open_base
from deltaw.base.source import find_base
from deltaw.config import RunConfig, parse_config
from deltaw.data.dataset import Dataset
from deltaw.data.example import Example
from deltaw.data.opening import open_dataset
from deltaw.data.render import Renderer
from deltaw.evaluation.forgetting import general_text
from deltaw.files.paths import written
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.studies.bench import NEW_TASK, Arm, Bench, Trained
from deltaw.training.run import resume, train

TASK: dict[str, Any] = {
    "base": "builtin:smollm2-135m",
    "data": {"train": "builtin:cmudict", "eval": 1000, "limit": 20000},
    "train": {"keep": 1, "save_every": 1000},
    "evaluate": {"samples": 0, "report": False},
}


GENERAL = "builtin:general"  # evaluate.general's default


class Large(Bench):
    """The runs in a folder. `task`: a run file without what an arm says."""

    stages = (NEW_TASK,)

    def __init__(self, folder: Path, display: Display, task: Mapping[str, Any] = TASK) -> None:
        self.folder, self.display, self.task = folder / "large", display, task

    @cached_property
    def forward(self) -> Forward:
        config = self._config(Arm(), 0).train
        source = find_base(self.task["base"], display=self.display)
        base = open_base(source, dtype=config.dtype, device=config.device, display=self.display)
        return plan_forward(base.model)

    @cached_property
    def weights(self) -> LinearWeights:
        return LinearWeights(find_base(self.task["base"], display=self.display).directory)

    @cached_property
    def _opened(self) -> tuple[Renderer, Dataset]:
        _, renderer, dataset = open_dataset(self._config(Arm(), 0), self.display)
        return renderer, dataset

    def rows(self, stage: str) -> Sequence[Example]:
        return self._opened[1].train

    def held_out(self, stage: str) -> Sequence[Example]:
        return self._opened[1].eval

    @cached_property
    def general(self) -> Sequence[Example]:
        return general_text(GENERAL, self._opened[0])

    def train(self, arm: Arm, seed: int) -> Trained:
        config = self._config(arm, seed)
        run = Run(Path(config.output))
        if not run.result.is_file():
            self.display.say(f"training {arm.words}, seed {seed}")
            if run.config.is_file():
                resume(run.folder, display=self.display)
            else:
                train(config, display=self.display)
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # moments of a full fine-tune: a gigabyte per run
        result = run.read_json(run.result)
        losses, lost = result["eval"], result["forgetting"]
        return Trained(
            loss=float(losses["after"]["loss"]),
            before=float(losses["before"]["loss"]),
            general=float(lost["loss_after"]),
            general_before=float(lost["loss_before"]),
            kl=float(lost["kl"]),
            curve=tuple(line["loss"] for line in run.read_metrics() if "loss" in line),
            folder=str(run.folder),
        )

    def _config(self, arm: Arm, seed: int) -> RunConfig:
        own = {"lr": arm.lr, "steps": arm.steps, "tokens_per_step": arm.tokens, "tokens_per_batch": arm.tokens}
        adapter = arm.adapter if isinstance(arm.adapter, str) else dict(arm.adapter)
        raw = {
            **self.task,
            "adapter": adapter,
            "train": {**own, **self.task["train"], **arm.train, "seed": seed},
            "output": "-",
        }
        digest = hashlib.sha256(json.dumps(parse_config(raw).model_dump(mode="json")).encode()).hexdigest()[:12]
        return parse_config({**raw, "output": written(str(self.folder / digest))})
