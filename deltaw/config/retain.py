"""`train.retain` of a run file: general text on which the model is held to what its base says, so that it forgets less.

`retain: builtin:general-train` is short for a section with that text alone.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from deltaw.config.strict import PositiveFloat, Strict
from deltaw.files.paths import PathText


class RetainConfig(Strict):
    """KL(base ‖ tuned) on general text, added to each step's loss."""

    section: ClassVar[str] = "train.retain"
    data: PathText = Field("builtin:general-train", min_length=1, description="the text, in any form of data")
    weight: PositiveFloat = Field(
        1.0, le=1e6, description="what a nat per token of KL counts beside one of the task's loss"
    )
    share: float = Field(0.1, ge=0.001, le=1.0, description="tokens of it in a step, as a share of the task's")


def _section(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


RetainSection = Annotated[Annotated[RetainConfig, Field(strict=False)] | None, BeforeValidator(_section)]
