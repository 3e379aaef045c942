"""Writes a study's outcome: the verdict, the rule, power, data and pictures as a page, and the record as JSON.

The JSON has the rule whole, with its hash: whoever shows a record can tell whether the rule that stands in the code
now is the one that it was judged by. Numbers that aren't finite (the end of an interval that nothing bounds) are null.
"""

import json
import math
from typing import Any

from deltaw.analysis.page import Block, Cell, Page, Section, Table, Verdict, write
from deltaw.files.atomic import write_text_atomic
from deltaw.show.text import clock
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import ALPHA, Criterion, Estimate
from deltaw.studies.study import Judgement, Outcome, Rule, judge, shown_end


def write_outcome(rule: Rule, outcome: Outcome, lab: Lab, seconds: float) -> dict[str, Any]:
    """Write the page and the JSON; returns the latter."""
    judgement = judge(rule, outcome)
    scale = "SmolLM2-135M" if lab.full else "the tiny Llama"
    subtitle = f"{scale}, {clock(seconds)} on this machine (trainings of other studies took no time)"
    exploratory = " (exploratory: the rule was written after a look at such results)" if rule.exploratory else ""
    verdict = Verdict(judgement.verdict, judgement.because + exploratory)
    sections = [
        Section("Verdict", [verdict, findings_table(rule, judgement)]),
        Section("The claim and the rule", [rule_table(rule)]),
        Section("Results", [*outcome.blocks, *beside(rule, outcome), *tuned_table(outcome)]),
    ]
    write(Page(rule.title, subtitle, sections), lab.folder / f"{rule.name}.html")
    record = _finite(
        {
            "rule": rule.to_json(),
            "full": lab.full,
            "verdict": judgement.verdict,
            "because": judgement.because,
            "findings": [finding.to_json() for finding in judgement.findings],
            "beside": {name: _estimate(outcome.estimates[name]) for name in _others(rule, outcome)},
            "tuned": {arm: tuned.to_json() for arm, tuned in outcome.tuned.items()},
            "figures": dict(outcome.figures),
        }
    )
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(lab.folder / f"{rule.name}.json", text + "\n")
    return dict(record)


def findings_table(rule: Rule, judgement: Judgement) -> Table:
    """Each criterion: what was asked, what was found, and what could have been."""
    rows: list[list[Cell]] = []
    for criterion, finding in zip(rule.criteria, judgement.findings, strict=True):
        low, high = (shown_end(criterion, end) for end in (finding.low, finding.high))
        value, power = criterion.shown(finding.value), power_words(criterion, finding.detectable)
        rows.append([criterion.words, value, f"{low} to {high}", finding.verdict, power])
    head = ["must hold", "found", "interval", "so it", "80 % if the truth is"]
    caption = (
        f"Each end of an interval errs in {ALPHA:.0%} of such studies. The last column: where the true value has to "
        "lie for four of five studies with this noise to find that it holds"
    )
    return Table(head, rows, caption)


def rule_table(rule: Rule) -> Table:
    seeds = ", ".join(map(str, rule.seeds))
    rows: list[list[Cell]] = [
        ["Claim", rule.claim],
        ["Source", rule.source],
        ["What is measured", rule.definition],
        [f"Rule {rule.hash}, fixed before the run", rule.words],
        ["Void, if", rule.void],
        ["Seeds", f"{seeds}; learning rates that are tuned are tuned with seed {rule.tuned_with}"],
        ["What would change it", rule.change],
    ]
    return Table(["", ""], rows)


def beside(rule: Rule, outcome: Outcome) -> list[Block]:
    """What the rule doesn't ask about."""
    rows: list[list[Cell]] = []
    for name in _others(rule, outcome):
        estimate = outcome.estimates[name]
        low, high = estimate.bounds()
        rows.append([name, estimate.value, _or_none(low), _or_none(high)])
    return [Table(["beside the rule", "found", "from", "to"], rows, "Not part of the verdict")] if rows else []


def tuned_table(outcome: Outcome) -> list[Block]:
    """The rates that were chosen, and from which."""
    rows: list[list[Cell]] = [
        [arm, f"{tuned.rate:g}", ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(tuned.losses.items()))]
        for arm, tuned in outcome.tuned.items()
    ]
    return [Table(["", "learning rate", "chosen from (held-out loss)"], rows, "With the tuning seed")] if rows else []


def power_words(criterion: Criterion, error: float) -> str:
    """Where the truth must lie."""
    if not math.isfinite(error):
        return "–"
    low = None if criterion.above is None else criterion.above + error
    high = None if criterion.below is None else criterion.below - error
    if low is not None and high is not None:
        return f"{criterion.shown(low)} to {criterion.shown(high)}" if low < high else "nowhere"
    return f"above {criterion.shown(low)}" if low is not None else f"below {criterion.shown(high or 0.0)}"


def _others(rule: Rule, outcome: Outcome) -> list[str]:
    asked = {criterion.quantity for criterion in rule.criteria}
    return [name for name in outcome.estimates if name not in asked]


def _estimate(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.bounds()
    return {"value": estimate.value, "low": low, "high": high, **vars(estimate)}


def _finite(value: Any) -> Any:
    """JSON without infinities and NaN."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return _or_none(float(value)) if isinstance(value, float) else value


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
