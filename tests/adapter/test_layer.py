"""LoRAUpdate: one suite for every kind of layer it may stand on."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.layer import LoRAUpdate
from deltaw.base.frozen import FrozenLinear
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank

N, M, R, SCALE = 12, 8, 3, 0.5
KINDS = [*itertools.product((nn.Linear, Conv1D), (True, False), (torch.float32, torch.bfloat16))]


def plain(kind: type[nn.Module], bias: bool, dtype: torch.dtype) -> nn.Module:
    """A frozen base layer with random weights; a Conv1D always has a bias, here zero where there should be none."""
    module = nn.Linear(N, M, bias=bias) if kind is nn.Linear else Conv1D(M, N)
    nn.init.normal_(module.weight)
    if bias:
        nn.init.normal_(module.bias)
    return module.to(dtype).requires_grad_(False)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-{kind[2]}")
def base(request: pytest.FixtureRequest) -> nn.Module:
    return plain(*request.param)


def fresh(base: nn.Module, dropout: float = 0.0) -> LoRAUpdate:
    """As `attach` makes it: A random, B zero."""
    layer = LoRAUpdate(FrozenLinear(base), R, SCALE, dropout)
    layer.set_factors(LowRank(torch.randn(R, N), torch.zeros(M, R), SCALE))
    return layer


def trained(base: nn.Module, dropout: float = 0.0) -> LoRAUpdate:
    layer = fresh(base, dropout)
    layer.set_factors(LowRank(torch.randn(R, N), torch.randn(M, R), SCALE))
    return layer


def rows(base: nn.Module) -> Tensor:
    return torch.randn(2, 5, N).to(base.weight.dtype)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_fresh_layer_is_the_base_to_the_bit(base: nn.Module) -> None:
    x = rows(base)
    assert torch.equal(fresh(base)(x), base(x))


def test_only_the_factors_learn_and_the_base_keeps_its_bits(base: nn.Module) -> None:
    before, layer, x = bits(base), trained(base), rows(base)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    start = layer.factors()
    optimizer = torch.optim.AdamW([layer.lora_a, layer.lora_b], lr=0.1)
    for _ in range(3):
        layer(x).float().square().sum().backward()
        optimizer.step()
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    assert not torch.equal(start.a_RN, layer.lora_a) and not torch.equal(start.b_MR, layer.lora_b)
    assert all(p.grad is None for p in base.parameters())
    assert layer.base.module is base and same(before, base)


def test_factors_are_copies_and_go_back_in(base: nn.Module) -> None:
    layer, other, x = trained(base), fresh(base), rows(base)
    update = layer.factors()
    other.set_factors(update)
    assert torch.equal(other(x), layer(x)) and other.scale == layer.scale
    kept = layer.lora_a.detach().clone()
    update.a_RN.zero_()
    assert torch.equal(layer.lora_a, kept)


@pytest.mark.parametrize(("m", "n", "r"), [(M + 1, N, R), (M, N + 1, R), (M, N, R + 1)])
def test_an_update_of_another_shape_is_refused(m: int, n: int, r: int) -> None:
    layer = fresh(plain(nn.Linear, True, torch.float32))
    with pytest.raises(ValueError, match="layer takes rank=3"):
        layer.set_factors(LowRank(torch.zeros(r, n), torch.zeros(m, r)))


def test_fuse_makes_a_new_layer_and_rounds_once(base: nn.Module) -> None:
    before, layer = bits(base), trained(base)
    fused = layer.fuse()
    assert type(fused) is type(base) and fused is not base and same(before, base)
    assert fused.weight.dtype == base.weight.dtype and not fused.weight.requires_grad
    truth = FrozenLinear(base).weight.dense().double() + layer.factors().dense().double()
    error = (FrozenLinear(fused).weight.dense().double() - truth).abs()
    # Half a unit in the last place of the stored number, and the float32 sum's own roundings.
    eps = torch.finfo(base.weight.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert (error <= eps * (truth.abs() + 1e-2)).all()
    assert not torch.equal(fused.weight, base.weight)
    if base.bias is not None:
        assert torch.equal(fused.bias, base.bias)


def test_a_fused_layer_computes_what_the_layer_computes() -> None:
    base = plain(Conv1D, True, torch.float32)
    layer, x = trained(base), rows(base)
    torch.testing.assert_close(layer.fuse()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_dropout_is_random_in_training_and_off_in_eval(base: nn.Module) -> None:
    layer, x = trained(base, dropout=0.5), rows(base)
    assert not torch.equal(layer.train()(x), layer(x))
    without = trained(base)
    without.set_factors(layer.factors())
    assert torch.equal(layer.eval()(x), without(x))


def test_dropout_touches_the_update_alone_and_keeps_its_mean() -> None:
    base = plain(nn.Linear, True, torch.float32)
    layer, x = trained(base, dropout=0.5).train(), torch.randn(1, N)
    many = layer(x.expand(40_000, N)).mean(0)
    torch.testing.assert_close(many, layer.eval()(x)[0].detach(), rtol=0, atol=0.1)
    layer.set_factors(LowRank(torch.randn(R, N), torch.zeros(M, R), SCALE))
    assert torch.equal(layer.train()(x), base(x))


def test_disabled_it_is_the_base(base: nn.Module) -> None:
    layer, x = trained(base), rows(base)
    layer.enabled = False
    assert torch.equal(layer(x), base(x))
    layer.enabled = True
    assert not torch.equal(layer(x), base(x))


def test_saved_and_loaded_it_computes_the_same(base: nn.Module, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"proj": copy.deepcopy(base)})

    first, second, x = model(), model(), rows(base)
    attached = attach(first, AdapterSpec(rank=R, targets="proj"))
    for parameter in attached.parameters:
        nn.init.normal_(parameter)
    attach(second, Adapter.load(attached.adapter(BaseId()).save(tmp_path)))
    assert torch.equal(second["proj"](x), first["proj"](x))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_in_float64(kind: type[nn.Module], dropout: float) -> None:
    layer = trained(plain(kind, True, torch.float64), dropout).double().train()
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same mask each time
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, x)

    a, b = (p.detach().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    assert torch.autograd.gradcheck(output, (x, a, b))
