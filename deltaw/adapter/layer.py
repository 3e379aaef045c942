"""A frozen linear layer with updates beside it: `AdaptedLinear`; what trains: `LayerUpdate` and its kind `LoRAUpdate`.

A model carries one update per layer or several: those of a sweep's learners, those that a server holds. They have
numbers (`Carried`), and a pass says which of its rows take which (`Segment`, read from the model's `Passing`); where it
doesn't say, all rows take the first. The base's product is one for all rows, and each update is added to its own
(kernels/lora.py). Updates that the kernels don't know (DoRA, full fine-tuning, dropout while it is on) are computed
segment by segment, each as a layer of its own.

The base stays the object it was and is never written to; what trains is a float32 master whatever the base's dtype
(an update smaller than bfloat16's rounding would otherwise be lost). `factors()` hands the update out as a value and
`fuse()` returns a new plain layer with the sum rounded once, so both ways back are new objects.

Dropout acts on the update's input alone (LoRA §4, as in PEFT); while it is on, autograd takes over from the
hand-written backward, since the update no longer sees the input that the base sees.

Some initialisers (init.py) begin at factors with B₀A₀ ≠ 0, and their authors take s B₀A₀ off the base's weight, so that
what they save belongs to a base nobody else has. Here the base keeps its weight and the update is the difference

    ΔW = s (B A − B₀A₀) = s [B₀ + E, E] [D; A₀],      A = A₀ + D,  B = B₀ + E

a plain LoRA of rank 2R on the original base. A₀ and B₀ are constants of the layer; D and E are what trains, zero at
first. Their gradients are those of A and B, so AdamW's steps are those of A and B, too (weight decay pulls towards the
start, that is towards ΔW = 0, as it does in plain LoRA). The kernels take the stacked factors like any others, and
autograd adds up what comes back. Rejected: [A; A₀] and [B, −B₀], the same ΔW as the small difference of two large
products: a fresh layer would be the base up to rounding only, and in bfloat16 the rounding of A and B (2⁻⁹ of B₀A₀)
would drown the first steps. This way it is the base to the bit, and the factors that are rounded are small.

Letters: N inputs, M outputs, R rank.
"""

import abc
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.base.batch import Passing
from deltaw.base.frozen import FrozenLinear
from deltaw.errors import RunError
from deltaw.factors import LowRank
from deltaw.kernels.lora import Factors, Projection, lora_linears
from deltaw.kernels.segments import Segments


@dataclass(frozen=True)
class Stored:
    """A weight's description. No tensor, so that using it past its layer, and the update, is an error (products with a
    tensor on the meta device, for one, give whatever lies in memory)."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size


class Carried:
    """Which updates a model carries, one for all its adapted layers. `first` is what rows take where a pass doesn't
    say."""

    def __init__(self, passing: Passing) -> None:
        self.passing = passing
        self.numbers: list[int] = []
        self.first = 0

    def free(self) -> int:
        """The lowest number that isn't taken."""
        return next(number for number in range(len(self.numbers) + 1) if number not in self.numbers)

    def add(self, number: int) -> None:
        """One more update is there."""
        self.numbers = sorted([*self.numbers, number])
        self.first = self.numbers[0]

    def remove(self, number: int) -> None:
        """And gone."""
        self.numbers = [other for other in self.numbers if other != number]
        self.first = self.numbers[0] if self.numbers else 0


class LayerUpdate(nn.Module, abc.ABC):
    """What trains beside one frozen layer. Called, it is that layer with this update alone; `enabled = False` leaves
    the base."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, or it would become a child: it is the layer's
        self.enabled = True

    @property
    def base(self) -> FrozenLinear:
        """The frozen layer that this is an update of."""
        return self._base[0]

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""

    def kernel_factors(self) -> Factors | None:
        """The update as the kernels take it now; None where they don't know it."""
        return None

    @property
    def for_kernels(self) -> bool:
        """Whether the kernels know it in training, too."""
        return False

    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names that checkpoints use."""

    def constants(self) -> dict[str, Tensor]:
        """What an initialiser left that doesn't train, by the names that checkpoints use."""
        return {}

    @abc.abstractmethod
    def factors(self) -> Any:
        """The update as a value (factors.py): copies, detached, on the layer's device."""

    @abc.abstractmethod
    def set_factors(self, update: Any) -> None:
        """Take an update's numbers. Raises ValueError when it is of another kind or shape."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A new layer of the base's own kind whose weight is W + ΔW, summed in float32 and rounded once."""
        weight = self.base.weight
        return self.base.with_weight(weight.dense().float() + self.factors().relative_to(weight).dense())


class AdaptedLinear(nn.Module):
    """A frozen layer and its updates, by their numbers; where it has none of a number, that number's rows are the
    base's."""

    def __init__(self, base: FrozenLinear, carried: Carried, *, sees_all: bool = True) -> None:
        """`sees_all`: the model hands it all rows of a pass in their order, which an expert isn't given."""
        super().__init__()
        self.base = base
        self.carried, self.passing = carried, carried.passing
        self.sees_all = sees_all
        self.updates = nn.ModuleDict()

    @property
    def weight(self) -> Stored:
        """What a model may ask of a weight that it doesn't use: how the base stores it."""
        weight = self.base.weight
        shape = weight.shape[::-1] if self.base.transposed else weight.shape
        return Stored(weight.dtype, weight.device, torch.Size(shape))

    def update(self, number: int) -> LayerUpdate | None:
        """The update of that number."""
        return self.updates._modules.get(str(number))  # type: ignore[return-value]

    def put_on(self, number: int, update: LayerUpdate) -> None:
        """One more update."""
        self.updates[str(number)] = update

    def take_off(self, number: int) -> None:
        """Without the update of that number."""
        del self.updates[str(number)]

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
        if not self.sees_all:
            raise RunError(
                "this layer is given only some of a pass's rows, so its rows can't take different updates",
                fix="carry one adapter at a time",
            )
        numbers = {segment.update for segment in segments}
        if unknown := numbers.difference(self.carried.numbers):
            raise ValueError(f"no update of number {min(unknown)}: the model carries {self.carried.numbers}")
        pairs = ((number, self.update(number)) for number in sorted(numbers))
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
                parts.append(taken.get(number, self.base)(x_TN[start:end]))
            at = end
        return torch.cat(parts).view(*x.shape[:-1], -1)


class LoRAUpdate(LayerUpdate):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ. Only `lora_a` [R, N] and `lora_b` [M, R] train, both float32.

    With `moves` they are the changes D and E from `initial_a` A₀ and `initial_b` B₀, which `start` sets.
    """

    initial_a: Tensor | None
    initial_b: Tensor | None

    def __init__(
        self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0, *, moves: bool = False
    ) -> None:
        super().__init__(base)
        (m, n), device = base.weight.shape, base.weight.device
        self.scale = scale
        self.dropout = dropout
        self.lora_a = nn.Parameter(torch.zeros(rank, n, device=device))
        self.lora_b = nn.Parameter(torch.zeros(m, rank, device=device))
        self.register_buffer("initial_a", torch.zeros_like(self.lora_a, requires_grad=False) if moves else None)
        self.register_buffer("initial_b", torch.zeros_like(self.lora_b, requires_grad=False) if moves else None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        factors = self.kernel_factors()
        if factors is None:
            a_KN, b_MK = self._acting()
            low = F.linear(F.dropout(x, self.dropout), a_KN.to(x.dtype))
            y: Tensor = self.base(x) + self.scale * F.linear(low, b_MK.to(x.dtype))
            return y
        return lora_linears(x, [Projection(self.base.weight, self.base.bias_M, {0: factors})])[0]

    def kernel_factors(self) -> Factors | None:
        """None while dropout is on."""
        return None if self.dropout and self.training else Factors(*self._acting(), self.scale)

    @property
    def for_kernels(self) -> bool:
        return not self.dropout

    def _acting(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW: A [R, N] and B [M, R], or the stacked ones of rank 2R."""
        if self.initial_a is None or self.initial_b is None:
            return self.lora_a, self.lora_b
        a_KN = torch.cat([self.lora_a, self.initial_a])
        return a_KN, torch.cat([self.initial_b + self.lora_b, self.lora_b], dim=1)

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.lora_a, "b": self.lora_b}

    def constants(self) -> dict[str, Tensor]:
        if self.initial_a is None or self.initial_b is None:
            return {}
        return {"initial_a": self.initial_a, "initial_b": self.initial_b}

    @torch.no_grad()
    def start(self, a_RN: Tensor, b_MR: Tensor) -> None:
        """Begin at these factors, with ΔW = 0: B is zero, or the layer `moves` and keeps them as A₀ and B₀."""
        if self.initial_a is None or self.initial_b is None:
            self.lora_a.copy_(a_RN)
            self.lora_b.copy_(b_MR)
            return
        self.initial_a.copy_(a_RN)
        self.initial_b.copy_(b_MR)
        self.lora_a.zero_()
        self.lora_b.zero_()

    @torch.no_grad()
    def factors(self) -> LowRank:
        a_KN, b_MK = self._acting()
        return LowRank(a_KN.clone(), b_MK.clone(), self.scale)

    @torch.no_grad()
    def set_factors(self, update: LowRank) -> None:
        """Take an update's factors and scale. Raises ValueError when its shape or rank is another, or its A₀ and B₀."""
        if not isinstance(update, LowRank):
            raise ValueError(f"a {type(update).__name__} update does not fit a LoRA layer")
        a, b = (factor.to(self.lora_a) for factor in (update.a_RN, update.b_MR))
        now_a, now_b = self._acting()
        if a.shape != now_a.shape or b.shape != now_b.shape:
            raise ValueError(f"update is {update.shape} of rank {update.rank}, layer takes {self.extra_repr()}")
        if self.initial_a is not None and self.initial_b is not None:
            rank = len(self.lora_a)
            a, initial_a, sum_b, b = a[:rank], a[rank:], b[:, :rank], b[:, rank:]
            if not (torch.equal(initial_a, self.initial_a) and torch.equal(sum_b, self.initial_b + b)):
                raise ValueError("the update began at other factors than this layer")
        self.lora_a.copy_(a)
        self.lora_b.copy_(b)
        self.scale = update.scale

    def extra_repr(self) -> str:
        return f"rank={self._acting()[0].shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
