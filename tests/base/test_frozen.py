"""FrozenLinear shows Linear and Conv1D with one face and changes neither."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.base.frozen import FrozenLinear


class Sub(nn.Linear):
    pass


MODULES = [nn.Linear(3, 5), nn.Linear(3, 5, bias=False), Sub(3, 5), Conv1D(5, 3)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
@torch.no_grad()
def test_one_face(module: nn.Module) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    grads = [weight.requires_grad for weight in module.parameters()]
    frozen = FrozenLinear(module)
    assert frozen.module is module
    assert (frozen.in_features, frozen.out_features) == (3, 5)
    assert frozen.weight.dense().shape == (5, 3)
    assert frozen.weight.dense().untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
    x_TN = torch.randn(2, 7, 3)
    y_TM = frozen(x_TN)
    assert torch.equal(y_TM, module(x_TN))
    torch.testing.assert_close(y_TM, nn.functional.linear(x_TN, frozen.weight.dense(), frozen.bias_M))
    assert grads == [weight.requires_grad for weight in module.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Packed(nn.Parameter):
    """What a quantising library puts in a Linear."""


def quantised() -> nn.Linear:
    module = nn.Linear(4, 4)
    module.weight = Packed(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    return module


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(3, 5), nn.Conv1d(3, 5, 1), nn.LayerNorm(3), nn.ReLU(), quantised(), nn.Bilinear(3, 3, 3)],
    ids=lambda module: type(module).__name__,
)
def test_everything_else_is_refused(module: nn.Module) -> None:
    assert not FrozenLinear.can_wrap(module)
    with pytest.raises(TypeError, match=type(module).__name__):
        FrozenLinear(module)
