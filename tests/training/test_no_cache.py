"""A model without a key-value cache trains with the default settings: its answers are left out, and that is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.training import measuring
from deltaw.training.plan import plan
from deltaw.training.run import train
from tests.data.toys import toy
from tests.tiny import Said, run_file, words


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "intermediate_size": 48, "conv_kernel": 4}
    MambaForCausalLM(MambaConfig(vocab_size=len(toy("chatml")), **sizes)).save_pretrained(tmp_path / "base")
    toy("chatml").save_pretrained(tmp_path / "base")
    words(tmp_path / "train.jsonl")
    return tmp_path


def settings(folder: Path, **evaluate: Any) -> Any:
    return parse_config(run_file(folder, evaluate={"general": None, "report": False, **evaluate}))


def test_it_trains_and_is_planned_without_answers(mamba: Path) -> None:
    display = Said()
    assert plan(settings(mamba), display).steps == 6
    train(settings(mamba), display=display)
    result = json.loads((mamba / "run/result.json").read_text())
    assert result["eval"]["after"]["loss"] > 0 and result["failed"] == {}
    # Where generation learns to do without a cache, there are answers; silently none is what must not be.
    assert bool(result["answers"]) != bool(result["eval"]["unanswered"])
    said = sum("no answers to held-out rows" in line for line in display.lines)
    assert said == (0 if result["answers"] else 2), "once by the plan, once by the run"


def test_a_metric_that_needs_them_is_refused_before_the_first_step(mamba: Path, monkeypatch) -> None:
    def cant(*args: Any, **options: Any) -> Any:
        raise InputError("no key-value cache")

    monkeypatch.setattr(measuring, "add_answers", cant)
    with pytest.raises(InputError, match="key-value cache"):
        train(settings(mamba, metrics=["exact_match"]), display=Said())
    assert not (mamba / "run/checkpoints").exists()
