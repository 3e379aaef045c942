"""What a row itself says is right: the answer that it was written with, or a field that the run names.

    against: field     that field's text or number; of a list of them, any
    otherwise          the row's answer: its last assistant message, or the first of `ANSWERS` that says something

Names are looked up as the forms look them up (data/columns.py): without capitals, and as `data.columns` maps them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.data.columns import Columns
from deltaw.data.document import parsed
from deltaw.data.prompts import asked
from deltaw.data.row import Row
from deltaw.errors import Rejected

ANSWERS = (
    "completion", "answer", "response", "output", "target", "chosen", "ideal", "label", "solution", "ground_truth",
    "reference",
)  # fmt: skip
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value"), "chosen": ("role", "content")}
ASSISTANTS = ("assistant", "gpt")


@dataclass(frozen=True)
class Truths:
    """How the truth of a row is found."""

    columns: Columns = field(default_factory=Columns)

    def of(self, row: Row, against: str | None) -> tuple[str, ...]:
        """All that would be right. Raises Rejected where the row says nothing."""
        if against is None:
            if (own := self.answer(row)) is None:
                raise Rejected("it has no answer of its own to compare with; a field that has it: against: …")
            return own
        value = self.field(row, against)
        texts = tuple(as_text(one) for one in (value if isinstance(value, list) else [value]))
        right = tuple(text for text in texts if text is not None and text.strip())
        if not right or len(right) < len(texts):
            raise Rejected(f"its {against} is {'empty' if value in ('', [], None) else 'not a text or a number'}")
        return right

    def answer(self, row: Row) -> tuple[str, ...] | None:
        """The row's own answer, or any of several; None where it has none."""
        names = self.columns.of(row.value)
        for name, (role, content) in TURNS.items():
            turns = row.value.get(names.get(name, name))
            if isinstance(turns, str) and name != "chosen":
                turns = _turns(turns, name)
            if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
                last = turns[-1]
                text = as_text(last.get(content)) if last.get(role) in ASSISTANTS else None
                if text is not None and text.strip():
                    return (text,)
        for name in ANSWERS:
            value = row.value.get(names.get(name, name))
            texts = [as_text(one) for one in (value if isinstance(value, list) else [value])]
            if texts and all(text is not None and text.strip() for text in texts):
                return tuple(text for text in texts if text is not None)
        return None

    def field(self, row: Row, name: str) -> Any:
        """A field by its name; by names with dots between, what lies inside. Raises Rejected."""
        names = self.columns.of(row.value)
        if name in row.value or name in names:
            return row.value[name if name in row.value else names[name]]
        value: Any = row.value
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise Rejected(f"it has no field {name}: it has {', '.join(map(str, row.value))}")
            value = value[part]
        return value

    def prompt(self, row: Row) -> str | list[dict[str, Any]]:
        """What the row asks, for a call before anything was asked; empty where that can't be told."""
        names = self.columns.of(row.value)
        one = asked(Row({name: row.value[column] for name, column in names.items()}, row.origin))
        return one.prompt if isinstance(one.prompt, str) else [*one.prompt]


def as_text(value: Any) -> str | None:
    """A text, or a number or a truth value as JSON writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else None


def _turns(text: str, name: str) -> Any:
    try:
        return parsed(text, name)
    except Rejected:
        return None
