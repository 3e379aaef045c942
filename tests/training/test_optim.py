"""The learning rate: a pure function of the step. What decays, and towards what."""

from typing import Any

import pytest
import torch
from torch import nn

from deltaw.adapter.attach import attach
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.training.optim import learning_rate, make_optimizer, warmup_steps


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warms_up_then_follows_its_schedule(schedule: str) -> None:
    config = TrainConfig(lr=1.0, warmup_steps=10, schedule=schedule)
    rates = [learning_rate(step, 200, config) for step in range(200)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else 0 < rates[-1] < 0.01


@pytest.mark.parametrize("asked", [1, 5, 10, 100, 199])
def test_the_warm_up_that_was_asked_for_is_honoured(asked: int) -> None:
    config = TrainConfig(lr=1.0, warmup_steps=asked, schedule="constant")
    rates = [learning_rate(step, 200, config) for step in range(200)]
    assert rates.index(1.0) == asked and rates[:asked] == [(step + 1) / (asked + 1) for step in range(asked)]


def test_one_that_is_left_open_is_at_most_a_tenth_of_a_short_run() -> None:
    config = TrainConfig(lr=1.0, schedule="constant")
    assert [warmup_steps(total, config) for total in (5, 20, 99, 100, 5000)] == [0, 2, 9, 10, 10]
    assert learning_rate(0, 5, config) == 1.0
    assert learning_rate(2, 20, config) == 1.0


@pytest.mark.parametrize("spec", [{}, {"magnitude": True}, {"init": "pissa"}, {"init": "olora"}, {"full": True}])
def test_weight_decay_alone_leads_back_to_the_base(spec: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).requires_grad_(False)
    x = torch.randn(4, 6)
    attached = attach(model, AdapterSpec(targets=("0",), **({"rank": 2} if "full" not in spec else {}), **spec))
    base = attached.layers["0"].base(x)
    with torch.no_grad():
        for name, parameter in attached.layers["0"].trained().items():
            if name != "magnitude":
                parameter.add_(torch.randn(parameter.shape))
    before = (model(x) - base).norm()
    optimizer = make_optimizer(attached, TrainConfig(lr=0.1, weight_decay=0.5, lr_ratio_b=2.0 if not spec else 1.0))
    for _ in range(200):
        for parameter in attached.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert before > 0.1 and (model(x) - base).norm() < 1e-2 * before
