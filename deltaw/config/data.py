"""`data:` of a run file: where the rows are and how they become tokens and masks."""

import re
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from deltaw.config.sources import HeldOut, Sources, SourceValue, sources_of
from deltaw.config.strict import MANY, Count, Seed, Strict
from deltaw.files.encoding import is_encoding
from deltaw.files.paths import PathText

ColumnName = Literal[
    "messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input", "output",
    "response", "text", "system", "context", "history", "tools", "chosen", "rejected", "label",
]  # fmt: skip


def apart(columns: dict[Any, str]) -> dict[Any, str]:
    """The same. Raises ValueError where a column is to be two things, of which it could only be one."""
    known = {name: " ".join(column.casefold().split()) for name, column in columns.items()}
    first = {column: name for name, column in reversed(known.items())}
    if twice := next((name for name, column in known.items() if first[column] != name), None):
        raise ValueError(
            f"{first[known[twice]]} and {twice} are both {columns[twice]!r:.80}, and a column is one thing"
        )
    return columns


class DataConfig(Strict):
    """Where the rows are and how they become tokens and masks."""

    section: ClassVar[str] = "data"
    train: Sources = Field(description="a source, a list of sources (each may have a weight), or a list of rows")
    eval: HeldOut = Field(
        None, description="rows held out of train: how many, or which share (0.1); or sources of their own"
    )
    form: Literal["auto", "text", "chat", "completion", "alpaca", "sharegpt"] = "auto"
    encoding: str = Field("utf-8", description="of text files: utf-8, cp1252, gb18030, utf-16, …")
    columns: Annotated[dict[ColumnName, str], AfterValidator(apart)] = Field(
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

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        if not is_encoding(value):
            raise ValueError("isn't an encoding of text; known: utf-8, cp1252, latin-1, gb18030, shift_jis, utf-16, …")
        return value

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
        kinds = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".md")
        packed = re.compile(r"\.(gz|zst|bz2|xz)$")
        return all(packed.sub("", source.path.lower()).endswith(kinds) for source in sources_of(self.train))

    @property
    def eval_sources(self) -> SourceValue | None:
        """Where the held-out rows are, if they aren't a part of `train`."""
        return self.eval if isinstance(self.eval, str | tuple) else None

    def held_out_of(self, rows: int) -> int:
        """How many of `rows` rows of `train` are held out. A share is of what is used, and one row at least."""
        if isinstance(self.eval, float):
            return max(1, int(Fraction(repr(self.eval)) * min(rows, self.limit or rows)))
        return self.eval if isinstance(self.eval, int) else 0
