"""docs/guide.md: its commands run, and the Chinese pages have the English ones' commands, figures and links.

`python -m tests.test_guide INSTALL` runs the guide as it stands in an empty folder, where INSTALL is what pip installs
in place of deltaw (a wheel): what a stranger does, with the real model. Here, in minutes rather than seconds, the
commands after the installation run with the real model (slow), and with a tiny one.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.test_cli import call
from tests.tiny import tiny_base

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/guide.md"
PAIRS = [("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/guide.zh-CN.md")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The command lines of a page, comments aside."""
    lines = "".join(blocks(page, "sh")).splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def without_comments(text: str) -> str:
    return re.sub(r"\s+#.*$|^#.*\n", "", text, flags=re.M).strip()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_the_chinese_page_has_the_english_ones_commands_figures_and_links(pair: tuple[str, str]) -> None:
    english, chinese = (ROOT / name for name in pair)
    assert commands(english) == commands(chinese) and commands(english)
    for language in ("yaml", "csv", "python"):
        one, other = ([without_comments(block) for block in blocks(page, language)] for page in (english, chinese))
        assert one == other, language
    one, other = (prose(page) for page in (english, chinese))
    assert figures(one) == figures(other)
    assert [len(re.findall(mark, one, re.M)) for mark in (r"^#", r"^\|", r"^- ")] == [
        len(re.findall(mark, other, re.M)) for mark in (r"^#", r"^\|", r"^- ")
    ], "headings, rows of tables, points"
    links = [Counter(re.findall(r"\]\(([^)]+)\)", text.replace(".zh-CN", ""))) for text in (one, other)]
    own = {name.rpartition("/")[2] for pair in PAIRS for name in pair}
    assert {k: v for k, v in links[0].items() if k not in own} == {k: v for k, v in links[1].items() if k not in own}
    for page in (english, chinese):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https:") or (page.parent / link).exists(), link


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def figures(text: str) -> Counter[str]:
    """Every number, and every piece of code, however often each stands there."""
    code = re.findall(r"`([^`\n]+)`", text)
    numbers = re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", text))
    return Counter([*code, *numbers])


def test_the_guide_runs(tmp_path: Path, monkeypatch) -> None:
    """With a tiny model in place of the small one, and little learnt."""
    monkeypatch.chdir(tmp_path)
    tiny_base(tmp_path / "base")
    write_files(tmp_path, base="base")
    ran = []
    for line in commands(GUIDE):
        program, *words = shlex.split(line)
        if program != "deltaw":
            continue
        code, out, err = call(*words)
        assert code == 0, (line, err)
        ran.append((words[0], out))
    verbs = [verb for verb, _ in ran]
    assert verbs[:3] == ["doctor", "preview", "train"] and {"generate", "eval", "inspect", "export"} <= set(verbs)
    assert "30 rows" in dict(ran)["preview"] and (tmp_path / "runs/cafe/report.html").is_file()
    assert (tmp_path / "cafe-adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_guide_runs_with_its_own_model(tmp_path: Path) -> None:
    answers = run(tmp_path, [line for line in commands(GUIDE) if line.startswith("deltaw")])
    learnt, base, rest = (answers[line] for line in answers if "generate" in line)
    assert "dogs are welcome" in learnt and "dogs are welcome" not in base and "Paris" in rest


def write_files(folder: Path, base: str | None = None) -> None:
    (table,), (run_file, *_) = blocks(GUIDE, "csv"), blocks(GUIDE, "yaml")
    (folder / "cafe.csv").write_text(table, encoding="utf-8")
    if base is not None:
        raw = yaml.safe_load(run_file)
        run_file = yaml.safe_dump({**raw, "base": base, "train": {**raw["train"], "lr": 1e-3, "steps": 3}})
    (folder / "run.yaml").write_text(run_file, encoding="utf-8")


def run(folder: Path, lines: list[str]) -> dict[str, str]:
    """The lines in one shell, and what each printed on stdout."""
    write_files(folder)
    printed = {}
    script = [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH", "set -e"]
    for number, line in enumerate(lines):
        script.append(f"echo '>>>' {shlex.quote(line)} >&2; {line} > {number}.out")
    subprocess.run(["bash", "-c", "\n".join(script)], cwd=folder, check=True)
    for number, line in enumerate(lines):
        printed[line] = (folder / f"{number}.out").read_text(encoding="utf-8")
    return printed


if __name__ == "__main__":
    install = shlex.quote(str(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        named = [line.replace("'.[gguf]'", f"{install}'[gguf]'") for line in commands(GUIDE)]
        for line, text in run(Path(folder), named).items():
            print(f"$ {line}\n{text}")
