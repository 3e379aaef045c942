"""The process in which a reward is computed. process.py starts it, nothing imports it.

One JSON value per line. First comes what to open, {kind, parent, …}; the answer is {ready: true}, or {error, fix} and
the end. Then, again and again: a number n, and n questions. All are read before the first is answered: else each side
could wait for the other to read. An answer is one of

    {value, parts}               the number, and those that it is made of
    {wrong}                      what was given instead of a number, in words
    {raised, where, trace}       why it failed, in which line, and the last lines before that

stdin and stdout are kept for this: whatever the code prints goes to stderr, also what C code writes, and it reads from
/dev/null. It ends with its parent, however that ends: by the end of its input, and by the kernel (PR_SET_PDEATHSIG)
while it computes.

What isn't the user's own code (a pattern, a package's scorer that meets whatever a model writes) is shut in as chat
templates and models' programs are (files/bounded_worker.py, files/program_worker.py).
"""

import contextlib
import ctypes
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.errors import InputError
from deltaw.files.bounded_worker import lock_down, lower
from deltaw.files.own_code import Code, as_number, reason
from deltaw.files.program_worker import refuse_calls

MB = 2**20
SHUT_IN = 512 * MB  # bytes beyond what the interpreter takes
TRACED = 2  # lines of a traceback
LARGEST = 1e30  # a reward: its square, and sums of many, must be numbers, too
PR_SET_PDEATHSIG = 1
Score = Callable[[Any], dict[str, Any]]


def function(spec: dict[str, Any]) -> Score:
    """reward(prompt, completion, row) of the user's own file."""
    code = Code(Path(spec["file"]), bytes.fromhex(spec["source"]))
    call = code.function(spec["function"], "reward")
    check_signature(code.file, call)
    bound(spec["memory"] * MB)

    def score(question: Any) -> dict[str, Any]:
        try:
            return valued(call(*question))
        except MemoryError:
            return {"raised": f"it needs more than {spec['memory']:,} MB", "where": str(code.file), "trace": []}
        except (Exception, SystemExit) as error:
            return {"raised": reason(error), "where": code.where(error), "trace": code.traced(error, TRACED)}

    return score


def check_signature(file: Path, call: Callable[..., Any]) -> None:
    """Raises InputError where it can't be called with a prompt, a completion and a row."""
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("", "", {})
    except TypeError as error:
        what = f"{file}: {getattr(call, '__name__', 'it')}{signature} can't be called: {error}"
        raise InputError(what, fix="a reward takes (prompt, completion, row)") from None
    if inspect.iscoroutinefunction(call):
        raise InputError(f"{file}: {call.__name__} is async", fix="write it as a plain function (def)")


def valued(given: Any) -> dict[str, Any]:
    """A number; or numbers by name, of which `reward` is the value, else their sum."""
    if not isinstance(given, dict):
        number = finite(given)
        return {"wrong": shown(given)} if number is None else {"value": number, "parts": {}}
    parts = {name: finite(value) for name, value in given.items()}
    if wrong := next((name for name, value in parts.items() if value is None or not isinstance(name, str)), None):
        return {"wrong": f"{shown(given[wrong])} as {shown(wrong)}"}
    if not parts:
        return {"wrong": "an empty dict"}
    own = {name: value for name, value in parts.items() if value is not None}
    return {"value": own["reward"] if "reward" in own else math.fsum(own.values()), "parts": own}


def finite(value: Any) -> float | None:
    """A reward that can be reckoned with."""
    number = as_number(value)
    return number if number is not None and abs(number) <= LARGEST else None


def shown(value: Any) -> str:
    try:
        return " ".join(repr(value).encode("utf-8", "replace").decode().split())[:60]
    except Exception:  # the user's own object
        return f"a {type(value).__name__}"


def pattern(spec: dict[str, Any]) -> Score:
    """Whether the run's regular expression is found in an answer."""
    rule = re.compile(spec["pattern"])
    shut_in(spec["parent"])
    found = rule.fullmatch if spec["whole"] else rule.search
    return lambda text: {"value": float(found(text) is not None), "parts": {}}


def gym(spec: dict[str, Any]) -> Score:
    """The scorers of the tasks of which `samples` has an entry each."""
    from deltaw.data.gym_worker import scorer_of

    scorers = {}
    for task, answer, entry in spec["samples"]:
        scorers[task] = scorer_of(task)
        try:
            scorers[task](answer, entry)  # what it imports only when it is needed must be there before it is shut in
        except Exception as error:
            raise InputError(f"reasoning-gym can't score {task}'s own answer: {reason(error)}") from None
    shut_in(spec["parent"])

    def score(question: Any) -> dict[str, Any]:
        task, text, entry = question
        if text is None:
            return {"value": 0.0, "parts": {"unreadable": 0.0}}
        try:
            value = finite(scorers[task](text, entry))
        except Exception:
            return {"value": 0.0, "parts": {"unreadable": 1.0}}
        if value is None or not 0 <= value <= 1:
            return {"wrong": str(value)}
        return {"value": value, "parts": {"unreadable": 0.0}}

    return score


OPENERS: dict[str, Callable[[dict[str, Any]], Score]] = {
    "function": function,
    "pattern": pattern,
    "reasoning_gym": gym,
}


def bound(memory: int) -> None:
    """Let no more be taken than this beyond what is taken now."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        pages = int(file.read().split()[5])  # data and stack
        lower(resource.RLIMIT_DATA, pages * resource.getpagesize() + memory)


def shut_in(parent: int) -> None:
    lock_down(SHUT_IN)
    end_with(parent)  # once more: who becomes nobody isn't told any more
    with contextlib.suppress(OSError):  # no such filter here: what lock_down took away is away
        refuse_calls()


def end_with(parent: int) -> None:
    """Be killed when the parent is."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has gone already
        os._exit(1)


def apart() -> tuple[BinaryIO, BinaryIO]:
    """The pipes, out of reach of whatever reads stdin or writes to stdout."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return questions, answers


def main() -> None:
    questions, answers = apart()

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    spec = json.loads(questions.readline())
    end_with(spec["parent"])
    try:
        score = OPENERS[spec["kind"]](spec)
    except InputError as error:
        tell({"error": error.what, "fix": error.fix})
        return
    tell({"ready": True})
    while count := questions.readline():
        for question in [json.loads(questions.readline()) for _ in range(int(count))]:
            tell(score(question))
    sys.stderr.flush()
