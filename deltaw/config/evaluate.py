"""`evaluate:` of a run file: what is measured on the held-out rows besides the loss."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from deltaw.config.strict import Strict
from deltaw.files.paths import PathText

Metric = Literal["exact_match", "phoneme_error_rate"]


class EvaluateConfig(Strict):
    """What is measured on the held-out rows besides the loss."""

    section: ClassVar[str] = "evaluate"
    metrics: tuple[Metric, ...] = ()
    general: PathText | None = Field(
        "builtin:general", description="text on which forgetting is measured; null: not measured"
    )
    max_new_tokens: int = Field(64, ge=1, le=65536)
    samples: int = Field(3, ge=0, le=100)
    report: bool = Field(True, description="write report.html at the end")

    @field_validator("metrics", mode="before")
    @classmethod
    def _metrics(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value
