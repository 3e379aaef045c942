"""docs/why-lora-works.md and the studies' pages say what the records say, and only records of the rules that stand now
are kept: a verdict of another rule is never shown."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.why import END, NOT_RUN, PAGE, PAGES, RECORDS, record_of, study_page, verdict_of, with_table
from deltaw.studies.study import NAMES, find_study, judged_again

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_on_the_page_is_the_records(name: str) -> None:
    (row,) = re.findall(rf"^\| \[`{name}`\].*$", TEXT, re.M)
    record = record_of(name)
    assert f"| **{verdict_of(record)}** |" in row
    assert record is not None or NOT_RUN in row


@pytest.mark.parametrize("name", NAMES)
def test_a_records_verdict_follows_from_its_numbers(name: str) -> None:
    record = record_of(name)
    if record is not None and record["verdict"] != "void":
        assert judged_again(find_study(name).RULE, record) == record["verdict"]


@pytest.mark.parametrize("name", NAMES)
def test_every_study_has_its_page_as_the_record_has_it(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page == study_page(name), "write the pages again: python -m benchmarks.why --pages"
    assert find_study(name).RULE.hash in page
    svg = PAGES / f"{name}.svg"
    assert svg.is_file() == (record_of(name) is not None)
    if svg.is_file():
        assert svg.read_text(encoding="utf-8").startswith("<svg ") and f"({name}.svg)" in page


def test_what_the_prose_says_was_found_is_in_the_records() -> None:
    prose = " ".join(TEXT.split(END)[1].split())
    full, bf16 = record_of("fullrank"), record_of("bf16")
    for record in (full, bf16):
        assert record is not None, "the prose tells results of a rule that doesn't stand any more"
        assert record["verdict"] == "held"
    assert full and bf16
    share, growth, more = (finding["value"] for finding in full["findings"])
    assert f"after 192 steps {100 * share:.1f} % of them" in prose
    assert f"{100 * growth:.1f} points more than after 12 steps, and {100 * more:.1f} points more in the MLP" in prose
    assert f"{100 * share:.1f} % are {round(128 * share)} directions of 128" in prose
    moved = {name: one["value"] for name, one in bf16["beside"].items()}
    assert f"at 1e-5 {100 * bf16['findings'][0]['value']:.1f} % of A's entries moved" in prose
    a_moved = moved["share of A's entries that changed, bfloat16, lr 0.0001"]
    assert f"At 1e-4 {100 * a_moved:.1f} % did" in prose
    behind = moved["held-out loss of bfloat16 − float32, lr 0.0001"]
    assert f"{behind:.3f} nats worse" in prose


def test_no_record_of_another_rule_is_kept() -> None:
    kept = {file.stem for file in RECORDS.glob("*.json")}
    assert kept == {name for name in NAMES if record_of(name) is not None}
    for name in kept:
        json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_table_is_the_one_that_would_be_written() -> None:
    assert with_table(TEXT) == TEXT


def test_links_lead_to_pages() -> None:
    for target in re.findall(r"\]\((studies/[^)]+)\)", TEXT):
        assert (Path(PAGE).parent / target).is_file(), target
