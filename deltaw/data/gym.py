"""`reasoning-gym:TASK`: rows of one of the procedural tasks of the package reasoning-gym, made when they are read.

    reasoning-gym:chain_sum                                   1,000 rows of seed 0
    reasoning-gym:chain_sum:size=500,seed=7,max_terms=3       how many, which, and the task's own options

A row is an entry of the package: `question`, `answer` and `metadata`, which its scorer needs (rewards/gym.py). Entry i
of a seed is the same whatever the size, and another seed gives others (the package's own seeds don't: its seed 2 is its
seed 1 from the second entry on, so ours are a million apart); so train and held-out rows differ by seed:

    data: {train: "reasoning-gym:chain_sum:size=2000,seed=1", eval: "reasoning-gym:chain_sum:size=100,seed=2"}

They are made in a process of their own (gym_worker.py): six of the tasks hang on the order of Python's sets, which is
fixed there, so that a run that is resumed has the rows that it had; and the package with all that it imports stays out
of this one. Small tasks repeat themselves: a row whose question has come before is left out, and how many were is said.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.data.row import Item, Note, Row
from deltaw.errors import InputError
from deltaw.show.text import counted

PREFIX = "reasoning-gym:"
SIZE, SEED = 1000, 0
LATE = 900.0  # seconds
MOST, LAST_SEED = 1_000_000, 4_000  # a million entries of each, within the 32 bits that NumPy takes
START = "import sys; sys.path.insert(0, sys.argv[1]); from deltaw.data.gym_worker import main; main(sys.argv[2])"
NEXT = re.compile(r",(?=\w+=)")


def read_gym(name: str) -> Iterator[Item]:
    """The rows of `reasoning-gym:name`. Raises InputError for a task, an option or a package that isn't there."""
    task, _, given = name.partition(":")
    options = {"size": SIZE, "seed": SEED, **_options(given, name)}
    size, seed = options.pop("size"), options.pop("seed")
    for word, value, least, most in (("size", size, 1, MOST), ("seed", seed, 0, LAST_SEED)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(f"{PREFIX}{name}: {word}={value} must be a whole number from {least} to {most:,}")
    before: set[str] = set()
    for number, entry in enumerate(_entries(name, {"task": task, "size": size, "seed": seed, "options": options}), 1):
        if entry["question"] not in before:
            before.add(entry["question"])
            yield Row(entry, f"{task}/seed-{seed}:{number}")
    if len(before) < size:
        yield Note(
            f"{PREFIX}{name}: {counted(size - len(before), 'row')} of {size:,} left out that ask what another does"
        )


def _options(text: str, name: str) -> dict[str, Any]:
    options = {}
    for part in NEXT.split(text) if text else []:
        word, equals, value = part.partition("=")
        if not equals or not word.isidentifier():
            raise InputError(
                f"{PREFIX}{name}: {part!r:.40} isn't option=value", fix=f"write {PREFIX}TASK:size=500,seed=7"
            )
        try:
            options[word] = json.loads(value)
        except ValueError:
            options[word] = value
    return options


def _entries(name: str, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-P", "-W", "ignore", "-c", START, str(Path(__file__).parents[2]), json.dumps(wanted)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LATE,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{PREFIX}{name}: its rows take more than {LATE:g} s to make", fix="set a smaller size"
        ) from None
    *lines, last = done.stdout.splitlines() or [b""]
    end = json.loads(last) if last.startswith(b"{") else {"error": _complaint(done.stderr)}
    if end.get("error"):
        raise InputError(f"{PREFIX}{name}: {end['error']}", fix=end.get("fix"))
    yield from map(json.loads, lines)


def _complaint(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"its rows can't be made: {lines[-1] if lines else 'the process ended without a word'}"
