"""What every section of a run file is: frozen, strict values.

Made in Python (`AdapterSpec(rank=8)`), a value that is refused raises deltaw's own error, with a line and a hint for
each wrong field, like a run file's. pydantic, which calls `__init__` only where a user does, is told that this one is
as good as its own (`__pydantic_base_init__`): else it would also call it for every section of a file and lose the
places of what is wrong there.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltaw.config.problems import refusal
from deltaw.errors import InputError

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MANY, SEEDS = 10**12, 2**63  # more than any run counts; what generators take
Count = Annotated[int, Field(ge=1, le=MANY)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


def one_or_several(value: Any) -> Any:
    """A list's values as a tuple, and a single text as the only one."""
    value = [value] if isinstance(value, str) else value
    return tuple(value) if isinstance(value, list) else value


class Strict(BaseModel):
    """Frozen; unknown keys refused; no silent conversion ("4" is not 4, true is not 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, serialize_by_alias=True)
    section: ClassVar[str] = ""  # where it stands in the run file

    def __init__(self, /, **fields: Any) -> None:
        """Raises InputError that names every wrong field."""
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(refusal(error, type(self), type(self).__name__, section=self.section)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """The value, or an InputError that names every wrong field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = [(e, e["msg"].removeprefix("Value error, ")) for e in error.errors()]
            lines = [f"{e['loc'][0]}: {words} (got {e['input']!r:.60})" for e, words in problems]
            raise InputError("; ".join(lines)) from None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What differs from the defaults: the shortest call that makes the same value."""
        return [(name, value) for name, value in super().__repr_args__() if value != default_of(self, str(name))]


def default_of(section: Strict, name: str) -> Any:
    return type(section).model_fields[name].default
