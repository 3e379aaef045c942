"""The studies' results -> benchmarks/studies, docs/studies and the table in docs/why-lora-works.md.

    python -m benchmarks.why [--studies runs/studies/small]      (after `deltaw study all`; nothing is run here)

Copies each study's figures and first picture, and writes every verdict into the table between the two marks of the
page, so that no verdict on it is typed by hand.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs" / "why-lora-works.md", ROOT / "docs" / "studies"
FIGURES = ROOT / "benchmarks" / "studies"
BEGIN, END = "<!-- verdicts -->", "<!-- end of verdicts -->"
ORDER = ("rank", "lr10", "where", "phi", "amp", "fullrank", "pretrain", "forget", "intruder", "compress", "bf16")


def table(records: dict[str, dict]) -> str:
    """One row per study: name, claim, verdict, why."""
    lines = ["| study | claim | verdict | measured |", "|---|---|---|---|"]
    for name, record in records.items():
        cells = (f"`{name}`", record["claim"]["claim"], f"**{record['verdict']}**", record["because"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def picture(page: str) -> str:
    """The first picture of a study's page as a file of its own: black on white, whatever the reader's colours are."""
    found = re.search(r"<svg .*?</svg>", page, re.S)
    if found is None:
        raise SystemExit("a study's page has no picture")
    style = "<style>svg{color:#1b1d21;background:#fff;font-family:system-ui,sans-serif}</style>"
    svg = re.sub(r"^(<svg [^>]*>)", r"\1" + style, found[0])
    return svg if "xmlns=" in svg.split(">")[0] else svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.why", description="Studies -> docs.")
    parser.add_argument("--studies", type=Path, default=ROOT / "runs" / "studies" / "small")
    folder = parser.parse_args().studies
    for made in (PICTURES, FIGURES):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    records = {}
    for name in ORDER:
        shutil.copy(folder / f"{name}.json", FIGURES)
        records[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        (PICTURES / f"{name}.svg").write_text(picture((folder / f"{name}.html").read_text(encoding="utf-8")), "utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(records)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
