"""Few-shot: examples with their answers, in front of what a task asks.

All rows of a task get the same ones, in the same order: then their beginnings are one, which is computed once. They are
the first by a hash of (seed, content), so another seed shows how much hangs on them. A row is never its own example:
rows that are shown aren't asked, and of another file none is shown that asks what a row of the task asks.

    a chat       system, then user and assistant for each, then the row
    plain text   prompt and answer of each, a blank between them where they would meet, and an empty line behind;
                 an answer ends where the next example would begin

That is lm-eval's `num_fewshot`, with `fewshot_as_multiturn` for chats; it draws other examples for each row.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.data.asking import Prompt
from deltaw.data.prepare import digest
from deltaw.data.row import Row
from deltaw.errors import InputError, Rejected
from deltaw.show.text import counted

APART = "\n\n"


@dataclass(frozen=True)
class Shot:
    """An example: what was asked, and the right answer."""

    prompt: Prompt
    answer: str


def asks(prompt: Prompt) -> str:
    """What two prompts have in common that ask the same."""
    return json.dumps(prompt, sort_keys=True)


def chosen(
    rows: Sequence[Row], read: Callable[[Row], Shot], count: int, seed: int, avoided: Collection[str] = ()
) -> tuple[Shot, ...]:
    """So many of the rows, none that asks what is in `avoided`. Raises InputError where there aren't as many."""
    shots: dict[str, Shot] = {}
    asked, refused = 0, ""
    for row in sorted(rows, key=lambda row: digest(row, f"shots {seed}".encode()[-64:])):
        if len(shots) == count:
            break
        try:
            shot = read(row)
        except Rejected as rejected:
            refused = refused or f"; {row.origin} can't be: {rejected}"
            continue
        if (what := asks(shot.prompt)) in avoided:
            asked += 1
        else:
            shots.setdefault(what, shot)
    if len(shots) < count:
        there = counted(len(shots), "row is", "rows are")
        but = f" ({counted(asked, 'more asks', 'more ask')} what the task asks)" if asked else ""
        raise InputError(
            f"shots: {count}, and {there} there to show{but}{refused}",
            fix="lower it, or name other rows: shots_from",
        )
    return tuple(shots.values())


def behind(prompt: Prompt, shots: Sequence[Shot]) -> Prompt:
    """A prompt as it is asked, behind the examples."""
    if isinstance(prompt, str):
        return APART.join([*map(_text, shots), prompt]) if shots else prompt
    start = [message for message in prompt[:1] if message.get("role") == "system"]
    turns = [message for shot in shots for message in _turns(shot)]
    return [*start, *turns, *prompt[len(start) :]]


def _text(shot: Shot) -> str:
    if not isinstance(shot.prompt, str):
        raise InputError("the examples are chats, and it is plain text")
    meets = shot.prompt[-1:].isspace() or shot.answer[:1].isspace()
    return shot.prompt + ("" if meets else " ") + shot.answer


def _turns(shot: Shot) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": shot.prompt}] if isinstance(shot.prompt, str) else list(shot.prompt)
    answer = {"role": "assistant", "content": shot.answer.strip()}
    return [*(message for message in asked if message.get("role") != "system"), answer]
