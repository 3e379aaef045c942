"""Layers whose additions ride on their norms: the same losses and gradients, and the model's own layers outside."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import attach
from deltaw.adapter.folding import fold
from deltaw.adapter.residual import FusedLayer, FusedLayers
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.recompute import Recompute
from deltaw.config import AdapterSpec
from tests.architectures import tiny
from tests.training.test_step import batch, documents

LENGTHS = (9, 4, 12)
# Of two layers. The others' norms stand elsewhere too, or their layers have other parts.
EXPECTED = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma2": 0, "gemma3_text": 0, "olmo2": 0, "gpt2": 0}


def built(name: str, dtype: torch.dtype = torch.float64, change: Any = None) -> tuple[Forward, Any]:
    """(forward, attached), every factor drawn."""
    model = tiny(name, dtype)
    if change is not None:
        change(model)
    forward = plan_forward(model)
    attached = attach(forward.model, AdapterSpec(rank=3, alpha=6.0))
    with torch.no_grad():
        for n, parameter in enumerate(attached.parameters):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
    return forward, attached


def loss_and_gradients(forward: Forward, attached: Any) -> list[Tensor]:
    loss, _ = forward.loss(batch(documents(LENGTHS, 5)))
    return [loss.detach(), *torch.autograd.grad(loss, attached.parameters)]


def count(model: nn.Module) -> int:
    return sum(isinstance(module, FusedLayer) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", EXPECTED)
def test_which_layers_are_fused(name: str, dtype: torch.dtype) -> None:
    """And only inside: outside the model's layers are its own."""
    forward, _ = built(name, dtype)
    layers, own = FusedLayers(forward.model), list(forward.model.modules())
    assert len(layers) == EXPECTED[name]
    with layers.on():
        assert count(forward.model) == EXPECTED[name]
    assert list(forward.model.modules()) == own


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_losses_and_gradients_are_the_same(name: str, folding: bool) -> None:
    forward, attached = built(name)
    wanted = loss_and_gradients(forward, attached)
    layers, folded = FusedLayers(forward.model), fold(attached) if folding else None
    with layers.on():
        if folded is None:
            mine = loss_and_gradients(forward, attached)
        else:
            with folded.on():
                mine = loss_and_gradients(forward, attached)
    for m, w in zip(mine, wanted, strict=True):
        torch.testing.assert_close(m, w, rtol=1e-4, atol=1e-6)


def test_a_layers_recomputation_is_let_be() -> None:
    """Whichever comes first: a layer that runs again in the backward keeps its own additions, or has them fused."""
    forward, attached = built("llama")
    wanted, layers = loss_and_gradients(forward, attached), FusedLayers(forward.model)
    recompute = Recompute(forward.model, ["model.layers.0"], draws=False)
    assert len(FusedLayers(forward.model)) == 1
    with layers.on():
        assert count(forward.model) == 1
        mine = loss_and_gradients(forward, attached)
    recompute.remove()
    with layers.on():
        recompute = Recompute(forward.model, ["model.layers.0"], draws=False)
        again = loss_and_gradients(forward, attached)
        recompute.remove()
    for m, a, w in zip(mine, again, wanted, strict=True):
        torch.testing.assert_close(m, w)
        torch.testing.assert_close(a, w)


def test_stand_ins_that_are_off_are_off_here_too() -> None:
    """To the bit the base's own code, where the adapter is disabled."""
    forward, attached = built("llama", torch.float32)
    with attached.disabled():
        wanted, _ = forward.loss(batch(documents(LENGTHS, 5)))
    with FusedLayers(forward.model).on(), attached.disabled():
        mine, _ = forward.loss(batch(documents(LENGTHS, 5)))
    assert torch.equal(mine, wanted)


def test_a_layer_that_is_watched_keeps_its_code() -> None:
    forward, _ = built("llama")
    layers, calls = FusedLayers(forward.model), list[Any]()
    forward.model.get_submodule("model.layers.1").register_forward_hook(lambda *call: calls.append(call))
    with layers.on():
        forward.loss(batch(documents(LENGTHS, 5)))
    assert len(calls) == 1 and len(FusedLayers(forward.model)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
@pytest.mark.parametrize("factor", [0.22, 1.02])
def test_a_layer_of_another_formula_is_left_alone(part: str, factor: float, dtype: torch.dtype) -> None:
    """A factor on one of its branches, also beside a residual that is a hundred times as large."""

    def change(model: Any) -> None:
        layer = model.model.layers[1]
        own = type(layer)

        class Other(own):  # type: ignore[misc, valid-type]
            def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                by = {name: factor if name == part else 1.0 for name in ("self_attn", "mlp")}
                x = self.input_layernorm(hidden_states)
                hidden_states = hidden_states + self.self_attn(hidden_states=x, **kwargs)[0] * by["self_attn"]
                x = self.post_attention_layernorm(hidden_states)
                return hidden_states + self.mlp(x) * by["mlp"]

        layer.__class__ = Other
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(100)

    forward, _ = built("llama", dtype, change)
    assert list(FusedLayers(forward.model)._layers) == ["model.layers.0"]
