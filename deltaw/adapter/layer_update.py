"""What trains beside one frozen weight (`LayerUpdate`), the layer in the base's place that has such updates
(`AdaptedLayer`), and which of them a model carries (`Carried`).

A model carries one update per layer or several: those of a sweep's learners, those that a server holds. They have
numbers, and a pass says which of its rows take which (`Segment`, read from the model's `Passing`); where it doesn't
say, all rows take the first.

Letters: N inputs, M outputs.
"""

import abc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.frozen import FrozenEmbedding, FrozenLinear, Stored
from deltaw.base.passing import Passing
from deltaw.errors import InputError, RunError
from deltaw.kernels.changed_head import HeadChange
from deltaw.kernels.lora import Factors
from deltaw.kernels.segments import Segments
from deltaw.updates import Update


class Carried:
    """Which updates a model carries, one for all its adapted layers. `first` is what rows take where a pass doesn't
    say."""

    def __init__(self, passing: Passing) -> None:
        self.passing = passing
        self.numbers: list[int] = []
        self.first = 0
        self.changes = 0  # how often one came or went

    def free(self) -> int:
        """The lowest number that isn't taken."""
        return next(number for number in range(len(self.numbers) + 1) if number not in self.numbers)

    def add(self, number: int) -> None:
        """One more update is there."""
        self.numbers = sorted([*self.numbers, number])
        self.first = self.numbers[0]
        self.changes += 1

    def remove(self, number: int) -> None:
        """And gone."""
        self.numbers = [other for other in self.numbers if other != number]
        self.first = self.numbers[0] if self.numbers else 0
        self.changes += 1

    @contextmanager
    def leading(self, number: int) -> Iterator[None]:
        """Inside, rows take the update of that number where a pass doesn't say."""
        before, self.first = self.first, number
        self.changes += before != number
        try:
            yield
        finally:
            self.first = before
            self.changes += before != number

    @contextmanager
    def drawing_apart(self, number: int, seed: int, device: torch.device) -> Iterator[None]:
        """Inside, what is random in that update's segments comes from a stream of its own, begun at `seed`: the same
        numbers, whoever else is in the pass."""
        self.passing.streams[number] = torch.Generator(device).manual_seed(seed)
        try:
            yield
        finally:
            del self.passing.streams[number]

    @contextmanager
    def drawing(self, number: int) -> Iterator[None]:
        """Inside, torch's generator is that update's stream, if it has one: torch's dropout takes no other."""
        stream = self.passing.streams.get(number)
        if stream is None:
            yield
            return
        on_gpu = stream.device.type == "cuda"
        with torch.random.fork_rng([stream.device] if on_gpu else []):
            get, put = (
                (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
                if on_gpu
                else (torch.get_rng_state, torch.set_rng_state)
            )
            put(stream.get_state())
            yield
            stream.set_state(get())

    def check(self, numbers: Iterable[int]) -> None:
        """Raise ValueError for a number that isn't carried."""
        if unknown := set(numbers).difference(self.numbers):
            raise ValueError(f"no update of number {min(unknown)}: the model carries {self.numbers}")


class AdaptedLayer(nn.Module, abc.ABC):
    """A frozen layer and its updates, by their numbers; where it has none of a number, that number's rows are the
    base's. `base.module` is the model's own, which it stands for."""

    base: Any

    def __init__(self, carried: Carried, *, sees_all: bool = True) -> None:
        """`sees_all`: the model hands it all rows of a pass in their order, which an expert of its own isn't given."""
        super().__init__()
        self.carried, self.passing = carried, carried.passing
        self.sees_all = sees_all
        self.updates = nn.ModuleDict()

    @abc.abstractmethod
    def face(self, path: str) -> Any:
        """What an update of the weight at `path` is told of the base."""

    @abc.abstractmethod
    def put_on(self, number: int, update: "LayerUpdate") -> None:
        """One more update."""

    @abc.abstractmethod
    def sample(self) -> tuple[Tensor, ...]:
        """Arguments to call it with, of one row of random numbers."""

    @property
    @abc.abstractmethod
    def stored(self) -> Stored:
        """How the base stores its weights."""

    def weights(self, home: str) -> tuple[str, ...]:
        """The paths of what it can have updates of; `home`: its own."""
        return (home,)

    @abc.abstractmethod
    def fused(self, number: int) -> nn.Module:
        """A new module of the base's own kind whose weights are W + ΔW, summed in float32 and rounded once."""

    def has(self, number: int) -> bool:
        """Whether it has an update of that number."""
        return str(number) in self.updates

    def take_off(self, number: int) -> None:
        """Without the updates of that number."""
        del self.updates[str(number)]

    def numbers(self, segments: Segments) -> list[int]:
        """The updates that the rows of a pass take. Raises RunError where the layer can't tell its rows apart."""
        if not self.sees_all:
            raise RunError(
                "this layer is given only some of a pass's rows, so its rows can't take different updates",
                fix="carry one adapter at a time",
            )
        numbers = {segment.update for segment in segments}
        self.carried.check(numbers)
        return sorted(numbers)


class LayerUpdate(nn.Module, abc.ABC):
    """What trains beside one frozen layer. Called, it is that layer with this update alone; `enabled = False` leaves
    the base."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, or it would become a child: it is the layer's
        self.enabled = True

    @property
    def base(self) -> FrozenLinear | FrozenEmbedding:
        """The frozen layer that this is an update of."""
        return self._base[0]

    def looked_up(self, base: FrozenEmbedding, ids: Tensor) -> Tensor:
        """What the embedding `base` gives with this update on it. Of those that an embedding can have (ends.py)."""
        raise TypeError(f"a {type(self).__name__} isn't an update of an embedding")

    def on_head(self, base: FrozenLinear) -> HeadChange | None:
        """What the head `base` gives otherwise with this update on it; None while it is switched off. As above."""
        raise TypeError(f"a {type(self).__name__} isn't an update of a head")

    @property
    def height(self) -> int:
        """The rows of the base's weight, and more where tokens were added."""
        return self.base.out_features

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""

    def kernel_factors(self) -> Factors | None:
        """The update as the kernels take it now; None where they don't know it."""
        return None

    @property
    def strength(self) -> float:
        """The number beside its parameters that it depends on: LoRA's scale."""
        return 1.0

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

    def times(self, factor: float) -> "LayerUpdate":
        """Another update of the same layer, factor · ΔW, which shares this one's tensors. InputError where no multiple
        of it is an update of its kind, or it would share nothing."""
        raise InputError("only LoRA's scale can be chosen for each request", fix="ask for scale 1, or for 0, the base")

    @abc.abstractmethod
    def factors(self) -> Any:
        """The update as a value (factors.py): copies, detached, on the layer's device."""

    @abc.abstractmethod
    def set_factors(self, update: Any) -> None:
        """Take an update's numbers. Raises ValueError when it is of another kind or shape."""

    def home(self, path: str) -> str:
        """The path of the layer that it is an update of; `path`: its weight's."""
        return path

    def values(self, path: str) -> dict[str, Update]:
        """What an adapter holds of it, by path; `path`: its own."""
        update: Update = self.factors()
        return {path: update}

    def take_values(self, path: str, updates: Mapping[str, Update]) -> None:
        """Take its numbers from an adapter's. Raises ValueError where those aren't of its kind or shape."""
        self.set_factors(updates[path])

    def fused_onto(self, base: Any) -> nn.Module:
        """The same of the layer `base`, which is another than its own where one update stands in two (rows.py)."""
        return self.fuse()

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A new layer of the base's own kind whose weight is W + ΔW, summed in float32 and rounded once."""
        weight = self.base.weight
        return self.base.with_weight(weight.dense().float() + self.factors().relative_to(weight).dense())


class EndUpdate(LayerUpdate):
    """An update of an embedding or a head that isn't added to what the layer gives: rows or a matrix in its place."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, FrozenEmbedding):
            return self.looked_up(self.base, x)
        change = self.on_head(self.base)
        return self.base(x) if change is None else change.apply(x, self.base.weight, self.base.bias_M)
