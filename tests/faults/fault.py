"""A fault and what is expected of it, defined once: `make test` runs a sample of its tries, `make torture` all of them.

    @fault(7, "one bit of the newest checkpoint flipped", tries=1000, sample=8)
    def bit_flip(n: int, scratch: Path) -> None: ...      # raises where try n shows anything but what is expected

A try is a pure function of its number, so one that failed can be run again: `python -m tests.faults --only 7 --try 12`.
`scratch` is an empty folder, shared by the tries of one chunk. What every try needs (a tiny base, a run to damage) is
made once per process by the cached functions of `common.py`.

    @peer(7, "Trainer")
    def trainer_bit_flip(scratch: Path) -> str: ...       # does the same to another tool, says in a few words what came

Numbers and expectations are those of the list of faults that the project set out to survive; docs/reliability.md, which
`make torture` writes, has them all.
"""

import importlib
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOMS = (  # those of the server last
    *("crash", "storage", "damage", "resume", "numerics", "memory", "files", "fuzz", "templates", "data", "masks"),
    *("requests", "clients", "replaced", "restart"),
)
PEERS = ("benchmarks.peers.adapters",)


@dataclass(frozen=True)
class Fault:
    """One kind of trouble. `at_once`: tries handed to a worker together; `preload`: needs shim.c's library."""

    number: int
    title: str
    check: Callable[[int, Path], None]
    tries: int
    sample: int
    at_once: int
    preload: bool

    @property
    def name(self) -> str:
        return self.check.__name__


@dataclass(frozen=True)
class Peer:
    """What another tool does when the same happens to it."""

    number: int
    tool: str
    look: Callable[[Path], str]


@dataclass
class Outcome:
    """What came of some tries of one fault."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)  # "try 12: …"
    seconds: float = 0.0


FAULTS: list[Fault] = []
SEEN: list[Peer] = []


def fault(
    number: int, title: str, *, tries: int = 1, sample: int = 1, at_once: int = 1, preload: bool = False
) -> Callable[[Callable[[int, Path], None]], Callable[[int, Path], None]]:
    """Register a check. `tries`: how many `make torture` makes; `sample`: how many `make test` makes."""

    def register(check: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
        FAULTS.append(Fault(number, title, check, tries, min(sample, tries), at_once, preload))
        return check

    return register


def peer(number: int, tool: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Register what another tool is put through."""

    def register(look: Callable[[Path], str]) -> Callable[[Path], str]:
        SEEN.append(Peer(number, tool, look))
        return look

    return register


def load_faults(peers: bool = False) -> list[Fault]:
    """Import every room that registers faults; in the order of their numbers."""
    for module in [*(f"tests.faults.{name}" for name in ROOMS), *(PEERS if peers else ())]:
        importlib.import_module(module)
    return sorted(FAULTS, key=lambda known: known.number)


def run_tries(known: Fault, tries: range) -> Outcome:
    """Tries in this process, in a scratch folder of their own."""
    outcome, began = Outcome(), time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f"fault-{known.number}-"))
    try:
        for n in tries:
            try:
                known.check(n, scratch)
                outcome.passed += 1
            except BaseException as error:  # a SystemExit is a failure like any other
                if isinstance(error, KeyboardInterrupt):
                    raise
                said = str(error).splitlines()
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = (
                    f"{type(error).__name__}: {said[0] if said else ''} ({Path(where.filename).name}:{where.lineno})"
                )
                outcome.failures.append(f"try {n}: {reason}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    outcome.seconds = time.monotonic() - began
    return outcome


def expect(condition: object, said: object) -> None:
    """An assertion that stays one under `python -O` and says what it saw."""
    if not condition:
        raise AssertionError(f"{said}")
