"""The GPU kernels' tests: tensors where the kernels run (Triton's interpreter on a CPU; a GPU with TRITON_INTERPRET=0),
and the budget |fast − truth| ≤ |plain − truth| + one rounding, truth being the plain twin in float64.

The interpreter cuts a float32 off to bfloat16 where a GPU rounds it, which is less than that one rounding.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0" else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Values = Sequence[Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def assert_within_budget(
    fast: Values, plain: Callable[..., Values], *inputs: Tensor, terms: Values | None = None
) -> None:
    """`plain` is run twice: in the inputs' dtype and, for truth, in float64. `terms`: the size of which each result's
    rounding is, where that isn't its own."""
    truth = plain(*(x.double() if x.is_floating_point() else x for x in inputs))
    terms = [t.abs().max() for t in truth] if terms is None else terms
    for f, p, t, term in zip(fast, plain(*inputs), truth, terms, strict=True):
        assert f.shape == t.shape and bool(f.isfinite().all())
        rounding = torch.finfo(f.dtype).eps * term
        assert (f.double() - t).abs().max() <= (p.double() - t).abs().max() + rounding


def with_gradients(call: Callable[..., Tensor], wanted: int) -> Callable[..., Values]:
    """(inputs..., d) -> the result and the gradients of the first `wanted` inputs for d = ∂L/∂result."""

    def run(*inputs: Tensor) -> Values:
        *values, d = inputs
        leaves = [v.detach().requires_grad_(i < wanted) for i, v in enumerate(values)]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves[:wanted], d.to(y.dtype))]

    return run
