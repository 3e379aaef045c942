"""`data:` of a run file: where the rows are and how they become tokens and masks."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from deltaw.config.strict import MANY, Count, Seed, Strict
from deltaw.files.paths import PathText

ColumnName = Literal[
    "messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input", "output",
    "response", "text", "system", "context", "history", "tools",
]  # fmt: skip


class DataConfig(Strict):
    """Where the rows are and how they become tokens and masks."""

    section: ClassVar[str] = "data"
    train: PathText
    eval: Count | PathText | None = Field(None, description="rows held out of train, or a separate file")
    form: Literal["auto", "text", "chat", "completion", "alpaca", "sharegpt"] = "auto"
    columns: dict[ColumnName, str] = Field(
        {}, description="what your columns are called, as in {prompt: question, completion: answer}"
    )
    join: str | None = Field(
        None,
        description="put between prompt and completion, which then aren't rendered as a chat; null: nothing between "
        "columns of these names, a line break between others that meet without a blank",
    )
    train_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    template: PathText | None = Field(
        None, description="chatml, or a .jinja file, for a base that has no chat template"
    )
    rendered: bool = Field(
        False,
        description="text, prompts and completions already hold control tokens, bos and eos: they are taken as tokens",
    )
    split_text: Literal["blank_lines", "lines"] | None = Field(
        None, description="what separates the documents in a .txt file; null: the whole file is one"
    )
    max_length: int = Field(2048, ge=2, le=MANY)
    too_long: Literal["auto", "split", "drop", "truncate"] = Field(
        "auto", description="what becomes of rows longer than max_length; auto: texts are split, others dropped"
    )
    overlap: int = Field(
        0, ge=0, le=MANY, description="tokens of the text before that a piece shows again, without training on them"
    )
    bad_rows: float = Field(0.01, ge=0, le=1, description="share of rows that may be unusable")
    limit: Count | None = None
    seed: Seed = Field(0, description="seed of the choice of held-out rows")

    @model_validator(mode="after")
    def _pieces_are_mostly_new(self) -> Self:
        if self.overlap and self.overlap > self.max_length // 2:
            raise ValueError(
                f"overlap {self.overlap:,} is more than half of max_length {self.max_length:,}: set it lower"
            )
        return self

    @property
    def reads_no_text_file(self) -> bool:
        """Whether `train` is by its name a file of another kind than .txt."""
        kinds = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".md")
        return isinstance(self.train, str) and self.train.lower().endswith(kinds)
