"""The only place that meets the package reasoning-gym: makes a task's entries, and finds a task's scorer.

It runs in processes of their own (data/gym.py, rewards/worker.py), never in deltaw's.
"""

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from typing import Any

from deltaw.errors import InputError

INSTALL = "pip install 'deltaw[reasoning]'"
MADE_OF_OTHERS = ("composite",)  # its options are other tasks, and its scorer hangs on them
TUPLES = ("arc_agi", "rearc")  # their scorers compare with tuples, which JSON writes as lists
APART = 1_000_000  # the package draws entry i of a seed from seed + i: the next seed would give the same but one
Scorer = Callable[[str, dict[str, Any]], Any]


def scorer_of(task: str) -> Scorer:
    """What scores an answer to an entry. Raises InputError."""
    kind, config = _task(task)
    score: Scorer = kind(config=config()).score_answer
    return (lambda answer, entry: score(answer, _as_tuples(entry))) if task in TUPLES else score


def entries_of(task: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    """Raises InputError."""
    kind, config = _task(task)
    known = [field.name for field in dataclasses.fields(config)]
    if wrong := [name for name in options if name not in known]:
        near = difflib.get_close_matches(wrong[0], known, n=1)
        has = ", ".join(name for name in known if name not in ("size", "seed"))
        raise InputError(f"no option {wrong[0]!r:.40}", fix=f"did you mean {near[0]}?" if near else f"it has {has}")
    try:
        settings = config(size=size, seed=seed * APART, **options)
        if hasattr(settings, "validate"):
            settings.validate()
        return kind(config=settings)
    except Exception as error:  # the package's own checks: assertions, and what Python says of a text for a number
        raise InputError(f"{type(error).__name__}: {error}".rstrip(": "), fix="set its options otherwise") from None


def _task(name: str) -> Any:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(f"this needs the package reasoning-gym ({error})", fix=INSTALL) from None
    if name not in DATASETS or name in MADE_OF_OTHERS:
        known = [task for task in DATASETS if task not in MADE_OF_OTHERS]
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=3)
        some = "chain_sum, letter_counting, spell_backward, gsm_symbolic, …"
        fix = f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, such as {some}"
        raise InputError(f"no task {name!r:.40} in reasoning-gym", fix=fix)
    return DATASETS[name]


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_tuples(one) for name, one in value.items()}
    return tuple(_as_tuples(one) for one in value) if isinstance(value, list) else value


def main(wanted: str) -> None:
    """Each entry as a line of JSON, then {"error": …} or {}."""
    out, sys.stdout = sys.stdout, sys.stderr
    request = json.loads(wanted)
    try:
        entries = entries_of(request["task"], request["size"], request["seed"], request["options"])
        for number in range(request["size"]):
            out.write(json.dumps(entries[number]) + "\n")
        end = {}
    except InputError as error:
        end = {"error": error.what, "fix": error.fix}
    out.write(json.dumps(end) + "\n")
