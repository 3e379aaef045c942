"""Folding changes where numbers lie and how sums are ordered, and nothing else."""

from typing import Any

import pytest
import torch
from torch import nn

from deltaw.adapter.attach import attach
from deltaw.adapter.folding import fold
from deltaw.base.forward import plan_forward
from deltaw.config import AdapterSpec
from tests.architectures import tiny
from tests.training.test_step import batch, documents

LENGTHS = (9, 4, 12)


def built(name: str, dtype: torch.dtype = torch.float64, **spec: Any) -> Any:
    """(forward, attached), every factor drawn."""
    forward = plan_forward(tiny(name, dtype))
    attached = attach(forward.model, AdapterSpec(rank=3, alpha=6.0, **spec))
    with torch.no_grad():
        for n, parameter in enumerate(attached.parameters):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
    return forward, attached


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.named_parameters() if not one.requires_grad}


NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"]
SPECS: list[dict[str, Any]] = [
    {"targets": ["q_proj", "v_proj"]},
    {"targets": ["down_proj"]},
    {"targets": ["gate_proj", "o_proj"]},
    {"rank_overrides": {"*.k_proj": 5, "*.up_proj": 1}},
    {"scaling": "rslora"},
]


@pytest.mark.parametrize(("name", "spec"), [*((name, {}) for name in NAMES), *(("llama", spec) for spec in SPECS)])
def test_losses_and_gradients_are_the_same(name: str, spec: dict[str, Any]) -> None:
    forward, attached = built(name, **spec)
    rows = batch(documents(LENGTHS, 5))
    loss, _ = forward.loss(rows)
    loss.backward()
    wanted = [parameter.grad for parameter in attached.parameters]
    before = {path: one.detach().clone() for path, one in matrices(forward.model).items()}
    folded = fold(attached)
    assert folded is not None
    sums = folded.collect()
    assert len(sums) == len(attached.parameters), "every factor is folded"
    for parameter in attached.parameters:
        parameter.grad = sums.get(parameter, torch.zeros_like(parameter))
    with folded.on():
        again, _ = forward.loss(rows)
        again.backward()
    torch.testing.assert_close(again, loss)
    for parameter, gradient in zip(attached.parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(one, before[path]) for path, one in matrices(forward.model).items()), "views of the same"
    folded.undo()
    after = matrices(forward.model)
    assert all(torch.equal(one, before[path]) and one.is_contiguous() for path, one in after.items())
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in after.values()), "nothing is kept"


def test_a_folded_base_is_the_base_for_whoever_reads_it_meanwhile() -> None:
    forward, attached = built("llama")
    rows = batch(documents(LENGTHS, 5))
    wanted = forward.logits(rows)
    folded = fold(attached)
    assert folded is not None
    torch.testing.assert_close(forward.logits(rows), wanted)
    with attached.disabled():
        base = forward.logits(rows)
    assert not torch.allclose(base, wanted)


@pytest.mark.parametrize("spec", [{"dropout": 0.2}, {"magnitude": True}])
def test_what_the_products_can_not_carry_is_left(spec: dict[str, Any]) -> None:
    _, attached = built("llama", **spec)
    assert fold(attached) is None


def test_a_layer_in_another_dtype_is_left() -> None:
    _, attached = built("llama")
    first, other = (attached.model.base_model.layers[at].mlp for at in (0, 1))
    other.down_proj.base.module.float()
    folded = fold(attached)
    assert folded is not None
    assert folded.of((first.down_proj,)) is not None and folded.of((other.down_proj,)) is None


@pytest.mark.parametrize("number", [0, 1])
def test_other_adapters_are_idle(number: int) -> None:
    forward, first = built("llama")
    second = attach(forward.model, AdapterSpec(rank=2, alpha=5.0, targets=["q_proj", "down_proj"]))
    with torch.no_grad():
        for n, parameter in enumerate(second.parameters):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(100 + n))
    mine, rows = (first, second)[number], batch(documents(LENGTHS, 5))
    with mine.leading():
        wanted, _ = forward.loss(rows)
        gradients = torch.autograd.grad(wanted, mine.parameters)
        folded = fold(mine)
        assert folded is not None
        sums = folded.collect()
        for parameter in mine.parameters:
            parameter.grad = sums[parameter]
        with folded.on():
            loss, _ = forward.loss(rows)
            loss.backward()
    torch.testing.assert_close(loss, wanted)
    for parameter, gradient in zip(mine.parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    folded.undo()
