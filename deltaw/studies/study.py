"""A study: a published claim about LoRA, put to the test on this machine, and a verdict.

The order is fixed: the claim and its source; what is run; the *rule* that decides, in numbers, written before anything
runs; then the data, and the verdict that the rule computes from them. A claim that does not hold is reported as such,
and if the differences are no larger than those between two seeds, the verdict is "too noisy".

Small by default (minutes on two cores); `--full` runs the real grid with three seeds. Either way the trained runs are
ordinary run folders, kept and shared between studies (lab.py), so an interrupted study continues where it stopped.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from deltaw.analysis.page import Block
from deltaw.errors import InputError
from deltaw.studies.lab import Lab

NAMES = (
    "rank", "lr10", "where", "phi", "amp", "fullrank", "pretrain", "forget", "intruder", "compress", "bf16",
)  # fmt: skip
Judgement = Literal["held", "did not hold", "too noisy"]


@dataclass(frozen=True)
class Claim:
    """What is claimed, by whom, how it is tested, and the rule that decides."""

    name: str
    title: str
    claim: str
    source: str
    method: str
    rule: str


@dataclass(frozen=True)
class Outcome:
    """The rule applied to the data: the verdict, its reason in a sentence or two, pictures and tables, the figures."""

    verdict: Judgement
    because: str
    blocks: Sequence[Block]
    figures: dict[str, Any]  # JSON


class Study(Protocol):
    """The interface of each file in studies/."""

    CLAIM: Claim

    @staticmethod
    def run(lab: Lab) -> Outcome: ...


def find_study(name: str) -> Any:
    """The module of a study. Raises InputError for an unknown name."""
    if name not in NAMES:
        raise InputError(f"there is no study {name!r}", fix=f"studies: {', '.join(NAMES)}")
    return importlib.import_module(f"deltaw.studies.{name}")


def majority(count: int, of: int) -> bool | None:
    """Whether `count` of `of` is more than half; None if coins could fall so: within two deviations of √of / 2."""
    return None if abs(count - of / 2) <= of**0.5 else count > of / 2
