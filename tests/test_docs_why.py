"""docs/why-lora-works.md says what the studies' records say, and each record is of the rule that stands in the code."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from deltaw.studies.study import NAMES, find_study

ROOT = Path(__file__).parents[1]
DOCS, FIGURES = ROOT / "docs", ROOT / "benchmarks" / "studies"
PAGE = (DOCS / "why-lora-works.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_on_the_page_is_the_records(name: str) -> None:
    record = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.M)
    assert f"| **{record['verdict']}** |" in row and record["because"] in row
    assert record["claim"] == asdict(find_study(name).CLAIM), "the rule changed after the run: run the study again"


@pytest.mark.parametrize("name", NAMES)
def test_every_study_has_its_picture_on_the_page(name: str) -> None:
    assert f"(studies/{name}.svg)" in PAGE
    svg = (DOCS / "studies" / f"{name}.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg ") and "background:#fff" in svg
