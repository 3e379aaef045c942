"""docs/reliability.md, from what a whole run of the list printed."""

import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from tests.faults.fault import SEEN, Fault, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = """# What it survives

`make torture` makes every one of these faults happen, the given number of times, and writes this page
({minutes:.0f} minutes on {cores} cores of a machine of type {machine}). A try passes if deltaw does what the row says:
nothing is lost, the adapter is the same to the bit, or there is an error of at most five lines before work is wasted.
`make test` runs a sample of the same checks. To repeat one try: `python -m tests.faults --only 7 --try 12`; to run some
of them whole and put their figures here: `python -m tests.faults --only 55,56 --record`.

The last column says what other tools did when the same thing happened to them in the same run
({versions}); it is empty where nothing
was tried, or where they have no counterpart.

| | fault, and what is expected | passed / tries | other tools |
|---|---|---|---|
"""


def write_page(
    faults: Sequence[Fault], outcomes: Mapping[str, Outcome], said: Mapping[int, str], seconds: float
) -> Path:
    """Write the page; one row per check, the others' behaviour beside the first check of a fault."""
    import os

    head = HEAD.format(
        minutes=seconds / 60, cores=os.cpu_count(), machine=platform.machine(), versions=", ".join(_versions())
    )
    PAGE.write_text(head + "\n".join(_rows(faults, outcomes, said)) + "\n", encoding="utf-8")
    return PAGE


def update_page(faults: Sequence[Fault], outcomes: Mapping[str, Outcome], said: Mapping[int, str]) -> Path:
    """Put the rows of these faults in the place of those that the page has."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("|---")) + 1
    numbers = {known.number for known in faults}
    rows = [line for line in lines[first:] if _number(line) not in numbers] + _rows(faults, outcomes, said)
    PAGE.write_text("\n".join([*lines[:first], *sorted(rows, key=_number)]) + "\n", encoding="utf-8")
    return PAGE


def _number(row: str) -> int:
    return int(row.split("|")[1])


def _rows(faults: Sequence[Fault], outcomes: Mapping[str, Outcome], said: Mapping[int, str]) -> list[str]:
    rows = []
    for number, checks in groupby(faults, key=lambda known: known.number):
        others = [f"{seen.tool}: {said[n]}" for n, seen in enumerate(SEEN) if seen.number == number and n in said]
        for first, known in enumerate(checks):
            beside = "; ".join(others) if first == 0 else ""
            figure = f"{outcomes[known.name].passed:,} / {known.tries:,}"
            rows.append(f"| {number} | {known.title} | {figure} | {beside} |".replace("\n", " "))
    return rows


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("peft", "transformers", "trl", "datasets"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
