"""recipes/ship.sh as a user runs it: from a run on a GGUF base to every place, each held to the run by `deltaw verify`."""

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
from deltaw.progress import Display
from tests.base.gguf_models import model_of, write_model

SCRIPT = Path(__file__).parents[2] / "recipes/ship.sh"
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
    changes = re.findall(r"it changes ([\d.e+-]+) nats", done.stdout)
    assert changes and min(map(float, changes)) > 0.1, "the adapter does too little for the verdicts to show anything"
