"""LoRA on the experts of a mixture: `AdaptedExperts` in the place of a module of them, and what trains beside each of
its parameters.

    Σ_k weight_k · down_e(gate(in_e(x)))        in_e, down_e: x W_eᵀ + bias_e + scale · (x A_eᵀ) B_eᵀ

The router, its weights and what stands between the products are the model's own; rows are sorted by expert once and the
products are grouped (kernels/grouped.py). An update is of one parameter, all experts of it: A [E, R, N] and
B [E, M, R]. As a value it is E updates of ordinary kind, `LowRank`, by the paths `<parameter>[e]`, so whatever cuts,
adds, measures or merges updates needs to know nothing of experts; only here, in the file (peft_experts.py) and in the
targets do they go together.

A module may have updates of one of its parameters alone. What another module's update is for linear layers, an update
here is for the rows of its segments: tokens carry theirs to every expert that they are sent to.

Dropout acts on the update's input alone, as in layer.py, drawn for the rows of an update by themselves, whoever else is
in the pass. PEFT has none for parameters; what is saved says 0.

Letters: E experts, N inputs, M outputs, R rank, T tokens, K experts of each, S = T·K rows.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.layer_update import AdaptedLayer, Carried, LayerUpdate
from deltaw.base.experts import FrozenExperts, FrozenStack, called
from deltaw.base.frozen import Stored
from deltaw.config.adapter import expert_path
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kernels.grouped import Grouped, Routes, Stack, gather, grouped_linear, route, spread
from deltaw.updates import Update


@dataclass(frozen=True, eq=False)
class ExpertUpdates:
    """The updates of one parameter as a value, one `LowRank` for each expert, in their order, of one rank and scale."""

    each: tuple[LowRank, ...]

    def by_path(self, path: str) -> dict[str, LowRank]:
        """By the experts' own paths."""
        return {expert_path(path, number): update for number, update in enumerate(self.each)}

    @property
    def rank(self) -> int:
        """R, of each."""
        return self.each[0].rank

    def times(self, factor: float) -> "ExpertUpdates":
        """factor · ΔW."""
        return ExpertUpdates(tuple(update.times(factor) for update in self.each))

    def cpu(self) -> "ExpertUpdates":
        """On the CPU."""
        return ExpertUpdates(tuple(update.cpu() for update in self.each))


class ExpertsUpdate(LayerUpdate):
    """LoRA on all matrices of one parameter; what trains is `lora_a` [E, R, N] and `lora_b` [E, M, R], both float32."""

    def __init__(self, base: FrozenStack, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        (e, m, n), device = base.shape, base.stored.device
        self.scale, self.dropout = scale, dropout
        self.lora_a = nn.Parameter(torch.zeros(e, rank, n, device=device))
        self.lora_b = nn.Parameter(torch.zeros(e, m, rank, device=device))

    @property
    def stack_of_base(self) -> FrozenStack:
        """The frozen parameter."""
        stack: FrozenStack = self._base[0]
        return stack

    def home(self, path: str) -> str:
        return path.rpartition(".")[0]

    def acting(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW: A [E, K, N] and B [E, M, K]."""
        return self.lora_a, self.lora_b

    def stack(self) -> Stack:
        """As the kernels take it."""
        return Stack(*self.acting(), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("the experts' module is what is called")

    @property
    def strength(self) -> float:
        return self.scale

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.lora_a, "b": self.lora_b}

    def times(self, factor: float) -> "ExpertsUpdate":
        other = copy.copy(self)
        other.scale = factor * self.scale
        return other

    @torch.no_grad()
    def start(self, a_ERN: Tensor, b_EMR: Tensor) -> None:
        """Begin at these factors, with ΔW = 0."""
        self.take(a_ERN, b_EMR)

    @torch.no_grad()
    def take(self, a_EKN: Tensor, b_EMK: Tensor) -> None:
        """Act with these factors, which have the right shapes."""
        self.lora_a.copy_(a_EKN)
        self.lora_b.copy_(b_EMK)

    @torch.no_grad()
    def factors(self) -> ExpertUpdates:
        a_EKN, b_EMK = (factor.detach().clone() for factor in self.acting())
        return ExpertUpdates(tuple(LowRank(a, b, self.scale) for a, b in zip(a_EKN, b_EMK, strict=True)))

    @torch.no_grad()
    def set_factors(self, update: ExpertUpdates) -> None:
        if not isinstance(update, ExpertUpdates):
            raise ValueError(f"a {type(update).__name__} update does not fit experts")
        a_EKN = torch.stack([one.a_RN for one in update.each]).to(self.lora_a)
        b_EMK = torch.stack([one.b_MR for one in update.each]).to(self.lora_b)
        if (a_EKN.shape, b_EMK.shape) != tuple(factor.shape for factor in self.acting()):
            raise ValueError(
                f"updates of {tuple(b_EMK.shape)} and {tuple(a_EKN.shape)}, the layer: {self.extra_repr()}"
            )
        self.take(a_EKN, b_EMK)
        self.scale = update.each[0].scale

    def values(self, path: str) -> dict[str, Update]:
        return dict(self.factors().by_path(path))

    def take_values(self, path: str, updates: Mapping[str, Update]) -> None:
        each = (updates[expert_path(path, number)] for number in range(len(self.lora_a)))
        self.set_factors(ExpertUpdates(tuple(update.low_rank() for update in each)))

    def fuse(self) -> nn.Module:
        raise InputError("one parameter of experts can't be merged by itself")

    @torch.no_grad()
    def sum(self) -> Tensor:
        """W + ΔW [E, M, N] in float32."""
        total_EMN = self.stack_of_base.w_EMN.float()
        a_EKN, b_EMK = self.acting()
        return torch.baddbmm(total_EMN, b_EMK, a_EKN, alpha=self.scale)

    def extra_repr(self) -> str:
        return f"experts={len(self.lora_a)}, rank={self.acting()[0].shape[1]}, scale={self.scale:g}"


class MovingExpertsUpdate(ExpertsUpdate):
    """The same, begun at factors with B₀A₀ ≠ 0, whose product is taken off again (moving.py)."""

    initial_a: Tensor
    initial_b: Tensor

    def __init__(self, base: FrozenStack, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.register_buffer("initial_a", torch.zeros_like(self.lora_a, requires_grad=False))
        self.register_buffer("initial_b", torch.zeros_like(self.lora_b, requires_grad=False))

    def acting(self) -> tuple[Tensor, Tensor]:
        a_EKN = torch.cat([self.lora_a, self.initial_a], 1)
        return a_EKN, torch.cat([self.initial_b + self.lora_b, self.lora_b], 2)

    def constants(self) -> dict[str, Tensor]:
        return {"initial_a": self.initial_a, "initial_b": self.initial_b}

    @torch.no_grad()
    def start(self, a_ERN: Tensor, b_EMR: Tensor) -> None:
        self.initial_a.copy_(a_ERN)
        self.initial_b.copy_(b_EMR)
        self.lora_a.zero_()
        self.lora_b.zero_()

    @torch.no_grad()
    def take(self, a_EKN: Tensor, b_EMK: Tensor) -> None:
        rank = self.lora_a.shape[1]
        (a_ERN, initial_a), (sum_b, b_EMR) = a_EKN.split(rank, 1), b_EMK.split(rank, 2)
        if not (torch.equal(initial_a, self.initial_a) and torch.equal(sum_b, self.initial_b + b_EMR)):
            raise ValueError("the update began at other factors than this layer")
        self.lora_a.copy_(a_ERN)
        self.lora_b.copy_(b_EMR)


class AdaptedExperts(AdaptedLayer):
    """A module of experts and its updates: of each number, one for each of its parameters that is adapted."""

    base: FrozenExperts

    def __init__(self, base: FrozenExperts, carried: Carried, *, sees_all: bool = True) -> None:
        super().__init__(carried, sees_all=sees_all)
        self.base = base

    @property
    def stored(self) -> Stored:
        return self.base.stored

    def weights(self, home: str) -> tuple[str, ...]:
        return tuple(f"{home}.{name}" for name in self.base.module_names)

    def face(self, path: str) -> FrozenStack:
        return self.base.stack(path.rpartition(".")[2])

    def put_on(self, number: int, update: LayerUpdate) -> None:
        assert isinstance(update, ExpertsUpdate)
        if not self.has(number):
            self.updates[str(number)] = nn.ModuleDict()
        self.updates[str(number)][update.stack_of_base.name] = update  # type: ignore[operator]

    def sample(self) -> tuple[Tensor, ...]:
        first, stored = self.base.stack(self.base.module_names[0]), self.stored
        generator = torch.Generator().manual_seed(0)
        x_TN = torch.randn(1, first.shape[2], generator=generator).to(stored.device, stored.dtype)
        return x_TN, torch.zeros(1, 1, dtype=torch.int64, device=x_TN.device), torch.ones_like(x_TN[:, :1])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module that it stands for."""
        segments = self.passing.current.segments
        numbers = [self.carried.first] if segments is None else self.numbers(segments)
        taken = {number: updates for number in numbers if (updates := self._enabled(number))}
        if not taken:
            return self.base(*args, **kwargs)
        x, experts_TK, weights_TK = called(self.base.module, args, kwargs)
        x_TN = x.reshape(-1, x.shape[-1])
        routes = route(experts_TK, self.base.count, segments)
        rows_SN = spread(x_TN, routes)
        first, last = self.base.module_names
        inner_SI = self.base.inner(self._product(first, rows_SN, routes, taken))
        y_SN = self.base.after(self._product(last, inner_SI, routes, taken))
        weighted_SN = y_SN * weights_TK.reshape(-1)[routes.order_S][:, None]
        return gather(weighted_SN, routes).to(x.dtype).view(x.shape)

    def _enabled(self, number: int) -> dict[str, ExpertsUpdate]:
        """Those of that number that are switched on, by their parameters' names."""
        updates = self.updates._modules.get(str(number))
        named = {} if updates is None else updates._modules
        return {name: one for name, one in named.items() if isinstance(one, ExpertsUpdate) and one.enabled}

    def _product(
        self, name: str, x_SN: Tensor, routes: Routes, taken: Mapping[int, Mapping[str, ExpertsUpdate]]
    ) -> Tensor:
        stack = self.base.stack(name)
        updates = {number: updates[name] for number, updates in taken.items() if name in updates}
        low_SN = self._dropped(x_SN, routes, updates)
        stacks = {number: update.stack() for number, update in updates.items()}
        return grouped_linear(x_SN, Grouped(stack.w_EMN, stack.bias_EM, stacks), routes, low_SN)

    def _dropped(self, x_SN: Tensor, routes: Routes, updates: Mapping[int, ExpertsUpdate]) -> Tensor | None:
        """What the updates see where dropout is on: each draws for its own rows."""
        dropping = {number: one for number, one in updates.items() if one.dropout and one.training}
        if not dropping:
            return None
        if routes.updates is None:
            return F.dropout(x_SN, next(iter(dropping.values())).dropout)
        keep_SN = torch.ones_like(x_SN)
        for number, update in dropping.items():
            spans = routes.spans(number)
            rows = torch.cat([torch.arange(start, end, device=x_SN.device) for _, start, end in spans]) if spans else ()
            if len(rows):
                with self.carried.drawing(number):
                    keep_SN[rows] = F.dropout(keep_SN[rows], update.dropout)
        return x_SN * keep_SN

    @torch.no_grad()
    def fused(self, number: int) -> nn.Module:
        return self.base.with_weights({name: update.sum() for name, update in self._enabled(number).items()})
