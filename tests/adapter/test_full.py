"""Full fine-tuning's layer: the suite of every layer, and ΔW's own gradient."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter
from deltaw.adapter.full import FullUpdate
from deltaw.base.frozen import FrozenLinear
from deltaw.config import AdapterSpec
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from deltaw.kinds import Dense
from tests.adapter.test_layer import KINDS, M, N, bits, plain, rows, same

SPEC = AdapterSpec(full=True)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-{kind[2]}")
def base(request: pytest.FixtureRequest) -> nn.Module:
    return plain(*request.param)


def model() -> nn.Sequential:
    return nn.Sequential(plain(nn.Linear, True, torch.float32), nn.Tanh(), nn.Linear(M, N).requires_grad_(False))


def test_a_fresh_layer_is_the_base_to_the_bit(base: nn.Module) -> None:
    x = rows(base)
    assert torch.equal(FullUpdate(FrozenLinear(base))(x), base(x))


def test_only_delta_learns_by_the_formula_and_the_base_keeps_its_bits(base: nn.Module) -> None:
    before, layer, x = bits(base), FullUpdate(FrozenLinear(base)), rows(base)
    g = torch.randn(2, 5, M).to(x.dtype)
    layer(x).backward(g)
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["delta"]
    wide = g.flatten(0, 1).double().T @ x.flatten(0, 1).double()
    eps = torch.finfo(x.dtype).eps
    assert (layer.delta.grad.double() - wide).norm() <= 4 * eps * wide.norm()
    assert same(before, base)


def test_it_computes_w_plus_delta_with_and_without_gradients(base: nn.Module) -> None:
    layer, x = FullUpdate(FrozenLinear(base)), rows(base)
    for _ in range(2):  # the kept sum must follow ΔW
        layer.set_factors(Dense(torch.randn(M, N)))
        with torch.no_grad():
            assert torch.equal(layer(x), layer.fuse()(x))
        assert torch.equal(layer(x), layer.fuse()(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_another_kind_or_shape_is_refused() -> None:
    layer = FullUpdate(FrozenLinear(nn.Linear(N, M)))
    for wrong in (Dense(torch.zeros(M, N + 1)), LowRank(torch.zeros(1, N), torch.zeros(M, 1))):
        with pytest.raises(ValueError, match="does not fit"):
            layer.set_factors(wrong)


def test_saved_and_loaded_it_computes_the_same_and_off_again_nothing_changed(tmp_path: Path) -> None:
    net = model()
    before, x = bits(net), torch.randn(4, N)
    attached = attach(net, SPEC)
    for layer in attached.layers.values():
        layer.set_factors(Dense(torch.randn(layer.delta.shape)))
    out = net(x)
    adapter = detach(attached)
    assert same(before, net) and adapter.parameters == 2 * M * N
    adapter.save(tmp_path)
    back = Adapter.load(tmp_path)
    assert back.spec == adapter.spec and back.spec.full
    attach(net, back)
    assert torch.equal(net(x), out)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    adapter = Adapter(SPEC.model_copy(update={"targets": ("0",)}), {"0": Dense(torch.randn(M, N))})
    adapter.save(tmp_path)
    record = json.loads((tmp_path / "deltaw.json").read_text())
    (tmp_path / "deltaw.json").write_text(json.dumps({**record, "spec": {"rank": 4}}))
    with pytest.raises(InputError, match=r"delta\.safetensors"):
        Adapter.load(tmp_path)
    (tmp_path / "deltaw.json").write_text(json.dumps({**record, "spec": None}))
    with pytest.raises(InputError, match="its spec"):
        Adapter.load(tmp_path)
    with pytest.raises(RunError, match="NaN"):
        Adapter(adapter.spec, {"0": Dense(torch.full((M, N), torch.nan))}).save(tmp_path)
    with pytest.raises(ValueError, match="spec"):
        Adapter(adapter.spec, {"0": LowRank(torch.zeros(1, N), torch.zeros(M, 1))}).save(tmp_path)


def test_a_full_spec_takes_no_fields_of_factors() -> None:
    with pytest.raises(InputError, match="full fine-tuning has no rank, dropout"):
        AdapterSpec(full=True, rank=4, dropout=0.1)


def test_conv1d_keeps_its_own_layout() -> None:
    layer = FullUpdate(FrozenLinear(Conv1D(M, N)))
    layer.set_factors(Dense(torch.randn(M, N)))
    assert layer.fuse().weight.shape == (N, M)


def test_the_kept_sum_is_dropped_after_a_step_of_fused_adamw() -> None:
    layer, x = FullUpdate(FrozenLinear(nn.Linear(N, M).requires_grad_(False))), torch.randn(5, N)
    with torch.no_grad():
        layer(x)
    optimizer = torch.optim.AdamW([layer.delta], fused=True)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(layer(x), layer.fuse()(x))
