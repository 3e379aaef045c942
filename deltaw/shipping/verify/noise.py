"""How rounding moves *this* model's answers, measured: random errors of the right size put into a torch model.

A tolerance for log-probabilities can't be read off a table. The same rounding moves one model a hundred times further
than another, by its depth, its norms, its outliers. So the sizes of the errors come from the formats (formats.py), and
their effect is measured on the model, at the very positions that are compared:

    x ← x + σ_a(x) · n          what flows into each linear layer, as the activations' format rounds it
    y ← y + x (σ_w(W) ∘ n')ᵀ    its weight's errors: for one seed the same at every position, as in rounding
    y ← y + σ_a(y) · n          what comes out of every module, where activations are kept in a floating type
    y ← y + σ_w(y) · n          what comes out of an embedding, and of experts whose weights are stacked

with n, n' standard normal. Both sides' errors are put in, each with its own formats: two correct sides are expected to
differ by that much; SEEDS draws show how much it varies.

Rejected: rounding for real (one draw instead of several, and another side's kernels round elsewhere), noise on the
logits alone (its size is the question), and bounds from theory (a thousand times too wide after 30 layers).
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.vocabulary import AdaptedEmbedding
from deltaw.base.frozen import has_weight, weight_of
from deltaw.base.packed import PackedEmbedding
from deltaw.kernels.weight import AT_ONCE, Weight
from deltaw.shipping.verify.sides.formats import UNIT, error, exact, known
from deltaw.shipping.verify.sides.side import Numbers

EMBEDDINGS = (nn.Embedding, PackedEmbedding, AdaptedEmbedding)


@contextlib.contextmanager
def noisy(model: nn.Module, sides: Sequence[Numbers], seed: int) -> Iterator[None]:
    """The model with the rounding errors of all `sides` in it, for the length of a block. Nothing is written to it."""
    generator = torch.Generator().manual_seed(seed)
    handles = []
    weights = [side.weights for side in sides if not exact(side.weights)]
    activations = [name for side in sides for name in side.activations if not exact(name)] or ["float32"]
    formats = [side.activations[0] for side in sides if known(side.activations[0]) in UNIT]
    formats = [name for name in formats if not exact(name)] or ["float32"]
    linears = dict(_linears(model))
    whole = [*linears.values(), *(module for module in model.modules() if isinstance(module, AdaptedEmbedding))]
    inside = {id(child) for layer in whole for child in layer.modules()} - {id(x) for x in whole}

    def into(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (_shaken(given[0], activations, generator), *given[1:]) if given and _floats(given[0]) else None

    def out_of(_: nn.Module, __: Any, y: Any) -> Any:
        return _shaken(y, formats, generator) if _floats(y) else None

    def looked_up(_: nn.Module, __: Any, y: Any) -> Any:
        return _shaken(y, weights, generator) if _floats(y) else None

    def weighed(path: str, weight: Weight) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
            e = _of_weights(given[0], weight, weights, zlib.crc32(path.encode()) ^ seed)
            return y + F.pad(e, (0, y.shape[-1] - e.shape[-1])).to(y.dtype)  # a head that has new tokens is wider

        return hook

    try:
        for path, layer in linears.items():
            handles.append(layer.register_forward_pre_hook(into))
            if weights:
                handles.append(layer.register_forward_hook(weighed(path, _weight(layer))))
        for module in model.modules():
            if id(module) not in inside and module is not model:
                handles.append(module.register_forward_hook(out_of))
            stacked = any(weight.ndim == 3 for weight in module.parameters(recurse=False))  # experts
            if weights and id(module) not in inside and (stacked or isinstance(module, EMBEDDINGS)):
                handles.append(module.register_forward_hook(looked_up))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that multiply by a weight of the base; the parts of an adapted layer don't count on their own."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            inside |= {id(child) for child in module.modules()}
            if not isinstance(module, AdaptedEmbedding):
                yield path, module
        elif id(module) not in inside and ".lora_" not in path and has_weight(module):
            yield path, module


def _weight(layer: nn.Module) -> Weight:
    return layer.base.weight if isinstance(layer, AdaptedLinear) else weight_of(layer)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _shaken(x: Tensor, formats: Sequence[str], generator: torch.Generator) -> Tensor:
    variance = sum((error(name, x).square() for name in formats), torch.zeros(()))
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + variance.to(x.device).sqrt() * noise).to(x.dtype)


def _of_weights(x: Tensor, weight: Weight, formats: Sequence[str], seed: int) -> Tensor:
    """x Eᵀ, E the weight's errors of this seed, a few rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    m, n = weight.shape
    rows = max(1, AT_ONCE // n)
    parts = []
    for start in range(0, m, rows):
        part_MN = weight.rows(slice(start, start + rows)).detach()
        variance_MN = sum((error(name, part_MN).square() for name in formats), torch.zeros(()))
        e_MN = variance_MN.sqrt() * torch.randn(part_MN.shape, generator=generator).to(part_MN.device)
        parts.append(F.linear(x.float(), e_MN))
    return torch.cat(parts, -1)
