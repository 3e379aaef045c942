"""How an adapter came about: what it was trained on, for how long, and the adapter that it started from.

It lies in the adapter's deltaw.json and in the run's result.json, and the card tells it (shipping/card.py). An adapter
is passed on without its run, so all of it is in its own folder, the histories of those before it included. For the
same reason nothing of the machine is in it: a file is named by its last part.
"""

import json
from pathlib import Path
from typing import Any, Optional

from pydantic import BaseModel, ConfigDict, ValidationError

from deltaw.errors import InputError
from deltaw.show.text import counted, one_line

LONGEST = 32  # adapters in a row; a file that names more was made by hand


class History(BaseModel):
    """Of one adapter; what isn't known is empty. `name` and `fingerprint` are those under which a later one found it.

    `extended_after`: the steps after which a finished run was given more.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str = ""
    fingerprint: str = ""
    steps: int | None = None
    tokens: int | None = None
    data: str = ""
    extended_after: tuple[int, ...] = ()
    started_from: Optional["History"] = None

    @property
    def known(self) -> bool:
        """Whether it says anything."""
        return self != NOTHING

    @property
    def line(self) -> list["History"]:
        """This one, the one that it started from, and so on."""
        return [self, *(self.started_from.line if self.started_from else ())]

    def words(self) -> str:
        """One line: the name, and what is known of it."""
        parts = [self.fingerprint[:19]] * bool(self.fingerprint)
        if self.steps is not None:
            on = f" on {one_line(self.data, 60)}" if self.data else ""
            parts.append(counted(self.steps, "step") + on)
        parts += [self.extension] * bool(self.extended_after)
        return (one_line(self.name, 60) or "unnamed") + (f" ({', '.join(parts)})" if parts else "")

    @property
    def extension(self) -> str:
        """In words; empty where it wasn't extended."""
        if not self.extended_after:
            return ""
        return f"extended after step {', then '.join(f'{step:,}' for step in self.extended_after)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return self.model_dump(mode="json")

    @staticmethod
    def of(raw: Any, source: str | Path) -> "History":
        """What `to_json` gave. Raises InputError, naming the source, for anything else."""
        try:
            depth, inner = 0, raw
            while isinstance(inner, dict) and depth <= LONGEST:
                depth, inner = depth + 1, inner.get("started_from")
            if depth > LONGEST:
                raise InputError(f"{source}: its history names more than {LONGEST} adapters in a row")
            return History.model_validate_json(json.dumps(raw))
        except (ValidationError, RecursionError, TypeError) as error:
            where = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ()
            what = ".".join(map(str, where)) or "it"
            raise InputError(f"{source}: its history can't be read: {what} isn't what it should be") from None


NOTHING = History()  # is known
