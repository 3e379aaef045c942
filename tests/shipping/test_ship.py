"""recipes/ship.sh as a user runs it: a run on a GGUF goes to every place, each held to the run by `deltaw verify`."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import deltaw
from deltaw.show.progress import Display
from tests.base.gguf_models import model_of, write_model

ROOT = Path(__file__).parents[2]
SCRIPT, DOCS = ROOT / "recipes/ship.sh", ROOT / "docs/shipping.md"
WORDS = ("hello", "world", "it's", "12,345", "CamelCase", "na\u00efve", "x = 1", "ok!?")
CLIENTS = {"peft": 2, "xllamacpp": 3, "mlx_lm": 1}  # how many verdicts each is asked for; one more needs none


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A run that has learnt enough to answer otherwise than its base, and that base's GGUF."""
    base = write_model(tmp_path / "base.gguf", model_of("llama", hidden_size=64, intermediate_size=96, head_dim=16))
    rows = [{"prompt": f"{word} {n}", "completion": f" {word[::-1]} {n * n}"} for n in range(10) for word in WORDS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "base": str(base),
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 8},
        "train": {"lr": 2e-2, "epochs": 3, "tokens_per_step": 256, "warmup_steps": 0, "dtype": "float32"},
        "evaluate": {"report": False, "general": None, "samples": 0},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    deltaw.train(deltaw.load_config(tmp_path / "run.yaml"), display=Display(quiet=True))
    return tmp_path / "run", base


@pytest.mark.slow  # twenty processes; what each does is tested by itself
def test_it_ships_everywhere_and_every_pair_agrees(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = trained
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [SCRIPT, run, tmp_path / "out", base], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    installed = {name: count for name, count in CLIENTS.items() if importlib.util.find_spec(name)}
    assert done.stdout.count("AGREE: ") == 1 + sum(installed.values())
    assert done.stdout.count("left out: ") == len(CLIENTS) - len(installed)
    names = {str(run): "runs/demo", str(tmp_path / "out"): "shipped", str(base): "builtin:smollm2-135m"}
    names |= {"base-run-": "SmolLM2-135M-Instruct-demo-"}  # what a merged GGUF is called
    printed = done.stdout
    for name, demos in names.items():
        printed = printed.replace(name, demos)
    commands = re.compile(r"^\$ deltaw .*", re.M)
    if not set(CLIENTS) - set(installed):
        assert commands.findall(printed) == commands.findall(DOCS.read_text(encoding="utf-8"))
    changes = re.findall(r"it changes ([\d.e+-]+) nats", done.stdout)
    assert changes and min(map(float, changes)) > 0.1, "the adapter does too little for the verdicts to show anything"


def test_what_the_docs_show_of_the_demo_agrees_everywhere() -> None:
    shown = DOCS.read_text(encoding="utf-8")
    verdicts = re.findall(r"^\$ deltaw verify .*\n(\w+): ", shown, re.M)
    assert len(verdicts) == 1 + sum(CLIENTS.values()) and set(verdicts) == {"AGREE"}
