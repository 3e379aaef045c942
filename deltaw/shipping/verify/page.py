"""The page of a verification: the verdict and its reasons, the figures beside what is allowed, and every answer that
differs, both sides' words next to each other. One file, offline, light and dark (analysis/page.py)."""

from pathlib import Path

from deltaw.analysis.page import (
    Block,
    Fact,
    Facts,
    Finding,
    Findings,
    Page,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    excerpt,
    write,
)
from deltaw.shipping.verify.sides.formats import described
from deltaw.shipping.verify.verdict import FACTOR, KL_FACTOR, SHARE, STRENGTH, Verification
from deltaw.show.text import percent

SHOWN = 60  # answers

HOW = f"""
Rounding makes two correct sides differ, and by how much depends on the model. So it is measured: random errors, as
large as each side's formats make them, are put into every layer of the model that runs here, at the positions that are
compared. The KL may be {KL_FACTOR:g} times their mean, and a single difference {FACTOR:g} times their largest.

Where two answers part, each side chose its token by some margin. Both margins together say how far the odds of the two
tokens moved from one side to the other. A move that rounding could make is a *near tie*, not a fault.

A coarse type could explain anything, so the adapter's own effect is measured on the same positions. The difference may
be at most {percent(SHARE)} of it, and the other side may lose at most {percent(STRENGTH)} of the change: rounding
has no direction, but a lost scale has.
"""


def write_page(result: Verification, path: Path) -> None:
    """Write the page to a file. Raises RunError if it can't be written."""
    write(page_of(result), path)


def page_of(result: Verification) -> Page:
    what = "answer alike" if result.agree else "answer differently"
    sections = [
        Section("Verdict", [_findings(result), _facts(result)]),
        Section("Answers that part", _answers(result)),
        Section("The tolerance", [Text(HOW), Text(f"Here: {result.tolerance.why}."), _formats(result)]),
        Section("All prompts", [_all(result)]),
    ]
    return Page(f"Two sides {what}", f"`{result.a}` and `{result.b}`", sections)


def _findings(result: Verification) -> Block:
    findings = [Finding("problem", reason[:1].upper() + reason[1:]) for reason in result.reasons]
    if result.agree:
        findings.append(Finding("ok", "Both sides answer alike, as far as rounding lets them."))
    return Findings([*findings, *(Finding("note", note[:1].upper() + note[1:]) for note in result.notes)])


def _facts(result: Verification) -> Block:
    total, allowed = len(result.rows), result.tolerance
    facts = [
        Fact("Prompts that differ", result.count("prompt"), f"of {total}"),
        Fact(
            "Same answers",
            result.count("same"),
            f"of {total}, {result.count('near tie')} more differ only at a near tie",
        ),
    ]
    if result.kl is not None:
        facts.append(Fact("KL, nats per token", result.kl, f"allowed {allowed.kl:.2g}"))
        facts.append(Fact("Largest difference", result.largest, f"of a log-probability; allowed {allowed.largest:.2g}"))
    if result.effect is not None:
        facts.append(Fact("The adapter changes", result.effect.kl, "nats per token"))
        facts.append(
            Fact("Carried over to the other side", f"{percent(1 - result.effect.strength, 1)}", "of that change")
        )
    return Facts(facts)


def _answers(result: Verification) -> list[Block]:
    parted = [row for row in result.rows if row.parting is not None]
    if not parted:
        return [Text("None: all answers are the same, token for token.")]
    blocks: list[Block] = []
    for row in sorted(parted, key=lambda row: row.near_tie)[:SHOWN]:
        kind = "A near tie" if row.near_tie else "Different" if row.same_prompt is not False else "Another prompt"
        blocks.append(Text(f"{kind}: {row.parting_words}"))
        sample = Sample(excerpt(row.prompt, 1500), excerpt(row.a), excerpt(row.b), None)
        blocks.append(Samples([sample], (result.a, result.b)))
    return blocks


def _formats(result: Verification) -> Block:
    rows = [
        [name, described(numbers.weights), ", ".join(map(described, numbers.activations)), numbers.why]
        for name, numbers in zip((result.a, result.b), result.numbers, strict=True)
    ]
    return Table(["Side", "Weights, relative to the trained ones", "Activations", "How it is known"], rows)


def _all(result: Verification) -> Block:
    words = {True: "same", False: "differs", None: "unknown"}
    rows = [
        [
            row.origin,
            words[row.same_prompt],
            "same" if row.parting is None else "near tie" if row.near_tie else "different",
            row.prompt_parting or row.parting_words,
        ]
        for row in result.rows
    ]
    return Table(["Row", "Prompt ids", "Answer", "Where"], rows)
