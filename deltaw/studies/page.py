"""Writes a study's outcome: claim, rule, data and verdict as a page, and the figures as JSON beside it."""

import json
from dataclasses import asdict
from typing import Any

from deltaw.analysis.page import Page, Section, Table, Text, Verdict, write
from deltaw.files.atomic import write_text_atomic
from deltaw.show.text import clock
from deltaw.studies.lab import Lab
from deltaw.studies.study import Claim, Outcome


def write_outcome(claim: Claim, outcome: Outcome, lab: Lab, seconds: float) -> dict[str, Any]:
    """Write the page and the JSON; returns the latter."""
    scale = "the full grid" if lab.full else "the small grid"
    subtitle = f"{scale}, {clock(seconds)} on this machine (runs from earlier studies took no time)"
    sections = [
        Section("Verdict", [Verdict(outcome.verdict, outcome.because)]),
        Section(
            "The claim",
            [Table(["", ""], [["Claim", claim.claim], ["Source", claim.source], ["How it is tested", claim.method],
                              ["Rule, fixed before the run", claim.rule]])],
        ),
        Section("Results", outcome.blocks or [Text("There are no pictures.")]),
    ]  # fmt: skip
    write(Page(claim.title, subtitle, sections), lab.folder / f"{claim.name}.html")
    record = {
        "claim": asdict(claim),
        "verdict": outcome.verdict,
        "because": outcome.because,
        "full": lab.full,
        "figures": outcome.figures,
    }
    write_text_atomic(lab.folder / f"{claim.name}.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record
