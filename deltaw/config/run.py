"""The run file: YAML -> frozen, strict values.

Everything a run depends on is in one `RunConfig`, which is saved with the run and never passed into a layer.
Strict means: an unknown key, a wrong type or an impossible number is an error that names the file, the line and the
field, and the nearest name that exists. All problems are reported at once.

A setting that has no effect beside others is well formed, but doesn't do what its writer thinks. A file with
settings that need something more is refused (`without_effect`); those that were switched off elsewhere, as one does to
cut a run short, are named (`switched_off`). Only a value other than the default counts, since a run's own config.yaml
has every default written out; and 0 samples, which is what one gets. Bounds that aren't reached (`data.max_length`,
`train.keep`, …) aren't looked at.

Rejected: dataclasses with hand-written checks (the messages were the larger half).
"""

from typing import Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from deltaw.config.adapter import AdapterSpec
from deltaw.config.data import DataConfig
from deltaw.config.evaluate import EvaluateConfig
from deltaw.config.objective import ObjectiveConfig
from deltaw.config.strict import Strict, default_of
from deltaw.config.train import TrainConfig
from deltaw.files.paths import PathText
from deltaw.files.run_yaml import Dumper

BEGUN = ("before.json", "metrics.jsonl", "checkpoints", "adapter", "result.json")  # beside the config.yaml of a run


# How a base's matrices are kept in memory (base/load.py): in `train.dtype` (auto), or packed; `keep`: in the blocks of
# its own .gguf file.
BaseWeights = Literal["auto", "keep", "bfloat16", "int8", "nf4"]


class RunConfig(Strict):
    """A whole run: `base`, `base_weights`, `adapter`, `data`, `objective`, `train`, `evaluate`, `output`."""

    base: PathText = Field(min_length=1)
    base_weights: BaseWeights = Field("auto", description="how the base's matrices are kept in memory")
    # Not strict about the sections themselves: a mapping makes one, in Python as in a file.
    adapter: AdapterSpec = Field(AdapterSpec(), strict=False)
    data: DataConfig = Field(strict=False)
    objective: ObjectiveConfig = Field(ObjectiveConfig(), strict=False)
    train: TrainConfig = Field(TrainConfig(), strict=False)
    evaluate: EvaluateConfig = Field(EvaluateConfig(), strict=False)
    output: PathText = Field(min_length=1)

    @field_validator("adapter", mode="before")
    @classmethod
    def _full(cls, value: Any) -> Any:
        return {"full": True} if value == "full" else value

    @model_validator(mode="after")
    def _as_the_objective_wants(self) -> "RunConfig":
        """`train.lr`, where it isn't set, is the objective's; and held-out pairs aren't answered, but weighed."""
        if self.objective.lr is not None and "lr" not in self.train.model_fields_set:
            # frozen for everybody else: this is the last that is made of it
            object.__setattr__(self, "train", self.train.model_copy(update={"lr": self.objective.lr}))
        if self.objective.is_preference and "samples" not in self.evaluate.model_fields_set:
            object.__setattr__(self, "evaluate", self.evaluate.model_copy(update={"samples": 0}))
        return self

    @model_validator(mode="after")
    def _all_has_an_effect(self, info: ValidationInfo) -> "RunConfig":
        idle = [] if info.context == BEGUN else self.without_effect()
        if idle:
            raise ValueError("; ".join(idle))
        return self

    def without_effect(self) -> list[str]:
        """Each setting that does nothing, and what it would need."""
        data, train, evaluate = self.data, self.train, self.evaluate
        no_rows = {
            "train.eval_every": train.eval_every is not None,
            "train.sample_every": train.sample_every is not None,
            "train.patience": train.patience is not None,
            "evaluate.metrics": bool(evaluate.metrics),
            "evaluate.samples": evaluate.samples not in (0, default_of(evaluate, "samples")),
        }
        needs = {name: "held-out rows: set data.eval" for name, given in no_rows.items() if given and data.eval is None}
        if train.patience is not None and train.eval_every is None and data.eval is not None:
            needs["train.patience"] = "evaluations on the way: set train.eval_every"
        if self.adapter.full and train.lr_ratio_b != 1:
            needs["train.lr_ratio_b"] = "factors, and adapter: full has none"
        if data.seed and not isinstance(data.eval, int | float) and data.limit is None:
            needs["data.seed"] = "rows to choose from: data.eval as a number or a share, or data.limit"
        if self.objective.is_preference:
            needs |= {
                f"{name} with objective: {self.objective.kind}": "a single answer to a row: leave it out, or set "
                "objective: sft"
                for name, given in {
                    "evaluate.metrics": bool(evaluate.metrics),
                    "evaluate.samples": bool(evaluate.samples),
                    "train.sample_every": train.sample_every is not None,
                    "data.train_on: all": data.train_on == "all",
                    "data.too_long: split": data.too_long == "split",
                }.items()
                if given
            }
        if self.objective.is_rewarded:
            needs |= self._without_rewards()
        if data.split_text and data.reads_no_text_file:
            needs["data.split_text"] = "a .txt file"
        if data.overlap and data.too_long not in ("auto", "split"):
            needs["data.overlap"] = "pieces: set data.too_long: split"
        return [f"{name} does nothing without {what}" for name, what in needs.items()]

    def _without_rewards(self) -> dict[str, str]:
        """What a run on rewards can't take, and why."""
        data, train, evaluate, adapter = self.data, self.train, self.evaluate, self.adapter
        answers = "answers to train on, and grpo trains on what it samples: leave it out"
        wrong = {
            "train.tokens_per_step": (
                train.tokens_per_step is not None,
                "rows that are trained on: set objective.prompts",
            ),
            "train.skip_spikes": (train.skip_spikes is not None, "a loss that says how well it does: leave it out"),
            "data.train_on: all": (data.train_on == "all", answers),
            "data.too_long: split": (data.too_long == "split", answers),
            f"adapter.init: {adapter.init}": (adapter.from_data, f"{answers}, or start from another adapter"),
            "train.retain": (
                train.retain is not None,
                "steps of so many tokens, which grpo hasn't: objective.beta holds it to the base",
            ),
            "adapter.dropout": (
                bool(adapter.dropout),
                "the same model in sampling and in training, which dropout makes two: leave it out",
            ),
            "evaluate.max_new_tokens": (
                "max_new_tokens" in evaluate.model_fields_set
                and evaluate.max_new_tokens != default_of(evaluate, "max_new_tokens"),
                "a length of its own: answers are as long as objective.max_new_tokens says",
            ),
            "objective.beta with adapter.from": (
                bool(self.objective.beta and adapter.start),
                "a reference that is the base alone: merge that adapter first (deltaw merge), and train on that",
            ),
        }
        return {name: f"{what}" for name, (given, what) in wrong.items() if given}

    def notes(self) -> list[str]:
        """What is to be said of the objective, where it isn't the usual one."""
        if self.objective.is_rewarded:
            return [f"objective: {self.objective.words()}; train.lr: {self.train.lr:g}"]
        if not self.objective.is_preference:
            return []
        reference = self.adapter.start or "the base, with the adapter off"
        against = "" if self.objective.kind in ("orpo", "simpo") else f", against {reference}"
        return [f"objective: {self.objective.words()}{against}; train.lr: {self.train.lr:g}"]

    def switched_off(self) -> list[str]:
        """Each setting that others switch off, in words."""
        train, evaluate = self.train, self.evaluate
        answered = self.data.eval is not None and (evaluate.metrics or evaluate.samples)
        lines = []
        if train.steps and train.epochs != default_of(train, "epochs"):
            lines.append(f"train.steps: {train.steps} sets the length, so train.epochs: {train.epochs:g} does nothing")
        if train.sample_every and not evaluate.samples:
            lines.append(f"train.sample_every: {train.sample_every} shows nothing: evaluate.samples is 0")
        if not answered and evaluate.max_new_tokens != default_of(evaluate, "max_new_tokens"):
            lines.append(f"evaluate.max_new_tokens: {evaluate.max_new_tokens} does nothing: no row is answered")
        return lines

    def to_yaml(self) -> str:
        """The resolved run file, every default written out."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
