"""The form of a pass that a GPU takes sooner: factors beside the weights (adapter/folding.py) and the residual's
additions in the norms (adapter/residual.py). The same pass, by other kernels; so it is shown to be, on the run's own
first batch, before it is used: with random numbers in place of every B, so that no term is zero because training hasn't
begun, its gradient must be the plain pass's within what roundings make of it, for each kind of factor (all query
projections' A, say) by itself. A card or a model on which a kernel is wrong then trains as before, and a line says so.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from deltaw.adapter.attach import Attached
from deltaw.adapter.folding import fold
from deltaw.adapter.residual import FusedLayers

NOISE = 0.02  # of B while a pass is shown; entries of a weight are about as large
UNLIKE = 0.3  # of a gradient: ten times what half precision and dozens of layers come to, less than a missing term


class Faster:
    """For the passes of one adapter. `sums`: by factor, where its gradient is added up inside `on()`."""

    def __init__(self, attached: Attached) -> None:
        self._attached, self._folded, self._layers = attached, fold(attached), FusedLayers(attached.model)
        self.sums: dict[Tensor, Tensor] = {} if self._folded is None else self._folded.collect()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, passes take that form."""
        with ExitStack() as stack:
            for part in (self._folded, self._layers):
                if part is not None:
                    stack.enter_context(part.on())
            yield

    @contextmanager
    def noisy(self) -> Iterator[None]:
        """Inside, every B has numbers of its own; afterwards it is what it was, to the bit."""
        layers = self._attached.layers.values()
        factors = [part for layer in layers for name, part in layer.trained().items() if name == "b"]
        before = [factor.detach().clone() for factor in factors]
        with torch.no_grad():
            for number, factor in enumerate(factors):
                factor.normal_(std=NOISE, generator=torch.Generator(factor.device).manual_seed(number))
        try:
            yield
        finally:
            with torch.no_grad():
                for factor, value in zip(factors, before, strict=True):
                    factor.copy_(value)

    def off(self, mine: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
        """How far a gradient in this form is off the plain one, by kind of factor, at worst; 0 where the plain one
        isn't finite, since then nothing can be said."""
        kinds: dict[tuple[str, str], list[int]] = {}
        layers = self._attached.layers.items()
        for at, (path, name) in enumerate((path, name) for path, layer in layers for name in layer.trained()):
            kinds.setdefault((path.rpartition(".")[2], name), []).append(at)
        if not all(bool(gradient.isfinite().all()) for gradient in plain):
            return 0.0
        found = [difference([mine[at] for at in some], [plain[at] for at in some]) for some in kinds.values()]
        return max((off if off == off else math.inf for off in found), default=0.0)

    def undo(self) -> None:
        """Give every weight a storage of its own again."""
        if self._folded is not None:
            self._folded.undo()


def difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """‖some − others‖ / ‖others‖."""
    apart = torch._foreach_sub(list(some), list(others))
    sizes, differences = (
        torch.stack([norm.double() for norm in torch._foreach_norm(parts)]) for parts in (list(others), apart)
    )
    return float(differences.norm() / sizes.norm().clamp_min(1e-30))
