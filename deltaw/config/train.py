"""`train:` of a run file: how long, how fast, how much at a time."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from deltaw.config.retain import RetainSection
from deltaw.config.strict import MANY, Count, PositiveFloat, Seed, Strict

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Checkpointing = Literal["auto", "none", "blocks", "offload"]
PLAIN_BATCH = 2048  # tokens: what a batch has where nothing speaks for another size

Logger = Literal["tensorboard", "wandb"]


class TrainConfig(Strict):
    """How long, how fast, how much at a time."""

    section: ClassVar[str] = "train"
    epochs: PositiveFloat = Field(1.0, le=1e9)
    steps: Count | None = Field(None, description="stop after this many steps, whatever epochs says")
    lr: PositiveFloat = Field(5e-4, le=1.0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int | None = Field(None, ge=0, le=MANY, description="null: 10, or a tenth of a short run")
    lr_ratio_b: PositiveFloat = Field(1.0, le=1e6, description="LoRA+: learning rate of B divided by that of A")
    weight_decay: float = Field(0.0, ge=0, le=1)
    clip: PositiveFloat = 1.0
    tokens_per_step: Count | None = Field(
        None, description="null: 4,096, and less where the data is small (training/length.py); a run's own file has it"
    )
    tokens_per_batch: Count | Literal["auto"] = Field(
        "auto", description="tokens in one forward and backward; bounds the memory. auto: 2048, on a GPU what fits it"
    )
    checkpointing: Checkpointing = Field(
        "auto",
        description="blocks: layers run again in the backward; offload: from inputs in the machine's memory. "
        "auto: where memory is short",
    )
    retain: RetainSection = Field(
        None, description="general text on which it is held to the base, so that it forgets less"
    )
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: str = "auto"
    shard: Literal["auto", "never", "always"] = Field(
        "auto", description="whether each of several processes keeps a part of the base; auto: where it doesn't fit"
    )
    eval_every: Count | None = None
    patience: Count | None = Field(
        None, description="stop after so many evaluations in a row that aren't the best so far"
    )
    sample_every: Count | None = None
    save_every: Count = 100
    log_to: tuple[Logger, ...] = Field((), description="programs that are given each step's figures, too")
    keep: Count = Field(2, description="checkpoints kept besides the best")
    skip_nonfinite: int = Field(
        0, ge=0, le=MANY, description="steps with a NaN that may be skipped before the run stops"
    )
    skip_spikes: float | None = Field(
        None, gt=1, allow_inf_nan=False, description="skip steps whose loss is this many times the recent median"
    )

    @property
    def batch_tokens(self) -> int:
        """`tokens_per_batch` as a number: a run has one when it begins (training/batch_size.py)."""
        return PLAIN_BATCH if self.tokens_per_batch == "auto" else self.tokens_per_batch

    @property
    def step_tokens(self) -> int:
        """Tokens of a step. Only where the data has settled it, as it has in every run that is open."""
        assert self.tokens_per_step is not None, "train.tokens_per_step isn't settled yet"
        return self.tokens_per_step

    @field_validator("log_to", mode="before")
    @classmethod
    def _log_to(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return tuple(dict.fromkeys(names)) if isinstance(names, list) and all(map(_is_text, names)) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
