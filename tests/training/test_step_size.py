"""The size of a step that the data decides: steps enough where the data is small, 4,096 tokens where it isn't."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.commands.preview import preview_named
from deltaw.config import load_config, parse_config
from deltaw.data.example import Example
from deltaw.data.examples import Examples
from deltaw.errors import InputError
from deltaw.training.length import DOCUMENTS, FEW, USUAL, count_steps, notes, settle_step, warnings
from deltaw.training.plan import plan
from deltaw.training.run import train
from tests.tiny import Said, run_file
from tests.training.finished import NO_ANSWERS
from tests.training.test_loop import QUIET

FIELDS: dict[str, Any] = {"base": "b", "data": {"train": "t.jsonl"}, "output": "o"}
LENGTHS = st.lists(st.integers(2, 2048), min_size=1, max_size=200)


def dataset(lengths: list[int]) -> Any:
    examples = [Example(np.zeros(n, np.int32), np.ones(n, bool), "t:1") for n in lengths]
    return SimpleNamespace(train=Examples.of(examples), eval=[], report=SimpleNamespace(tokens=sum(lengths)))


def config(**options: Any) -> Any:
    return parse_config({**FIELDS, "train": options})


@given(LENGTHS, st.sampled_from([0.5, 1, 2, 10]))
def test_small_data_has_steps_enough_or_few_documents_in_each(lengths: list[int], epochs: float) -> None:
    rows, asked = dataset(lengths), config(epochs=epochs)
    settled = settle_step(asked, rows)
    size, total = settled.train.step_tokens, count_steps(settled, rows)
    assert 1 <= size <= USUAL
    assert total >= FEW or size <= DOCUMENTS * sum(lengths) / len(lengths) + 1
    assert settle_step(settled, rows) == settled  # once is for ever: the run's own file says it
    assert bool(warnings(asked, settled, rows, total)) == (total < FEW)
    assert bool(notes(asked, settled, total)) == (size < USUAL)


@given(LENGTHS, st.integers(1, 10_000))
def test_what_is_set_stays_and_so_does_the_usual_size_for_data_of_ordinary_size(lengths: list[int], size: int) -> None:
    assert settle_step(config(tokens_per_step=size), dataset(lengths)).train.tokens_per_step == size
    assert settle_step(config(), dataset([1000] * 103 + lengths)).train.tokens_per_step == USUAL


@given(LENGTHS, st.none() | st.integers(64, 8192), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([None, 2]))
def test_what_a_warning_says_to_set_helps(
    lengths: list[int], size: int | None, epochs: float, warmup: int | None
) -> None:
    options = {"tokens_per_step": size, "warmup_steps": warmup, "epochs": epochs}
    rows, asked = dataset(lengths), config(**options)
    settled = settle_step(asked, rows)
    try:
        total = count_steps(settled, rows)
    except InputError:  # a warm-up as long as the run
        return
    if total >= FEW:
        return
    (warning,) = warnings(asked, settled, rows, total)
    first = warning.split("set ")[1].split(" or ")[0]
    more = config(**{**options, "epochs": int(first.removeprefix("train.epochs="))})
    assert count_steps(settle_step(more, rows), rows) >= FEW
    if " or " in warning:
        smaller = int(warning.rsplit("=", 1)[1])
        assert count_steps(config(**{**options, "tokens_per_step": smaller}), rows) > total


@pytest.mark.parametrize("name", ["eval_every", "sample_every"])
def test_what_comes_only_after_the_end_is_said(name: str) -> None:
    held_out = {"train": "t.jsonl", "eval": 4}
    asked = parse_config({**FIELDS, "data": held_out, "train": {name: 8, "tokens_per_step": 64}})
    (line,) = notes(asked, asked, 7)
    assert f"train.{name}: 8" in line
    assert notes(asked, asked, 8) == []


def test_plan_preview_and_train_say_the_same_and_the_run_records_it(folder: Path) -> None:
    fields = run_file(folder, train={"lr": 1e-3, "dtype": "float32", "device": "cpu"}, evaluate=NO_ANSWERS)
    (folder / "run.yaml").write_text(json.dumps(fields))
    shown = preview_named(folder / "run.yaml", [], rows=1, display=QUIET)
    planned, said = plan(parse_config(fields), QUIET), Said()
    train(parse_config(fields), display=said)
    written = load_config(folder / "run/config.yaml").train
    result = json.loads((folder / "run/result.json").read_text())
    assert result["steps"] == shown.data["steps"] == planned.steps < FEW
    assert written.tokens_per_step == shown.data["tokens_per_step"] == planned.tokens_per_step < USUAL
    (few,) = [line for line in said.lines if "train.epochs=" in line]
    assert any(line in few for line in shown.data["warnings"]) and any(line in few for line in planned.length)
    assert (
        few.removeprefix("warning: ") in shown.text.replace("\n", "")
        and few.removeprefix("warning: ") in planned.text()
    )
