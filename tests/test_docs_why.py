"""docs/why-lora-works.md and the studies' pages say what the records say, and only records of the rules that stand now
are kept: a verdict of another rule is never shown."""

import json
import math
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


def found(name: str, quantity: str) -> float:
    """What a record has of a quantity; of a logarithm, the number itself."""
    record = record_of(name)
    assert record is not None, "the prose tells a result of a rule that doesn't stand any more"
    values = {finding["quantity"]: finding["value"] for finding in record["findings"]}
    values |= {beside: one["value"] for beside, one in record["beside"].items()}
    logs = {criterion["quantity"] for criterion in record["rule"]["criteria"] if criterion["is_log"]}
    return math.exp(values[quantity]) if quantity in logs or quantity.startswith(LOGS) else values[quantity]


LOGS = "log ", "gap of "  # how quantities beside a rule begin that are logarithms
KINDS = "held", "did not hold", "isn't settled"
TOLD: dict[str, list[tuple[str, str, float]]] = {  # by study: what the prose says, of which quantity, times what
    "rank": [
        ("rank 4's loss is {:.2f} times rank 64's", "loss of rank 4 / rank 64", 1),
        ("Rank 1 is far behind, at {:.2f} times", "log loss of rank 1 / rank 64, a new task", 1),
        ("rank 16 does better than 64, at {:.2f}", "log loss of rank 16 / rank 64, a new task", 1),
        ("On the accent rank 4 is at {:.2f}", "log loss of rank 4 / rank 64, an accent", 1),
    ],
    "lr10": [("LoRA's best rate is {:.2f} times", "best rate of LoRA / of full fine-tuning", 1)],
    "where": [
        ("MLP's loss is {:.2f} times attention's", "loss of the MLP / attention", 1),
        ("at {:.2f} times attention's loss", "loss of all layers / attention", 1),
        ("and {:.2f} times the MLP's", "loss of all layers / mlp", 1),
    ],
    "amp": [
        ("in {:.0f} % of random directions at rank 4", "percentile of W in ΔW's directions, rank 4", 100),
        ("and in {:.0f} % at rank 16", "percentile of W in ΔW's directions, rank 16", 100),
    ],
    "phi": [
        ("share {:.2f} of one seed", "φ(1, 1) of ranks 16 and 64, one seed", 1),
        ("and {:.2f} of two", "φ(1, 1) of ranks 16 and 64, two seeds", 1),
        ("of ranks 4 and 64 {:.2f}", "φ(1, 1) of ranks 4 and 64, one seed", 1),
        ("shared more ({:.2f},", "left, φ(1, 1), ranks 16 and 64, one seed", 1),
        (", {:.2f} and", "left, φ(1, 1), ranks 16 and 64, two seeds", 1),
        ("and {:.2f}). At this width", "left, φ(1, 1), ranks 4 and 64, one seed", 1),
    ],
    "fullrank": [
        ("after 192 steps {:.1f} % of them", "share of directions that hold 90 % after 192 steps", 100),
        ("{:.1f} points more than after 12 steps", "growth of that share from 12 to 192 steps", 100),
        ("and {:.1f} points more in the MLP", "share in the MLP less that in attention", 100),
        ("are {:.0f} directions of 128", "share of directions that hold 90 % after 192 steps", 128),
    ],
    "pretrain": [
        ("scratch is {:.2f} times full training's", "gap of LoRA, pretraining", 1),
        ("in the weight's place {:.2f} times", "gap of low rank, pretraining", 1),
        ("on the accent LoRA's is {:.3f} times", "loss of LoRA / full in fine-tuning", 1),
    ],
    "compress": [
        ("has {:.2f} times the loss of a trained 32", "loss of 64 cut to 32 / trained at 32", 1),
        ("cut to 4, the loss is {:.2f} times the parent's", "log loss of the parent cut to 4 / whole", 1),
    ],
    "forget": [
        ("LoRA's KL from the base is {:.2f} times", "KL of LoRA / full at one task loss", 1),
        ("learnt less ({:.2f} times the loss)", "log task loss of LoRA / full, each at its end", 1),
        ("forgotten less, by {:.2f} nats", "rise of LoRA − full, each at its end", -1),
    ],
    "intruder": [
        ("LoRA has {:.1f} more of them", "intruders of LoRA − of full fine-tuning", 1),
        ("another {:.1f} more", "intruders of LoRA at twice its best rate − at its best", 1),
    ],
    "bf16": [
        ("at 1e-5 {:.1f} % of A's entries moved", "share of A's entries that changed, bfloat16, lr 1e-05", 100),
        ("At 1e-4 {:.1f} % did", "share of A's entries that changed, bfloat16, lr 0.0001", 100),
        ("{:.3f} nats worse", "held-out loss of bfloat16 − float32, lr 0.0001", 1),
    ],
    "init": [
        ("PiSSA is {:.3f} nats ahead at step 20", "G(20)", 1),
        ("and {:.3f} at the end", "G(150)", 1),
        ("by {:.2f} nats at step 20, and still by", "LoRA − eva at step 20", 1),
        ("by {:.2f} nats at step 20, and still by", "LoRA − lora-ga at step 20", 1),
        ("still by {:.2f} and", "LoRA − eva, held-out loss at the end", 1),
        ("and {:.2f} at the end.", "LoRA − lora-ga, held-out loss at the end", 1),
    ],
    "rslora": [
        ("(slope {:.3f})", "slope with α/√r", 1),
        ("a slope of only −{:.3f}", "slope with α/r", -1),
        ("α/√r has {:.2f} times the loss", "log of (loss with α/√r / with α/r) at rank 64", 1),
    ],
    "rl-rank": [
        ("ends {:.3f} above full fine-tuning", "greedy reward of rank 1 less full fine-tuning's", 1),
        ("Full fine-tuning gains {:.2f}", "gain of full fine-tuning", 1),
    ],
    "plus": [
        ("the loss is {:.3f} times that", "log of (loss with ratio 4 / with 1)", 1),
        ("sixteen times as fast {:.3f}", "log of (loss with ratio 16 / with 1)", 1),
    ],
    "batch": [
        ("LoRA's loss is {:.0f} % above", "LoRA's gap at 256 tokens", 100),
        ("and {:.0f} % in batches of 4,096", "LoRA's gap at 4096 tokens", 100),
    ],
}


@pytest.mark.parametrize("name", TOLD)
def test_what_the_prose_says_was_found_is_in_the_records(name: str) -> None:
    prose = " ".join(TEXT.split(END)[1].split())
    record = record_of(name)
    assert record is not None
    paragraph = next(part for part in TEXT.split("\n\n") if part.startswith(f"[`{name}`](studies/{name}.md)"))
    verdict = record["verdict"].replace("not settled", "isn't settled")
    assert [kind for kind in KINDS if f"t {kind}" in " ".join(paragraph.split())] == [verdict]
    for words, quantity, times in TOLD[name]:
        assert words.format(times * found(name, quantity)) in prose


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
