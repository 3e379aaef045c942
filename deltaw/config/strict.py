"""What every section of a run file is: frozen, strict values."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltaw.errors import InputError

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MANY, SEEDS = 10**12, 2**63  # more than any run counts; what generators take
Count = Annotated[int, Field(ge=1, le=MANY)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


class Strict(BaseModel):
    """Frozen; unknown keys refused; no silent conversion ("4" is not 4, true is not 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """The value, or an InputError that names every wrong field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            problems = [(e, e["msg"].removeprefix("Value error, ")) for e in error.errors()]
            lines = [f"{e['loc'][0]}: {words} (got {e['input']!r:.60})" for e, words in problems]
            raise InputError("; ".join(lines)) from None


def default_of(section: Strict, name: str) -> Any:
    return type(section).model_fields[name].default
