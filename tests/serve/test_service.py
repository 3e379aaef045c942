"""The unit and the container file of recipes/: what they start is there, and takes what it is given. No container is
built here, and no service started."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from deltaw.cli import app
from tests.serve.serving import Running

ROOT = Path(__file__).parents[2]
UNIT, CONTAINER = ROOT / "recipes/deltaw.service", ROOT / "recipes/Dockerfile"


def steps(name: str) -> list[str]:
    """What follows this word in the container file, in order."""
    return re.findall(rf"^{name} (.*)$", CONTAINER.read_text(), re.MULTILINE)


def given(command: list[str]) -> list[str]:
    """The options of `deltaw serve` in a command."""
    assert command[:1] == ["serve"]
    return [word for word in command[1:] if word.startswith("-")]


def test_the_unit_is_one(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze isn't there")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/deltaw/bin/deltaw", sys.executable))
    checked = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("TimeoutStopSec=30", "TimeoutStopSeconds=30"))
    checked = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert "TimeoutStopSeconds" in checked.stderr


def test_what_they_start_takes_what_it_is_given() -> None:
    (line,) = re.findall(r"^ExecStart=\S+/deltaw (.*)$", UNIT.read_text(), re.MULTILINE)
    (entry,), (more,) = steps("ENTRYPOINT"), steps("CMD")
    options = {name for option in get_command(app).commands["serve"].params for name in option.opts}  # type: ignore[attr-defined]
    for command in (line.split(), [*json.loads(entry)[1:], *json.loads(more)]):
        assert given(command) and set(given(command)) <= options


def test_the_container_gets_what_it_installs() -> None:
    copied = [source for step in steps("COPY") for source in step.split()[:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"constraints.txt", "pyproject.toml", "deltaw", project["readme"], *project["license-files"]} == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    extras = {name for step in steps("RUN") for group in re.findall(r"\.\[(.*?)\]", step) for name in group.split(",")}
    assert extras and extras <= set(project["optional-dependencies"])


def test_the_health_check_tells(running: Running) -> None:
    (check,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", CONTAINER.read_text(), re.MULTILINE)
    python, *arguments = json.loads(check)
    assert python == "python"
    for address, code in ((running.address, 0), ("http://127.0.0.1:9", 1)):
        asked = [argument.replace("http://127.0.0.1:8000", address) for argument in arguments]
        assert subprocess.run([sys.executable, *asked], capture_output=True, timeout=60).returncode == code
