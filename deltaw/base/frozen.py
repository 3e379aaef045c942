"""FrozenLinear: what an adapter needs to know of the layer underneath, and no more.

`torch.nn.Linear` stores its weight `[out, in]`, GPT-2's `Conv1D` stores it `[in, out]`. The adapter's
mathematics (y = x Wᵀ + b) should meet that difference in one place, so this module gives both the same face:
`weight_MN` is a *view* `[out, in]`, never a copy, and `forward` calls the wrapped module itself, so that a
fresh adapter is exactly the base, bit for bit, whatever kernel the base's own forward picks.

Wrapping writes nothing, `requires_grad` included: the base was frozen once, in `open_base`. `.module` is the
original object, so unwrapping is putting it back.

Only what computes x Wᵀ + b from its own weight can be wrapped, since an adapted layer computes that itself: the two
classes, and their subclasses that leave `forward` as it is. A router or a quantising layer that inherits from nn.Linear
and does something else is refused, as is a forward put on the instance, which would no longer run, and quantised
layers, whose weight is no plain matrix.

Rejected: converting Conv1D to Linear (it would write to the base and change its state dict), and subclassing
nn.Linear (its constructor allocates a weight of its own).

Letters: N in, M out, T rows.
"""

import torch
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
        """True for nn.Linear and Conv1D by their own forward, whose weight is a plain 2-D floating Parameter."""
        weight = getattr(module, "weight", None)
        computes = type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module)
        # The exact type: bitsandbytes and torchao subclass nn.Linear and swap the parameter's class.
        return (
            isinstance(module, nn.Linear | Conv1D)
            and computes
            and type(weight) is nn.Parameter
            and weight.ndim == 2
            and weight.dtype in PLAIN
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
