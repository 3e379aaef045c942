"""The LoRA layer: `AdaptedLinear`, a frozen linear layer with updates beside it, and `LoRAUpdate`, what LoRA trains.

    y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ

The base's product is one for all rows, and each update is added to its own rows (kernels/lora.py). Updates that the
kernels don't know (DoRA, full fine-tuning, dropout while it is on) are computed segment by segment, each as a layer of
its own.

The base stays the object it was and is never written to; what trains is a float32 master whatever the base's dtype
(an update smaller than bfloat16's rounding would otherwise be lost). `factors()` hands the update out as a value and
`fuse()` returns a new plain layer with the sum rounded once, so both ways back are new objects.

Dropout acts on the update's input alone (LoRA §4, as in PEFT); while it is on, autograd takes over from the
hand-written backward, since the update no longer sees the input that the base sees.

Letters: N inputs, M outputs, R rank, K the rank of the factors that act.
"""

import abc
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.layer_update import AdaptedLayer, Carried, LayerUpdate
from deltaw.base.frozen import FrozenLinear, Stored
from deltaw.factors import LowRank
from deltaw.kernels.lora import Factors, Projection, lora_linears
from deltaw.kernels.segments import Segments


class AdaptedLinear(AdaptedLayer):
    """A frozen linear layer and its updates."""

    base: FrozenLinear

    def __init__(self, base: FrozenLinear, carried: Carried, *, sees_all: bool = True) -> None:
        super().__init__(carried, sees_all=sees_all)
        self.base = base

    @property
    def weight(self) -> Stored:
        """What a model may ask of a weight that it doesn't use: how the base stores it."""
        return self.base.stored

    @property
    def stored(self) -> Stored:
        return self.base.stored

    def face(self, path: str) -> FrozenLinear:
        return self.base

    def update(self, number: int) -> LayerUpdate | None:
        """The update of that number."""
        return self.updates._modules.get(str(number))  # type: ignore[return-value]

    def put_on(self, number: int, update: LayerUpdate) -> None:
        self.updates[str(number)] = update

    def fused(self, number: int) -> nn.Module:
        update = self.update(number)
        assert update is not None
        return update.fused_onto(self.base)

    def sample(self) -> tuple[Tensor, ...]:
        weight, generator = self.base.weight, torch.Generator().manual_seed(0)
        return (torch.randn(1, weight.shape[1], generator=generator).to(weight.device, weight.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""
        segments = self.passing.current.segments
        if segments is None:
            update = self.update(self.carried.first)
            y: Tensor = self.base(x) if update is None else update(x)
            return y
        taken = self._taken(segments)
        if not taken:
            return self.base(x)
        if (projection := self._projection(taken, segments)) is not None:
            return lora_linears(x, [projection])[0]
        return self._by_segment(x, taken, segments)

    @property
    def for_kernels(self) -> bool:
        """Whether `projection` is all there is to the layer."""
        return all(update.for_kernels for update in self.updates.values())

    def projection(self) -> Projection:
        """The layer, in the pass that is running, as the kernels take it. Only where it is `for_kernels`."""
        segments = self.passing.current.segments
        if segments is None:
            update = self.update(self.carried.first)
            taken = {} if update is None or not update.enabled else {self.carried.first: update}
        else:
            taken = self._taken(segments)
        projection = self._projection(taken, segments)
        assert projection is not None
        return projection

    def _taken(self, segments: Segments) -> dict[int, LayerUpdate]:
        """The updates that the rows of a pass take here."""
        pairs = ((number, self.update(number)) for number in self.numbers(segments))
        return {number: update for number, update in pairs if update is not None and update.enabled}

    def _projection(self, taken: dict[int, LayerUpdate], segments: Segments | None) -> Projection | None:
        """None where the kernels don't know one of the updates."""
        updates = {}
        for number, update in taken.items():
            factors = update.kernel_factors()
            if factors is None:
                return None
            updates[number] = factors
        return Projection(self.base.weight, self.base.bias_M, updates, segments)

    def _by_segment(self, x: Tensor, taken: dict[int, LayerUpdate], segments: Segments) -> Tensor:
        """Each segment by its own update, rows between them by the base."""
        x_TN, parts, at = x.reshape(-1, x.shape[-1]), [], 0
        for number, start, end in (*segments, (None, len(x_TN), len(x_TN))):
            if not at <= start <= end <= len(x_TN):
                raise ValueError(f"a segment of the rows {start} to {end} after row {at}, of {len(x_TN)}")
            if start > at:
                parts.append(self.base(x_TN[at:start]))
            if number is not None and end > start:
                with self.carried.drawing(number):
                    parts.append(taken.get(number, self.base)(x_TN[start:end]))
            at = end
        return torch.cat(parts).view(*x.shape[:-1], -1)


class LowRankUpdate(LayerUpdate, abc.ABC):
    """scale · (x Aᵀ) Bᵀ beside x Wᵀ + bias. What trains is `lora_a` [R, N] and `lora_b` [M, R], both float32; how they
    make the factors that act is the kind's."""

    def __init__(self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        (m, n), device = base.weight.shape, base.weight.device
        self.scale = scale
        self.dropout = dropout
        self.lora_a = nn.Parameter(torch.zeros(rank, n, device=device))
        self.lora_b = nn.Parameter(torch.zeros(m, rank, device=device))

    @abc.abstractmethod
    def acting(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW: A [K, N] and B [M, K]."""

    @abc.abstractmethod
    def start(self, a_RN: Tensor, b_MR: Tensor) -> None:
        """Begin at these factors, with ΔW = 0."""

    @abc.abstractmethod
    def take(self, a_KN: Tensor, b_MK: Tensor) -> None:
        """Act with these factors, which have the right shapes. Raises ValueError where that can't be."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        factors = self.kernel_factors()
        if factors is None:
            a_KN, b_MK = self.acting()
            low = F.linear(F.dropout(x, self.dropout), a_KN.to(x.dtype))
            y: Tensor = self.base(x) + self.scale * F.linear(low, b_MK.to(x.dtype))
            return y
        return lora_linears(x, [Projection(self.base.weight, self.base.bias_M, {0: factors})])[0]

    def kernel_factors(self) -> Factors | None:
        """None while dropout is on."""
        return None if self.dropout and self.training else Factors(*self.acting(), self.scale)

    @property
    def strength(self) -> float:
        return self.scale

    @property
    def for_kernels(self) -> bool:
        return not self.dropout

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.lora_a, "b": self.lora_b}

    def times(self, factor: float) -> "LowRankUpdate":
        other = copy.copy(self)
        other.scale = factor * self.scale
        return other

    @torch.no_grad()
    def factors(self) -> LowRank:
        a_KN, b_MK = self.acting()
        return LowRank(a_KN.clone(), b_MK.clone(), self.scale)

    @torch.no_grad()
    def set_factors(self, update: LowRank) -> None:
        """Take an update's factors and scale. Raises ValueError when its kind, shape or rank is another."""
        if not isinstance(update, LowRank):
            raise ValueError(f"a {type(update).__name__} update does not fit a LoRA layer")
        a_KN, b_MK = (factor.to(self.lora_a) for factor in (update.a_RN, update.b_MR))
        if (a_KN.shape, b_MK.shape) != tuple(factor.shape for factor in self.acting()):
            raise ValueError(f"update is {update.shape} of rank {update.rank}, layer takes {self.extra_repr()}")
        self.take(a_KN, b_MK)
        self.scale = update.scale

    def extra_repr(self) -> str:
        return f"rank={self.acting()[0].shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRAUpdate(LowRankUpdate):
    """The factors that train are those that act; training begins at B = 0."""

    def acting(self) -> tuple[Tensor, Tensor]:
        return self.lora_a, self.lora_b

    @torch.no_grad()
    def start(self, a_RN: Tensor, b_MR: Tensor) -> None:
        self.take(a_RN, b_MR)

    @torch.no_grad()
    def take(self, a_KN: Tensor, b_MK: Tensor) -> None:
        self.lora_a.copy_(a_KN)
        self.lora_b.copy_(b_MK)
