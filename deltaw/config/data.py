"""`data:` of a run file: where the rows are and how they become tokens and masks."""

from typing import ClassVar, Literal

from pydantic import Field

from deltaw.config.strict import MANY, Count, Seed, Strict
from deltaw.files.paths import PathText


class DataConfig(Strict):
    """Where the rows are and how they become tokens and masks."""

    section: ClassVar[str] = "data"
    train: PathText
    eval: Count | PathText | None = Field(None, description="rows held out of train, or a separate file")
    form: Literal["auto", "text", "chat", "completion", "alpaca", "sharegpt"] = "auto"
    train_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    template: PathText | None = Field(
        None, description="chatml, or a .jinja file, for a base that has no chat template"
    )
    rendered: bool = Field(
        False,
        description="text, prompts and completions already hold control tokens, bos and eos: they are taken as tokens",
    )
    max_length: int = Field(2048, ge=2, le=MANY)
    too_long: Literal["drop", "truncate"] = "drop"
    bad_rows: float = Field(0.01, ge=0, le=1, description="share of rows that may be unusable")
    limit: Count | None = None
    seed: Seed = Field(0, description="seed of the choice of held-out rows")
