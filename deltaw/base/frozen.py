"""FrozenLinear: what an adapter needs to know of the layer underneath, and no more.

`torch.nn.Linear` stores its weight `[out, in]`, GPT-2's `Conv1D` stores it `[in, out]`. The adapter's
mathematics (y = x Wᵀ + b) should meet that difference in one place, so this module gives both the same face:
`weight_MN` is a *view* `[out, in]`, never a copy, and `forward` calls the wrapped module itself, so that a
fresh adapter is exactly the base, bit for bit, whatever kernel the base's own forward picks.

Wrapping writes nothing, `requires_grad` included: the base was frozen once, in `open_base`. `.module` is the
original object, so unwrapping is putting it back.

Only what computes x Wᵀ + b from its own weight can be wrapped, since an adapted layer computes that itself: the two
classes, their subclasses that leave `forward` as it is, and those whose own comes to the same (Falcon's). That is found
by value, on a copy of a few numbers in float64, where a quantising layer can't pass for rounding. A router or such a
layer, though it inherits from nn.Linear, is refused, as is a quantised one, whose weight is no plain matrix.

Rejected: converting Conv1D to Linear (it would write to the base and change its state dict), and subclassing
nn.Linear (its constructor allocates a weight of its own).

Letters: N in, M out, T rows.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FrozenLinear(nn.Module):
    """One interface over nn.Linear and Conv1D. Raises TypeError for a module that `can_wrap` refuses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not self.can_wrap(module):
            raise TypeError(f"{type(module).__name__} is neither nn.Linear nor Conv1D with a plain floating weight")
        self.module = module

    @staticmethod
    def can_wrap(module: nn.Module) -> bool:
        """True for nn.Linear and Conv1D, and what computes the same, with a plain 2-D floating Parameter as weight."""
        weight = getattr(module, "weight", None)
        # The exact type: bitsandbytes and torchao subclass nn.Linear and swap the parameter's class.
        return (
            isinstance(module, nn.Linear | Conv1D)
            and type(weight) is nn.Parameter
            and weight.ndim == 2
            and weight.dtype in PLAIN
            and _computes_linear(module)
        )

    @property
    def weight_MN(self) -> Tensor:
        """The weight as [out, in]: a view of the base's own storage."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def bias_M(self) -> Tensor | None:
        """The bias [out], or None."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.weight_MN.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_MN.shape[0]

    def forward(self, x_TN: Tensor) -> Tensor:
        """x Wᵀ + b as the wrapped module computes it. x: [..., in] -> [..., out]."""
        y_TM: Tensor = self.module(x_TN)
        return y_TM

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@torch.no_grad()
def _computes_linear(module: nn.Linear | Conv1D) -> bool:
    """Whether `forward` is x Wᵀ + b: the class's own, or one that gives that for small numbers in their place."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module):
        return True
    generator = torch.Generator().manual_seed(0)
    w_MN, bias_M, x_TN = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5,), (1, 4, 3))
    )
    small: nn.Module = copy.copy(module)
    small._parameters = {"weight": nn.Parameter(w_MN.T if isinstance(module, Conv1D) else w_MN)}
    small._parameters["bias"] = None if module.bias is None else nn.Parameter(bias_M)
    vars(small).update({"in_features": 3, "out_features": 5, "nx": 3, "nf": 5, "training": False})
    try:
        y = small(x_TN)
    except Exception:  # a stranger's code, on shapes it wasn't made for
        return False
    wanted = F.linear(x_TN, w_MN, None if module.bias is None else bias_M)
    return (
        isinstance(y, Tensor) and y.shape == wanted.shape and torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6)
    )
