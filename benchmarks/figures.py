"""Single figures of docs/performance.md, each kept with the command that gave it: benchmarks/figures.csv.

    note(Measured("When it doesn't fit", "base under keep, of bfloat16's", 0.36, bound=0.4, at_most=True))

A benchmark that is run with `--record` notes what it measured; a figure of the same section and name is replaced. Then
`python -m benchmarks.report` writes the page.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.results import Target, cpu
from benchmarks.tables import shown, table

FILE = Path(__file__).with_name("figures.csv")
INTRO = {
    "When it doesn't fit": "Bases that stay packed, layers that are recomputed, and rows that are prepared once. Bases "
    "are SmolLM2-135M (builtin) or of the shapes of Llama 3.2 1B and Llama 3.1 8B with random weights.",
    "Looking at an adapter": "`deltaw inspect`, the whole command, on random factors of Llama 3.1 8B's shape.",
    "Prefixes computed once": "Training steps of SmolLM2-135M with a LoRA of rank 16, whose rows begin alike: with "
    "their beginning computed once, against without, in turns in one process.",
    "Preferences": "DPO on pairs of about 92 tokens of prompt and two answers of 20, eight pairs a step, beside TRL's "
    "DPOTrainer with PEFT.",
    "Remembering": "`train.retain` beside lower rates, a weaker adapter and replay of plain text at equal cost: the "
    "demo's task in 40 steps of 512 tokens, and the demo itself. Forgetting is KL(base ‖ tuned) on builtin:general.",
    "Sweeps": "Eight learners on one base in one process, beside eight commands.",
    "LoRA on experts": "A random mixture of four layers, 32 experts in each and two of them for a token, beside PEFT's "
    "`target_parameters` by the fastest of transformers' implementations.",
    "Rewards": "GRPO on 8 prompts with 8 answers of 20 tokens to each, beside TRL's GRPOTrainer with PEFT. Both "
    "are bound by the same products: 20 passes of 64 rows, and one of some 1,400 rows forward and back.",
    "Serving": "`deltaw serve` on the builtin, over HTTP; the engine alone beside llama.cpp (xllamacpp) with the "
    "builtin's own Q4_1, two threads each.",
}


@dataclass(frozen=True)
class Measured:
    """`bound`: what was wanted, if anything was; `unit`: "x", "%", "s", "GB", "tokens/s", "bytes", "nats", "errors"."""

    section: str
    name: str
    value: float
    unit: str = "x"
    bound: float | None = None
    at_most: bool = False
    command: str = ""
    date: str = ""
    machine: str = ""

    @property
    def cells(self) -> list[str]:
        """Name, target, measured, met, shortfall, and the command."""
        if self.bound is None:
            told = [self.name, "", shown(Target(self.name, 0.0, self.value, unit=self.unit))[2], "", ""]
        else:
            told = shown(Target(self.name, self.bound, self.value, self.at_most, self.unit))
        return [*told, f"`{self.command}`"]


def note(measured: Measured, file: Path = FILE) -> None:
    """Keep a figure, as measured by the command that runs."""
    module = Path(sys.argv[0])
    call = ["python", "-m", f"benchmarks.{module.stem}", *(one for one in sys.argv[1:] if one != "--record")]
    command = measured.command or " ".join(call)
    one = replace(measured, command=command, date=f"{date.today()}", machine=cpu())
    others = [other for other in read(file) if (other.section, other.name) != (one.section, one.name)]
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.DictWriter(out, [field.name for field in fields(Measured)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(each) for each in sorted([*others, one], key=lambda each: each.section))


def read(file: Path = FILE) -> list[Measured]:
    """What was noted; nothing where nothing was."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [_measured(row) for row in csv.DictReader(lines)]


def _measured(row: dict[str, Any]) -> Measured:
    row["value"], row["at_most"] = float(row["value"]), row["at_most"] == "True"
    row["bound"] = float(row["bound"]) if row["bound"] else None
    return Measured(**row)


def sections(measured: Sequence[Measured]) -> str:
    """Of docs/performance.md; empty without figures."""
    parts = []
    for name in dict.fromkeys(one.section for one in measured):
        own = [one for one in measured if one.section == name]
        days = " to ".join(dict.fromkeys([min(one.date for one in own), max(one.date for one in own)]))
        machines = ", ".join(dict.fromkeys(one.machine for one in own))
        heads = ["figure", "target", "measured", "met", "short by", "printed by"]
        parts += [f"## {name}", f"{INTRO.get(name, '')} {days}, {machines}.".strip()]
        parts += [table(heads, (one.cells for one in own))]
    return "\n\n".join(parts) + "\n" if parts else ""
