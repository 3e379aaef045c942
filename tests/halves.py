"""A weight that is no matrix: two summed halves, brought by a module of the tests. What passes with it leans on
`Weight` and on nothing else: there is no tensor W anywhere, and its products have no autograd."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.targets import linear_paths
from deltaw.base.frozen import FrozenLinear
from deltaw.kernels.weight import Weight


class Halves(Weight):
    """W = W₁ + W₂."""

    def __init__(self, one_MN: Tensor, other_MN: Tensor) -> None:
        self.halves = one_MN, other_MN

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.halves[0].shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.halves[0].dtype

    @property
    def device(self) -> torch.device:
        return self.halves[0].device

    @torch.no_grad()
    def matmul(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
        return twice(x_TN, *self.halves, bias_M)

    @torch.no_grad()
    def matmul_t(self, g_TM: Tensor, onto: Tensor | None = None) -> Tensor:
        one_MN, other_MN = self.halves
        onto = g_TM @ one_MN if onto is None else onto.addmm_(g_TM, one_MN)
        return onto.addmm_(g_TM, other_MN)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.halves[0][index] + self.halves[1][index]


class HalvesLinear(nn.Module):
    """x (W₁ + W₂)ᵀ + bias, of a linear layer's weight."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        frozen = FrozenLinear(like)
        w_MN = frozen.weight.dense().detach()
        generator = torch.Generator().manual_seed(w_MN.shape[0])
        one_MN = (w_MN * torch.rand(w_MN.shape, generator=generator).to(w_MN)).contiguous()
        self.one = nn.Parameter(one_MN, requires_grad=False)
        self.other = nn.Parameter((w_MN - one_MN).contiguous(), requires_grad=False)
        bias_M = frozen.bias_M
        self.bias = None if bias_M is None else nn.Parameter(bias_M.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return twice(x, self.one, self.other, self.bias)

    def frozen_weight(self) -> Weight:
        return Halves(self.one, self.other)

    def dense(self) -> nn.Linear:
        """The ordinary layer that this one is up to rounding."""
        m, n = self.one.shape
        linear = nn.Linear(n, m, bias=self.bias is not None, dtype=self.one.dtype).requires_grad_(False)
        linear.weight.data.copy_(self.one + self.other)
        if self.bias is not None:
            linear.bias.data.copy_(self.bias)
        return linear


def twice(x_TN: Tensor, one_MN: Tensor, other_MN: Tensor, bias_M: Tensor | None) -> Tensor:
    return F.linear(x_TN, one_MN, bias_M) + F.linear(x_TN, other_MN)


def halved(model: nn.Module) -> nn.Module:
    """The model with every linear layer but its head in halves, in place."""
    for path in linear_paths(model):
        model.set_submodule(path, HalvesLinear(model.get_submodule(path)))
    return model.eval()


def whole(model: nn.Module) -> nn.Module:
    """The ordinary model that a halved one is up to rounding, in place."""
    for path, module in list(_halves(model)):
        model.set_submodule(path, module.dense())
    return model.eval()


def _halves(model: nn.Module) -> Iterator[tuple[str, HalvesLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, HalvesLinear))
