"""`deltaw study`: run studies, write a page and the figures of each.

<output>/NAME.html     the claim, the rule, the data, the verdict; self-contained
<output>/NAME.json     the verdict and the figures
<output>/trials/       the runs, shared by all studies
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltaw.analysis.page import Page, Section, Table, Text, Verdict, write
from deltaw.files.atomic import write_text_atomic
from deltaw.files.lock import claimed_file
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import clock
from deltaw.studies.lab import Lab
from deltaw.studies.study import NAMES, Claim, Outcome, find_study


def list_studies() -> Result:
    """What can be tried."""
    claims = [find_study(name).CLAIM for name in NAMES]
    lines = [f"{claim.name:9} {claim.claim}\n{'':9} {claim.source}" for claim in claims]
    text = "\n".join([*lines, "", "run one: deltaw study rank"])
    return Result({"studies": [asdict(claim) for claim in claims]}, text)


def run_studies(name: str, output: str, full: bool, display: Display) -> Result:
    """One study or `all`, each written as soon as it is done. Raises InputError for an unknown name."""
    names = NAMES if name == "all" else (name,)
    studies = [find_study(each) for each in names]
    folder = Path(output) / ("full" if full else "small")
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder, display, full=full)
    results, lines = {}, []
    for study in studies:
        claim, began = study.CLAIM, time.monotonic()
        display.say(f"study {claim.name}: {claim.claim}\nrule: {claim.rule}")
        with claimed_file(folder / f"{claim.name}.html"):
            outcome = study.run(lab)
            seconds = time.monotonic() - began
            results[claim.name] = write_outcome(claim, outcome, lab, seconds)
        lines.append(f"{claim.name:9} {outcome.verdict}: {outcome.because}\n{'':9} {folder / claim.name}.html")
    return Result({"studies": results}, "\n".join(lines))


def write_outcome(claim: Claim, outcome: Outcome, lab: Lab, seconds: float) -> dict[str, Any]:
    """The page and the JSON; returns the latter."""
    scale = "the full grid" if lab.full else "the small grid"
    subtitle = f"{scale}, {clock(seconds)} on this machine (runs that were there already took no time)"
    sections = [
        Section("Verdict", [Verdict(outcome.verdict, outcome.because)]),
        Section(
            "The claim",
            [Table(["", ""], [["Claim", claim.claim], ["Source", claim.source], ["How it is tried", claim.method],
                              ["Rule, fixed before the run", claim.rule]])],
        ),
        Section("What came out", outcome.blocks or [Text("Nothing was drawn.")]),
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
