"""A head that trains: its log-probabilities and every gradient are those of the changed matrix itself."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw.kernels import logprobs
from deltaw.kernels.changed_head import FactorsChange, HeadChange, RowsChange, WholeChange, changed_logprobs
from deltaw.kernels.logprobs import IGNORE
from deltaw.kernels.lora import Factors
from deltaw.kernels.weight import DenseWeight

T, D, V = 13, 6, 11


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


W, H, LABELS = (
    drawn(V, D, seed=1),
    drawn(T, D, seed=2),
    torch.tensor([3, IGNORE, 0, 10, 5, 5, 2, IGNORE, 9, 1, 7, 3, 4]),
)
INDEX = torch.tensor([12, 5, 0])  # one of them behind the last row, one of a gap of two


def change_of(kind: str, tensors: tuple[Tensor, ...]) -> HeadChange:
    if kind == "rows":
        return RowsChange(INDEX, *tensors, more=2)
    return FactorsChange(Factors(*tensors, 0.7)) if kind == "factors" else WholeChange(*tensors)


TENSORS = {"rows": (drawn(3, D),), "factors": (drawn(2, D), drawn(V, 2, seed=4)), "whole": (drawn(V, D),)}


def plain(kind: str, tensors: tuple[Tensor, ...]) -> Tensor:
    """The changed matrix; a row that nobody has is of no weight."""
    if kind == "rows":
        return torch.cat([W, W.new_zeros(2, D)]).index_copy(0, INDEX, tensors[0])
    return W + 0.7 * tensors[1] @ tensors[0] if kind == "factors" else tensors[0]


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.5}, {"bias_V": drawn(V, seed=5)}, {"rows": 1}])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_changed_head_is_the_changed_matrix(kind: str, options: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 3 * 8 * V)  # three rows at a time
    options = dict(options)
    rows_K = torch.arange(T) if options.pop("rows", None) else None
    tensors = tuple(t.clone().requires_grad_() for t in TENSORS[kind])
    twins = tuple(t.clone().requires_grad_() for t in TENSORS[kind])
    h, twin = H.clone().requires_grad_(), H.clone().requires_grad_()
    logp_K, loss = changed_logprobs(h, DenseWeight(W), LABELS, change_of(kind, tensors), rows_K=rows_K, **options)
    bias_V = options.get("bias_V")
    z_TV = twin @ plain(kind, twins).T
    if bias_V is not None:
        z_TV = z_TV + F.pad(bias_V, (0, z_TV.shape[1] - V))
    z_TV = z_TV * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        z_TV = cap * torch.tanh(z_TV / cap)
    if kind == "rows":  # the row of the gap
        z_TV = z_TV.index_fill(1, torch.tensor([11]), -1e300 if not cap else -cap)
    labelled = LABELS != IGNORE
    wanted = z_TV[labelled].log_softmax(1).gather(1, LABELS[labelled][:, None])[:, 0]
    got = logp_K if rows_K is None else logp_K[labelled]
    torch.testing.assert_close(got, wanted)
    assert loss.item() == pytest.approx(-wanted.sum().item())
    weights_K = torch.linspace(-1, 2, len(wanted), dtype=torch.float64)
    ((got * weights_K).sum() + 0.3 * loss).backward()
    ((wanted * weights_K).sum() - 0.3 * wanted.sum()).backward()
    for mine, other in zip((h, *tensors), (twin, *twins), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation makes, views of `weight` aside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.numbers, self.weight = 0, weight

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.data_ptr() != self.weight.data_ptr():
            self.numbers = max(self.numbers, made.numel())
        return made


def test_rows_make_nothing_of_the_vocabularys_size() -> None:
    words, d, rows = 4000, 64, 20
    weight, index = drawn(words, d, dtype=torch.float32), torch.tensor([3, 700, 3999])
    trained, h = drawn(3, d, dtype=torch.float32).requires_grad_(), drawn(rows, d, dtype=torch.float32).requires_grad_()
    labels = torch.arange(rows)
    with Largest(weight) as largest:
        changed_logprobs(h, DenseWeight(weight), labels, RowsChange(index, trained, 0)).loss.backward()
    assert largest.numbers <= rows * words < weight.numel() and trained.grad is not None
