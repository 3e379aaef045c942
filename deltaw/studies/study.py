"""A study: a published claim about LoRA, put to the test on this machine, and the verdict of a rule.

A `Rule` is a value: the claim as the paper states it, what is measured, the criteria with their margins, the seeds, and
every number that the runs take (`design`). It is committed before the runs, and its hash goes into each result: a
result of another rule isn't shown as this one's. A rule that was written after a look at such results is marked
`exploratory`; so is its verdict.

    held            every criterion holds (statistics.py)
    did not hold    one of them doesn't
    not settled     an interval reaches over a bound, or a tuned rate lies at its grid's end
    void            the runs can't tell: nothing was learnt, say, or the control failed

`Outcome` is what a study found: an estimate for each criterion, others to be told beside them, pictures, figures. The
verdict is `judge`'s, never the study's.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from deltaw.analysis.page import Block
from deltaw.errors import InputError
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import (
    TESTED_WITH,
    TUNED_WITH,
    Criterion,
    Estimate,
    Finding,
    Tuned,
    Verdict,
    estimate_of,
    together,
)

NAMES: tuple[str, ...] = (
    "rank", "lr10", "where", "phi", "amp", "fullrank", "pretrain", "forget", "intruder", "compress", "bf16",
    "init", "rslora", "plus", "batch", "accum", "merge4", "rl-rank",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What decides, fixed before the runs. `definition`: what is measured, how; `void`: when the runs can't tell;
    `change`: what would change the verdict; `design`: all numbers that the runs take, as JSON has them."""

    name: str
    title: str
    claim: str
    source: str
    definition: str
    criteria: tuple[Criterion, ...]
    void: str
    change: str
    design: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = TESTED_WITH
    tuned_with: int = TUNED_WITH
    exploratory: bool = False

    @property
    def words(self) -> str:
        """The criteria, in words."""
        return "held, if " + ", and ".join(criterion.words for criterion in self.criteria)

    @property
    def hash(self) -> str:
        """12 digits of the sha256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        return {**json.loads(json.dumps(asdict(self))), "hash": self.hash}


@dataclass(frozen=True)
class Outcome:
    """What was found. `estimates` by quantity: those of the rule's criteria, and others beside them. `tuned`: the rates
    that were chosen, by arm; `void`: why the runs can't tell, if they can't; `words`: what a reader should know."""

    estimates: Mapping[str, Estimate]
    blocks: Sequence[Block]
    figures: Mapping[str, Any]
    tuned: Mapping[str, Tuned] = field(default_factory=dict)
    void: str | None = None
    words: str = ""


@dataclass(frozen=True)
class Judgement:
    """The rule applied: its verdict, the finding for each criterion, and why in words."""

    verdict: Verdict
    findings: tuple[Finding, ...]
    because: str


class Study(Protocol):
    """The interface of each file in studies/ that is a study."""

    RULE: Rule

    @staticmethod
    def run(lab: Lab) -> Outcome: ...


def judge(rule: Rule, outcome: Outcome) -> Judgement:
    """Apply a rule. Raises KeyError where the study has no estimate of what its own rule asks about."""
    findings = tuple(c.find(outcome.estimates[c.quantity], len(rule.criteria)) for c in rule.criteria)
    ends = [f"{arm} ({tuned.rate:g})" for arm, tuned in outcome.tuned.items() if not tuned.is_interior]
    verdict = together([finding.verdict for finding in findings])
    pairs = zip(rule.criteria, findings, strict=True)
    reasons = [in_words(criterion, finding) for criterion, finding in pairs if finding.verdict == verdict]
    if ends:
        verdict = "not settled"
        reasons.append(f"the best learning rate lies at the grid's end: {', '.join(ends)}")
    if outcome.void is not None:
        verdict, reasons = "void", [outcome.void]
    because = "; ".join(reasons) + "."
    return Judgement(verdict, findings, f"{because} {outcome.words}".strip())


def judged_again(rule: Rule, record: Mapping[str, Any]) -> Verdict:
    """The verdict that a stored record's own numbers give, if it isn't void."""
    findings = [
        criterion.find(estimate_of(stored["estimate"]), len(rule.criteria))
        for criterion, stored in zip(rule.criteria, record["findings"], strict=True)
    ]
    if not all(tuned["interior"] for tuned in record["tuned"].values()):
        return "not settled"
    return together([finding.verdict for finding in findings])


def in_words(criterion: Criterion, finding: Finding) -> str:
    """quantity 1.02 [0.98, 1.06], where below 1.05 was asked for."""
    low, high = (shown_end(criterion, end) for end in (finding.low, finding.high))
    asked = criterion.words.removeprefix(f"{criterion.quantity} lies ")
    return f"{finding.quantity} is {criterion.shown(finding.value)} [{low}, {high}], and was to lie {asked}"


def shown_end(criterion: Criterion, end: float) -> str:
    """An end of an interval; "?" where nothing is known."""
    return criterion.shown(end) if math.isfinite(end) else "?"


def nothing_learnt(loss: float, before: float, share: float = 0.5) -> str | None:
    """A reason for "void": the worst loss of an arm isn't below this share of the loss before training."""
    if math.isfinite(loss) and loss < share * before:
        return None
    return f"too little was learnt: a held-out loss of {loss:.3f}, and {before:.3f} before training"


def find_study(name: str) -> Any:
    """The module of a study. Raises InputError for an unknown name."""
    if name not in NAMES:
        raise InputError(f"there is no study {name!r}", fix=f"studies: {', '.join(NAMES)}")
    return importlib.import_module(f"deltaw.studies.{name.replace('-', '_')}")
