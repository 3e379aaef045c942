"""What a reward is asked, and what it says.

`Asked` is an answer with the row that it was asked of; `Scored` its worth: total = Σ weight · value over the run's
rewards. `parts` has each reward's own value, unweighted, by its name; where a function gives several numbers, these
too, as `name.key`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deltaw.data.row import Row
from deltaw.errors import RunError
from deltaw.show.text import one_line


@dataclass(frozen=True)
class Asked:
    """`prompt`: a text, or the messages of a chat. `row`: as it stood in the data; `origin`: where that is."""

    prompt: str | list[dict[str, Any]]
    completion: str
    row: dict[str, Any]
    truncated: bool = False
    origin: str = ""

    @property
    def named(self) -> str:
        """The row, for an error."""
        if self.origin:
            return f"row {self.origin}"
        prompt = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content", ""))
        return f"the row that asks “{one_line(prompt, 40, end=True)}”"


@dataclass(frozen=True)
class Scored:
    """Of one answer."""

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """What one reward gives: its value, and the numbers that it is made of where a function tells them."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """One reward, opened."""

    def check(self, row: Row) -> None:
        """Raises Rejected where the row lacks what its answers are held against."""

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        """Of each answer. Raises RunError that names the row."""

    def close(self) -> None:
        """Let go of its process, if it has one."""


def failed(one: Asked, what: str, fix: str | None = None) -> RunError:
    """The error of an answer that can't be scored."""
    return RunError(f"{what}, on {one.named}", fix=fix)
