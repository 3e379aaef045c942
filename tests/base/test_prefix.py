"""Prefix: a pass begun above the frozen layers is the pass begun at the bottom."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached, attach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.prefix import lowest_layer
from deltaw.config import AdapterSpec
from tests.architectures import PACKED, tiny

LENGTHS = (6, 3, 9)
SPEC = AdapterSpec(rank=4, alpha=8)
TOP = dict.fromkeys(PACKED, "model.layers.1.") | {"gpt2": "transformer.h.1.", "gpt_neox": "gpt_neox.layers.1."}


def batch(seed: int = 0) -> Batch:
    tokens = torch.randint(3, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    return Batch.of(tokens, [0, 6, 9, 18], tokens.roll(-1))


def topped(name: str) -> tuple[Forward, Attached]:
    """A model with an adapter on its second layer alone, B not zero."""
    model = tiny(name)
    forward = plan_forward(model)
    everything = attach(tiny(name), SPEC).paths
    targets = tuple(path for path in everything if path.startswith(TOP[name]))
    attached = attach(model, SPEC.model_copy(update={"targets": targets}))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(std=0.2)
    return forward, attached


def nothing(done: int) -> None:
    pass


def step(forward: Forward, attached: Attached, given: Batch) -> list[Tensor]:
    loss, _ = forward.loss(given)
    return [loss.detach(), *torch.autograd.grad(loss, attached.parameters)]


@pytest.mark.parametrize("name", PACKED)
def test_same_bits_from_the_kept_rows(name: str) -> None:
    forward, attached = topped(name)
    truth = step(forward, attached, batch())
    lowest = lowest_layer(attached.paths)
    assert lowest is not None and lowest[1] == 1
    above = forward.above(*lowest, [batch()], nothing)
    assert "1 frozen layers computed once" in above.describe()
    assert all(torch.equal(a, b) for a, b in zip(step(above, attached, batch()), truth, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step(forward, attached, batch()), truth, strict=True))


def test_the_layers_below_are_not_run_and_unknown_documents_are() -> None:
    forward, attached = topped("llama")
    calls: list[Any] = []
    attached.model.model.layers[0].mlp.register_forward_hook(lambda *seen: calls.append(seen))
    above = forward.above("model.layers", 1, [batch()], nothing)
    calls.clear()
    step(above, attached, batch())
    assert not calls
    truth = step(forward, attached, batch(1))
    calls.clear()
    got = step(above, attached, batch(1))
    assert calls and all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))


def test_documents_may_come_in_another_order_and_company() -> None:
    forward, attached = topped("qwen3")
    above = forward.above("model.layers", 1, [batch(), batch(1)], nothing)
    tokens = torch.cat([batch(1).tokens_T[9:], batch().tokens_T[:6]])
    mixed = Batch.of(tokens, [0, 9, 15], tokens.roll(-1))
    got, truth = step(above, attached, mixed), step(forward, attached, mixed)
    assert all(torch.allclose(g, t, rtol=1e-4, atol=1e-5) for g, t in zip(got, truth, strict=True))


class _Remembers(nn.Module):
    """A first layer whose output isn't all that the second one needs."""

    def __init__(self, layer: nn.Module, memory: dict[str, Tensor], writes: bool) -> None:
        super().__init__()
        self.layer, self.memory, self.writes = layer, memory, writes

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.writes:
            self.memory["seen"] = self.memory.get("seen", 0) + hidden_states
            return self.layer(hidden_states, **kwargs)
        return self.layer(hidden_states, **kwargs) + self.memory.pop("seen", torch.zeros(()))


def test_layers_that_hand_on_more_than_their_output_are_left_alone() -> None:
    model = tiny("llama")
    forward = plan_forward(model)
    memory: dict[str, Tensor] = {}
    model.model.layers[0] = _Remembers(model.model.layers[0], memory, True)
    model.model.layers[1] = _Remembers(model.model.layers[1], memory, False)
    assert forward.above("model.layers", 1, [batch()], nothing) is forward
    assert isinstance(model.model.layers[0], _Remembers)


def test_remove_puts_the_layers_back() -> None:
    forward, attached = topped("llama")
    layers, names = list(attached.model.model.layers), list(attached.model.state_dict())
    above = forward.above("model.layers", 1, [batch()], nothing)
    assert list(attached.model.state_dict()) == names
    assert above.prefix is not None
    above.prefix.remove()
    assert all(a is b for a, b in zip(attached.model.model.layers, layers, strict=True))


@pytest.mark.parametrize(
    ("paths", "lowest"),
    [
        (["model.layers.3.mlp.up_proj", "model.layers.12.mlp.up_proj"], ("model.layers", 3)),
        (["transformer.h.0.attn.c_attn"], ("transformer.h", 0)),
        (["a.1.x", "b.2.x"], None),
        (["lm_head"], None),
    ],
)
def test_lowest_layer(paths: list[str], lowest: tuple[str, int] | None) -> None:
    assert lowest_layer(paths) == lowest
