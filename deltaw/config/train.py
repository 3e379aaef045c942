"""`train:` of a run file: how long, how fast, how much at a time."""

from typing import Literal

from pydantic import Field

from deltaw.config.strict import MANY, Count, PositiveFloat, Seed, Strict

Dtype = Literal["auto", "bfloat16", "float32"]
PLAIN_BATCH = 2048  # tokens: what a batch has where nothing speaks for another size


class TrainConfig(Strict):
    """How long, how fast, how much at a time."""

    epochs: PositiveFloat = Field(1.0, le=1e9)
    steps: Count | None = Field(None, description="stop after this many steps, whatever epochs says")
    lr: PositiveFloat = Field(5e-4, le=1.0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int | None = Field(None, ge=0, le=MANY, description="null: 10, or a tenth of a short run")
    lr_ratio_b: PositiveFloat = Field(1.0, le=1e6, description="LoRA+: learning rate of B divided by that of A")
    weight_decay: float = Field(0.0, ge=0, le=1)
    clip: PositiveFloat = 1.0
    tokens_per_step: Count = 4096
    tokens_per_batch: Count | Literal["auto"] = Field(
        "auto", description="tokens in one forward and backward; bounds the memory. auto: 2048, on a GPU what fits it"
    )
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: str = "auto"
    eval_every: Count | None = None
    sample_every: Count | None = None
    save_every: Count = 100
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
