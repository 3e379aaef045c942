"""The studies' records -> benchmarks/studies, a page for each in docs/studies, the table in docs/why-lora-works.md.

    python -m benchmarks.why [--studies runs/studies/small]      (after `deltaw study all`; nothing is run here)
    python -m benchmarks.why --pages                             (the pages again, of the records that are there)

A record whose rule isn't the one that stands in the code now is left out: its study hasn't been run under this rule.
All verdicts and figures on the pages come from the records, so that none is typed by hand.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.analysis.page import number
from deltaw.studies.page import power_words
from deltaw.studies.study import NAMES, Rule, find_study, shown_end

ROOT = Path(__file__).parents[1]
PAGE, PAGES = ROOT / "docs" / "why-lora-works.md", ROOT / "docs" / "studies"
RECORDS = ROOT / "benchmarks" / "studies"
BEGIN, END = "<!-- verdicts -->", "<!-- end of verdicts -->"
NOT_RUN = "not run under this rule yet"

Record = dict[str, Any]


def record_of(name: str, folder: Path = RECORDS) -> Record | None:
    """A study's record, if it is of the rule that stands now."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    record: Record = json.loads(file.read_text(encoding="utf-8"))
    return record if record.get("rule", {}).get("hash") == find_study(name).RULE.hash else None


def verdict_of(record: Record | None) -> str:
    if record is None:
        return NOT_RUN
    return str(record["verdict"]) + (", exploratory" if record["rule"]["exploratory"] else "")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines)


def verdicts_table() -> str:
    """One row per study: name, claim, verdict, why."""
    rows = []
    for name in NAMES:
        rule, record = find_study(name).RULE, record_of(name)
        because = sentence(record["because"]) if record else f"`deltaw study {name}`"
        rows.append([f"[`{name}`](studies/{name}.md)", rule.claim, f"**{verdict_of(record)}**", because])
    return markdown_table(["study", "claim", "verdict", "measured"], rows)


def study_page(name: str) -> str:
    """A study's page: verdict and power, the claim, the rule, the data, what would change it."""
    rule, record = find_study(name).RULE, record_of(name)
    parts = [
        f"# {rule.title}",
        f"**{verdict_of(record).capitalize()}.** " + (sentence(record["because"]) if record else ""),
    ]
    if record is None:
        parts.append(f"Run it: `deltaw study {name}`, then `python -m benchmarks.why`.")
    else:
        parts += [findings(rule, record), f"![The study's main picture]({name}.svg)"]
    parts += ["## The claim", f"> {rule.claim}", f"Source: {rule.source}."]
    parts += ["## What is measured", f"{rule.definition}.", "## The rule", rule_text(rule)]
    if record is not None:
        parts += ["## Beside the rule", *data(name, record)]
    parts += ["## What would change it", f"{sentence(rule.change)}."]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sentence(words: str) -> str:
    """With a capital, unless it begins with a symbol."""
    return words[:1].upper() + words[1:] if words[:1].isascii() else words


def rule_text(rule: Rule) -> str:
    seeds = ", ".join(map(str, rule.seeds))
    exploratory = " **Exploratory**: it was written after a look at such results." if rule.exploratory else ""
    return (
        f"`{rule.hash}`: {rule.words}.{exploratory} Void, if {rule.void}. Seeds {seeds}; learning rates that are tuned "
        f"are tuned with seed {rule.tuned_with}, and one at its grid's end settles nothing. Each end of an interval "
        "errs in 5 % of such studies; an interval that reaches over a bound settles nothing, either."
    )


def findings(rule: Rule, record: Record) -> str:
    rows = []
    for criterion, finding in zip(rule.criteria, record["findings"], strict=True):
        value, low, high, error = (_number(finding[key]) for key in ("value", "low", "high", "detectable"))
        interval = f"{shown_end(criterion, low)} to {shown_end(criterion, high)}"
        power = power_words(criterion, error)
        rows.append([criterion.words, criterion.shown(value), interval, finding["verdict"], power])
    return markdown_table(["must hold", "found", "interval", "so it", "power: 80 % if the truth is"], rows)


def data(name: str, record: Record) -> list[str]:
    """What the rule doesn't ask about, the rates, and where all numbers are."""
    parts = []
    if record["beside"]:
        rows = [[of, *(_short(one[key]) for key in ("value", "low", "high"))] for of, one in record["beside"].items()]
        parts.append(markdown_table(["quantity", "found", "from", "to"], rows))
    if record["tuned"]:
        rows = [[arm, f"{tuned['rate']:g}", _rates(tuned["losses"])] for arm, tuned in record["tuned"].items()]
        parts.append(markdown_table(["arm", "learning rate", "chosen from (held-out loss)"], rows))
    scale = "SmolLM2-135M" if record["full"] else "the tiny Llama (deltaw/studies/tiny.py)"
    return [*parts, f"Bench: {scale}. All seeds: [{name}.json](../../benchmarks/studies/{name}.json)."]


def _rates(losses: dict[str, float | None]) -> str:
    return ", ".join(f"{rate}: {_short(loss)}" for rate, loss in losses.items())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _short(value: float | None) -> str:
    return "?" if value is None else number(value)


def picture(page: str) -> str:
    """The first picture of a study's page as a file of its own: black on white, whatever the reader's colours are."""
    svg = re.search(r"<svg .*?</svg>", page, re.S)
    if svg is None:
        raise SystemExit("a study's page has no picture")
    style = "<style>svg{color:#1b1d21;background:#fff;font-family:system-ui,sans-serif}</style>"
    text = re.sub(r"^(<svg [^>]*>)", r"\1" + style, svg[0])
    if "xmlns=" in text.split(">")[0]:
        return text
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def with_table(text: str) -> str:
    """The page with the verdicts as they are now."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{verdicts_table()}\n{END}{after}"


def collect(folder: Path) -> None:
    """Copy the records of rules that stand now, with their pictures; those of other rules go."""
    for name in NAMES:
        record = record_of(name, folder)
        if record is not None:
            shutil.copy(folder / f"{name}.json", RECORDS)
            html = (folder / f"{name}.html").read_text(encoding="utf-8")
            (PAGES / f"{name}.svg").write_text(picture(html), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.why", description="Studies -> docs.")
    parser.add_argument("--studies", type=Path, default=ROOT / "runs" / "studies" / "small")
    parser.add_argument("--pages", action="store_true", help="write the pages again; copy nothing")
    arguments = parser.parse_args()
    if not arguments.pages:
        collect(arguments.studies)
    for file in (*RECORDS.glob("*.json"), *PAGES.glob("*.svg")):
        if file.stem not in NAMES or record_of(file.stem) is None:
            file.unlink()
    for name in NAMES:
        (PAGES / f"{name}.md").write_text(study_page(name), encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
