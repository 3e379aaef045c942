"""What stops a run that learns nothing lets one go on that has learnt."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltaw.config import TrainConfig, parse_config
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.errors import RunError
from deltaw.show.progress import Display
from deltaw.training.checkpoint import TrainState
from deltaw.training.run import train
from deltaw.training.watch import ENOUGH, EVERY, NOTHING, PATIENCE, Unfit, Watch, check_loss
from tests.tiny import run_file

RATE = 1e-2
BATCH = pack([Example(torch.arange(5).numpy(), torch.ones(5).bool().numpy(), "o:1")])


class Run:
    """Updates of one layer by hand, each with some gradient."""

    def __init__(self, *, taken: int = 0) -> None:
        self.factors = {"a": nn.Parameter(torch.ones(4, 8)), "b": nn.Parameter(torch.zeros(8, 4))}
        layer = SimpleNamespace(trained=lambda: self.factors)
        attached: Any = SimpleNamespace(layers={"q_proj": layer})
        self.said: list[str] = []
        self.watch = Watch(attached, TrainConfig(lr=RATE), 10_000, taken=taken, say=self.said.append)

    def updates(self, count: int, size: float, gradient: float = 1e-20) -> None:
        for _ in range(count):
            for factor in self.factors.values():
                factor.grad = torch.full_like(factor, gradient)
            with self.watch.update(RATE, 1.0, [BATCH]), torch.no_grad():
                for factor in self.factors.values():
                    factor -= size


def test_a_run_that_has_learnt_and_comes_to_rest_goes_on_and_is_warned_of_once() -> None:
    run = Run()
    run.updates(50, 1e-3)
    run.updates(10 * EVERY, 0.0)
    assert len(run.said) == 1 and "warning" in run.said[0]


def test_a_parameter_that_never_moved_stops_the_run() -> None:
    run = Run()
    run.updates(PATIENCE - 1, 1e-12)  # below the rounding of A, which is 1; B, which is 0, moves
    with pytest.raises(RunError, match="1 parameters") as stopped:
        run.updates(1, 1e-12)
    assert "q_proj.a" in stopped.value.what and not run.said


@pytest.mark.parametrize("gradient", [1e-20, 0.0])
def test_a_resumed_run_that_is_at_rest_goes_on(gradient: float) -> None:
    run = Run(taken=500)
    run.updates(3 * EVERY, 0.0, gradient)
    assert len(run.said) <= 1


def test_modules_without_a_gradient_stop_a_run_at_its_beginning() -> None:
    run = Run()
    with pytest.raises(RunError, match="no gradient in 10 updates"):
        run.updates(PATIENCE, 1e-3, 0.0)


@given(st.lists(st.floats(0, 1e30), min_size=ENOUGH, max_size=ENOUGH), st.floats(0, 1e30), st.floats(1.001, 1e6))
def test_no_loss_is_a_spike_where_nothing_can_be_lost(recent: list[float], loss: float, times: float) -> None:
    """And no history, all zeros included, makes it fail otherwise."""
    config, state = TrainConfig(skip_spikes=times), TrainState(recent=recent)
    try:
        check_loss(loss, ["a:1"], state, config)
    except Unfit:
        assert loss > times * NOTHING and loss > times * sorted(recent)[ENOUGH // 2 - 1]


def test_rows_of_two_tokens_are_named_as_what_leaves_attention_without_a_gradient(folder: Path) -> None:
    rows = [{"text": letter} for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = run_file(folder, data={"train": str(folder / "two.jsonl")}, evaluate={"general": None, "report": False})
    options = {**fields["train"], "tokens_per_step": 16, "tokens_per_batch": 16}
    options.pop("eval_every", None)
    settings = parse_config({**fields, "train": options})
    with pytest.raises(RunError) as stopped:
        train(settings, display=Display(quiet=True))
    assert "4 of 14 adapted modules" in stopped.value.what
    assert "mlp" in str(stopped.value.fix) and "second" in str(stopped.value.fix)
