"""`deltaw study`: the list of studies, or one or all of them run, each written as soon as it is done.

<output>/small/NAME.html, NAME.json     a study's page and figures (studies/page.py); full/ of the full grid
<output>/small/trials/                  the runs, shared by all studies
"""

import time
from dataclasses import asdict
from pathlib import Path

from deltaw.files.lock import claimed_file
from deltaw.files.output import make_folder
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.studies.lab import Lab
from deltaw.studies.page import write_outcome
from deltaw.studies.study import NAMES, find_study


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
    make_folder(folder, f"output {folder}")
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
