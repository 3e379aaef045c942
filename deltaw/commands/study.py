"""`deltaw study`: the list of studies, or one or all of them run, each written as soon as it is done.

<output>/small/NAME.html, NAME.json     a study's page and record (studies/page.py); full/ of the large bench
<output>/small/tiny/                    trainings, shared by all studies (studies/bench.py)
"""

import time
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
    rules = [find_study(name).RULE for name in NAMES]
    lines = [f"{rule.name:9} {rule.claim}\n{'':9} {rule.source}" for rule in rules]
    text = "\n".join([*lines, "", "run one: deltaw study rank"])
    return Result({"studies": [rule.to_json() for rule in rules]}, text)


def run_studies(name: str, output: str, full: bool, display: Display) -> Result:
    """One study or `all`, each written as soon as it is done. Raises InputError for an unknown name."""
    names = NAMES if name == "all" else (name,)
    studies = [find_study(each) for each in names]
    folder = Path(output) / ("full" if full else "small")
    make_folder(folder, f"output {folder}")
    lab = Lab(folder, display, full=full)
    results, lines = {}, []
    for study in studies:
        rule, began = study.RULE, time.monotonic()
        display.say(f"study {rule.name}: {rule.claim}\nrule {rule.hash}: {rule.words}")
        with claimed_file(folder / f"{rule.name}.html"):
            record = write_outcome(rule, study.run(lab), lab, time.monotonic() - began)
        results[rule.name] = record
        lines.append(f"{rule.name:9} {record['verdict']}: {record['because']}\n{'':9} {folder / rule.name}.html")
    return Result({"studies": results}, "\n".join(lines))
