"""What is packed how: a rule from `base_weights` to the form of each matrix (kernels/packed.py).

    linear layers                nf4, int8 or 16 bits, as `base_weights` says
    embeddings and the head      16 bits: they are a small share of a large model, and rounding them costs the most
    what doesn't fit             16 bits, and said: nf4 takes rows of a multiple of 64
    routers, a handful of rows   16 bits: a choice of experts isn't averaged, and they are small
    experts in one tensor        as they are, and said: they are no matrices of a module

16 bits are bfloat16 where products are made in 32 (nothing is lost: what is stored that way is cast in the product),
else the products' own type.

All that can be known to be impossible is refused before weights are read (`check_packing`).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deltaw.base.packed import LEAST, matrices
from deltaw.config import BaseWeights
from deltaw.errors import InputError, listed
from deltaw.kernels.int8 import to_int8
from deltaw.kernels.nf4 import BLOCK, check_nf4, fits_nf4, to_nf4
from deltaw.kernels.packed import CastWeight, PackedWeight
from deltaw.show.text import counted

QUANTISED: dict[str, Callable[[Tensor, torch.dtype], PackedWeight]] = {"nf4": to_nf4, "int8": to_int8}

ROUTERS, ROWS = ("gate", "router"), 16


def check_packing(weights: BaseWeights, skeleton: nn.Module | None = None) -> None:
    """Raise InputError where a base can't be kept like this. `skeleton`: its modules, without numbers."""
    if weights == "nf4":
        check_nf4()
    if weights not in QUANTISED or skeleton is None:
        return
    packing = Packing(weights, torch.bfloat16, skeleton)
    linear = {path: w_MN for path, w_MN in matrices(skeleton).items() if packing.is_asked_of(path, w_MN)}
    if not any(_fits(weights, w_MN) for w_MN in linear.values()):
        shapes = {f"{path.rpartition('.')[2]}: {' x '.join(map(str, w_MN.shape))}" for path, w_MN in linear.items()}
        wanted = f", which takes rows of a multiple of {BLOCK} numbers" if weights == "nf4" else ""
        raise InputError(
            f"base_weights: {weights}: no matrix of this base can be had in {weights}{wanted}:\n"
            f"{listed(sorted(shapes) or ['it has no large linear layer'], 2)}",
            fix=f"use base_weights: {'int8 or ' if linear and weights == 'nf4' else ''}bfloat16",
        )


class Packing:
    """How the matrices of one model are kept, for `pack_modules`; remembers which don't fit."""

    def __init__(self, weights: BaseWeights, dtype: torch.dtype, model: nn.Module) -> None:
        self.weights, self.dtype = weights, dtype
        self.unfit: list[str] = []
        self._ends = _ends(model)

    def __call__(self, path: str, w_MN: Tensor) -> PackedWeight | None:
        if self.weights in QUANTISED and self.is_asked_of(path, w_MN):
            if _fits(self.weights, w_MN):
                return QUANTISED[self.weights](w_MN, self.dtype)
            self.unfit.append(path)
        if self.dtype.itemsize == 2 and (self.weights in QUANTISED or self.dtype == torch.bfloat16):
            return None
        return CastWeight(w_MN.to(torch.bfloat16), self.dtype)

    def is_asked_of(self, path: str, w_MN: Tensor) -> bool:
        """Whether a matrix is one of those that `weights` means."""
        return path not in self._ends and path.rpartition(".")[2] not in ROUTERS and w_MN.shape[0] >= ROWS

    def notes(self, model: nn.Module) -> list[str]:
        """What isn't in the form that was asked for, in words."""
        lines = []
        if self.unfit:
            kinds = sorted({path.rpartition(".")[2] for path in self.unfit})
            what = counted(len(self.unfit), "matrix", "matrices")
            lines.append(
                f"base_weights: {self.weights}: {what} ({', '.join(kinds)}) have rows that aren't a multiple of "
                f"{BLOCK} numbers, and stay in 16 bits"
            )
        if large := _not_matrices(model.named_parameters()):
            numbers = sum(weight.numel() for _, weight in large)
            names = sorted({name.rpartition(".")[2] for name, _ in large})
            lines.append(
                f"base_weights: {self.weights}: {', '.join(names)} ({numbers:,} numbers) are experts in one tensor, "
                f"and stay in {str(large[0][1].dtype).removeprefix('torch.')}"
            )
        return lines


def _fits(weights: BaseWeights, w_MN: Tensor) -> bool:
    return weights != "nf4" or fits_nf4(w_MN)


def _ends(model: nn.Module) -> set[str]:
    """The paths of the embedding and the head."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    return {path for path, module in model.named_modules(remove_duplicate=False) if id(module) in ends}


def _not_matrices(parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [
        (name, one) for name, one in parameters if one.ndim > 2 and one.numel() >= LEAST and one.is_floating_point()
    ]
