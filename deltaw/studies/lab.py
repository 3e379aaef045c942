"""The lab: runs the trainings that studies ask for, each once.

Every training is an ordinary run (`training.run.train`) whose run file differs from the lab's task in what the study
varies. Its folder is named by the hash of the resolved config, so studies that want the same run share it, and an
interrupted study continues: finished runs are read, an unfinished one is resumed, the rest are trained.

The task is the demo's: letters to phonemes, which the base can't do at all, so that learning is measured and not a
difference in phrasing. Held-out loss is the measure: task metrics on few rows are too coarse to compare runs.
"""

import hashlib
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaw.adapter.file import Adapter
from deltaw.analysis.measure import Measures, measure_adapter
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.source import find_base
from deltaw.config import RunConfig, parse_config
from deltaw.files.paths import written
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.run import resume, train

BASE = "builtin:smollm2-135m"
SMALL: dict[str, Any] = {
    "base": BASE,
    "adapter": {"rank": 16, "alpha": 32},
    "data": {"train": "builtin:cmudict", "eval": 200, "limit": 3000},
    "train": {"lr": 3e-3, "steps": 48, "tokens_per_step": 512, "tokens_per_batch": 512, "keep": 1, "save_every": 1000},
    "evaluate": {"samples": 0, "report": False},
}
# The grid of the paper's kind: more steps, more held-out rows.
FULL: dict[str, Any] = {
    **SMALL,
    "data": {"train": "builtin:cmudict", "eval": 1000, "limit": 20000},
    "train": {**SMALL["train"], "steps": 300, "tokens_per_step": 1024, "tokens_per_batch": 1024},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of LoRA; full fine-tuning gets a tenth of each
RANKS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Trial:
    """One finished training."""

    run: Run

    @cached_property
    def result(self) -> dict[str, Any]:
        return self.run.read_json(self.run.result)

    @property
    def loss(self) -> float:
        """Held-out cross-entropy after training, nats per token."""
        return float(self.result["eval"]["after"]["loss"])

    @property
    def forgetting(self) -> dict[str, Any]:
        """General text: loss_before, loss_after, kl."""
        return dict(self.result["forgetting"])

    @property
    def training_losses(self) -> list[float]:
        return [line["loss"] for line in self.run.read_metrics() if "loss" in line]

    def adapter(self) -> Adapter:
        """The adapter, read again each time: a full fine-tune's takes half a gigabyte."""
        return Adapter.load(self.run.adapter)


class Lab:
    """Where studies run. `full`: the real grid with three seeds. `task`: a run file in place of the scale's own."""

    def __init__(
        self, folder: Path, display: Display, *, full: bool = False, task: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.display, self.full = folder, display, full
        self.task = task or (FULL if full else SMALL)
        self.seeds = (0, 1, 2) if full else (0,)

    def train(self, name: str, *, seed: int = 0, adapter: Any = None, **changes: Any) -> Trial:
        """Train the task with another `adapter` and `changes` to its train section. `name` is for people."""
        config = self._config(seed, adapter, changes)
        run = Run(Path(config.output))
        if not run.result.is_file():
            self.display.say(f"training {name}")
            if run.config.is_file():
                resume(run.folder, display=self.display)
            else:
                train(config, display=self.display)
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # moments of a full fine-tune: a gigabyte per run
        return Trial(run)

    def sweep(self, adapter: Mapping[str, Any] | str, *, seed: int = 0) -> dict[float, Trial]:
        """Trials by learning rate; `"full"` at a tenth of LoRA's rates."""
        share = 0.1 if adapter == "full" else 1.0
        rates = [float(f"{rate * share:.0e}") for rate in RATES]
        label = "full" if adapter == "full" else " ".join(f"{k} {v}" for k, v in adapter.items())  # type: ignore[union-attr]
        return {
            rate: self.train(f"{label}, lr {rate:g}, seed {seed}", seed=seed, adapter=adapter, lr=rate)
            for rate in rates
        }

    def sweeps(self) -> dict[str, dict[float, Trial]]:
        """`sweep` of every rank ("rank 4") and of "full"."""
        ranks = {f"rank {rank}": self.sweep({"rank": rank, "alpha": 32}) for rank in RANKS}
        return ranks | {"full": self.sweep("full")}

    @cached_property
    def noise(self) -> float:
        """How much held-out losses of one setting vary with the seed alone: the standard deviation at rank 16."""
        losses = [self.train(f"rank 16, seed {seed}", seed=seed).loss for seed in range(3)]
        return statistics.stdev(losses)

    def tie(self, one: float, other: float) -> bool:
        """Whether two held-out losses differ by no more than seeds do: within twice the noise of a difference."""
        return abs(one - other) <= self.margin()

    def margin(self, seeds: int = 1) -> float:
        """How far seeds move a difference of two held-out losses, each a mean over `seeds`: twice its deviation."""
        return 2 * 2**0.5 * self.noise / seeds**0.5

    @cached_property
    def weights(self) -> LinearWeights:
        """The base's W by module path."""
        return LinearWeights(find_base(self.task["base"], display=self.display).directory)

    def measured(self, name: str, adapter: Adapter) -> dict[str, Measures]:
        """Every module of an adapter, measured against the base's weights."""
        with self.display.task(f"measuring {name}", len(adapter.factors)) as progress:
            return measure_adapter(adapter, self.weights, progress=progress)

    def _config(self, seed: int, adapter: Any, changes: Mapping[str, Any]) -> RunConfig:
        raw = {
            **self.task,
            "adapter": self.task["adapter"] if adapter is None else adapter,
            "train": {**self.task["train"], "seed": seed, **changes},
            "output": "-",
        }
        digest = hashlib.sha256(json.dumps(parse_config(raw).model_dump(mode="json")).encode()).hexdigest()[:12]
        return parse_config({**raw, "output": written(str(self.folder / "trials" / digest))})


def best(trials: Mapping[float, Trial]) -> tuple[float, Trial]:
    """(rate, trial) of the lowest held-out loss."""
    rate = min(trials, key=lambda rate: trials[rate].loss)
    return rate, trials[rate]
