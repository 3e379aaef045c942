"""docs/lint.md holds every code as the code's own table has it; `python -m tests.shipping.test_docs_lint` writes it."""

import re
from pathlib import Path

import peft
import transformers
from peft.utils.peft_types import PeftType, TaskType

from deltaw.shipping.lint import lint  # noqa: F401  (all rules enter their codes)
from deltaw.shipping.lint.finding import CODES, DESTINATIONS, Code, Effect
from deltaw.shipping.lint.rules_config import KINDS, TASKS

DOCS = Path(__file__).parents[2] / "docs/lint.md"
HEAD = "| code | what | what comes of it | how to fix it |\n| --- | --- | --- | --- |\n"
SECTIONS = {
    "1": "Files",
    "2": "Tensors",
    "3": "The config, and what is more than a plain LoRA",
    "4": "Numbers",
    "5": "The base",
    "6": "Chat and tokenizer",
    "7": "GGUF files",
    "8": "mlx-lm's folders and merged models",
}
WORDS = {Effect.REFUSED: "refused", Effect.WRONG: "wrong", Effect.UNSURE: "can't be told", Effect.LOADS: "loads"}


def row(code: Code) -> str:
    places = [
        f"{WORDS[effect]}: {', '.join(DESTINATIONS[p] for p, e in code.effects.items() if e is effect)}"
        for effect in sorted(set(code.effects.values()), reverse=True)
    ]
    if len(code.effects) == len(DESTINATIONS) and len(places) == 1:
        places = [f"{WORDS[next(iter(code.effects.values()))]} everywhere"]
    cells = (code.number, code.title, "; ".join(places), code.fix)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables() -> str:
    parts = []
    for digit, title in SECTIONS.items():
        rows = [row(CODES[number]) for number in sorted(CODES) if number[2] == digit]
        parts.append(f"### {title}\n\n{HEAD}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def test_the_list_is_the_codes() -> None:
    assert tables() in DOCS.read_text(encoding="utf-8")


def test_each_code_has_a_test_that_makes_such_an_adapter() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_lint*.py"))
    assert set(CODES) - set(re.findall(r'"(DW\d{3})"', tests)) == set()
    assert {number[2] for number in CODES} == set(SECTIONS) and all(c.title and c.fix for c in CODES.values())


def test_the_versions_that_it_was_tried_with_are_named() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert f"| PEFT | {peft.__version__} |" in text and f"| transformers | {transformers.__version__} |" in text


def test_pefts_own_names_are_known() -> None:
    assert {kind.value for kind in PeftType} == KINDS and {task.value for task in TaskType} == set(TASKS)


if __name__ == "__main__":
    before, _, rest = DOCS.read_text(encoding="utf-8").partition("### Files\n")
    DOCS.write_text(before + tables() + "", encoding="utf-8")
