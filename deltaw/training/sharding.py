"""The frozen base over the ranks, where it doesn't fit into each: FSDP2 (`fully_shard`) of it, and of nothing else.

    units      each decoder layer; the embedding and the head, unless they are one matrix. A rank keeps its part of the
               rows of every tensor; a unit is gathered when its forward begins, freed after it, and again for its
               backward. A norm, a tied embedding and places, which would be gathered for most of a pass, stay whole.
    adapter    whole on every rank, in `ignored_params`. FSDP then leaves its gradients alone, and the ranks would
               silently part; they are summed as without sharding (step.py, `World.add`), so that steps, clipping,
               checkpoints and the file are those of one process, and a run resumes with and without.
    tensors    of any type, side by side: what is gathered are bytes, so packed matrices are sharded like dense ones.
    kernels    keep a `Weight` between forward and backward, a view of the gathered tensor. FSDP frees that storage and
               fills the same one again before the unit's backward, so that the view is right when it is used.

A gather is done by all ranks or by none. In steps and evaluations all make the same number of passes: who has no batch
left passes one for nothing (step.py). What rank 0 does alone (preflight, measurements, answers) it does while it
`leads`: before each gather it names the unit, and the others, in `follow`, gather it with it.

Loading: the ranks of one machine take turns. Each reads the base into the memory of the CPU, tries it and puts the
adapter on, as without sharding, then keeps its part of it, unit by unit, on its device. So a machine holds the whole
base once, and a GPU never more than its part and a unit.

Rejected. One FSDP group with the adapter in it: its factors, moments and checkpoints become DTensors, and rank 0 alone
can do nothing. Gathering head and embedding for the whole of a step: as much memory as without sharding them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaw.base.batch import Batch
from deltaw.base.source import Source
from deltaw.config import RunConfig
from deltaw.errors import InputError
from deltaw.files.output import gib
from deltaw.model import Model
from deltaw.training.memory import free_memory, release
from deltaw.training.world import ALONE, World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

ROOM = 0.7  # of the free memory, for a whole base: the rest is for its steps
BYTES = {"bfloat16": 2.0, "int8": 1.1, "nf4": 0.6}  # of a number in a packed base, about
OVER = -1  # in place of a unit: rank 0 has finished what it did alone


class Shards:
    """What of the base is sharded; nothing (`not shards`) where all of it is on every rank."""

    def __init__(self, units: Sequence["FSDPModule"] = (), world: World = ALONE) -> None:
        self._units, self._world = list(units), world
        self._leads = False
        for number, unit in enumerate(self._units):
            unit.set_custom_all_gather(_Gather(self, number))  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self._units)

    @contextmanager
    def leads(self) -> Iterator[None]:
        """Around what rank 0 does alone with the model, while the others `follow`."""
        if not self:
            yield
            return
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
        self._world.first(lambda: OVER, "what rank 0 does alone")  # an error, in its place, ends all
        for unit in self._units:
            unit.reshard()

    def follow(self) -> None:
        """Gather what rank 0 needs, until it has finished."""
        while self and (number := self._world.first(lambda: OVER, "what rank 0 does alone")) != OVER:
            self._units[number].unshard()
            self._units[number].reshard()

    def gather(self, number: int, whole: Tensor, part: Tensor, *, in_background: bool) -> Any:
        """Put the parts of all ranks together: all of unit `number`."""
        if self._leads:
            self._world.first(lambda: number, "what rank 0 does alone")
        return self._world.gather(whole, part, "a part of the base", in_background=in_background)


NONE = Shards()


class _Gather:
    """FSDP's communication of a unit, as `set_custom_all_gather` takes it."""

    def __init__(self, shards: Shards, number: int) -> None:
        self._shards, self._number = shards, number

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self._shards.gather(self._number, output_tensor, input_tensor, in_background=async_op)


def is_wanted(
    config: RunConfig,
    source: Source,
    skeleton: nn.Module,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> bool:
    """Whether the base is to be sharded, which a line says: `train.shard`, and for auto whether it fits. Raises
    InputError where it can't be, or wouldn't fit either."""
    wish = config.train.shard
    if world.is_alone:
        if wish == "always":
            say("train.shard: always does nothing in one process")
        return False
    if wish == "never":
        return False
    size, free = base_bytes(config, source, skeleton), free_memory(device)
    free //= world.local_size if device.type == "cpu" else 1
    every = world.gathered([int(size > ROOM * free), free], "the free memory")
    if wish == "auto" and not any(tight for tight, _ in every):
        return False
    least, part = min(free for _, free in every), size // world.size
    if part > least:
        raise InputError(
            f"the base takes {gib(size)}: {gib(part)} on each of {world.size} ranks, and one has {gib(least)} free",
            fix="start more processes, or set base_weights: nf4",
        )
    if _layers(skeleton) is None:
        raise InputError(f"{source.name}: has no list of layers, so it can't be sharded", fix="set train.shard: never")
    why = f", and {gib(least)} are free" if wish == "auto" else ""
    say(f"base sharded over {world.size} ranks: it takes {gib(size)}{why}")
    return True


def base_bytes(config: RunConfig, source: Source, skeleton: nn.Module) -> int:
    """What the base takes in memory, about."""
    kept, numbers = str(config.base_weights), sum(parameter.numel() for parameter in skeleton.parameters())
    if kept == "keep" and source.gguf is not None:
        return source.gguf.stat().st_size
    return int(numbers * BYTES.get(kept, getattr(torch, config.train.dtype).itemsize))


def shard(model: Model, device: torch.device, world: World) -> tuple[Model, Shards]:
    """Keep this rank's part of the base on `device`, and the adapter whole. The others needn't be there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner, layers = model.base.model, _layers(model.base.model)
    assert model.attached is not None and layers is not None
    base: nn.Module = inner.base_model  # type: ignore[assignment]
    trained = {parameter for layer in model.attached.layers.values() for parameter in layer.parameters()}
    mesh = init_device_mesh(device.type, (world.size,))
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]  # type: ignore[operator]
    ends = [] if set(ends[0].parameters()) & set(ends[1].parameters()) else ends
    units: list[Any] = []
    for module in [*layers, *ends]:
        for parameter in set(module.parameters()) - trained:
            parameter.data = parameter.data.contiguous()  # FSDP takes no other: packed matrices may be views
        units.append(fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained))
        release(device)
    rest = {parameter for parameter in base.parameters() if not hasattr(parameter, "full_tensor")} | trained
    fully_shard(
        base, mesh=mesh, reshard_after_forward=True, ignored_params=rest
    )  # only to tell that they are one model
    for module in (base, *ends):  # nothing is written onto what they give
        warnings.filterwarnings("ignore", f"FSDP2-wrapped module .{type(module).__name__}")
    inner.to(device)
    return replace(model, base=replace(model.base, device=device)), Shards(units, world)


@torch.no_grad()
def first_pass(model: Model) -> None:
    """By all ranks: a pass of two tokens, by which FSDP learns what belongs together. Not in inference mode: the
    tensors into which it gathers are made now, and a backward is to use them."""
    rows_TX = model.forward.rows(Batch.of(torch.zeros(2, dtype=torch.long, device=model.base.device), [0, 2]))
    if model.forward.head is not None:  # it has been passed by
        model.forward.head.module(rows_TX)


def _layers(model: nn.Module) -> nn.ModuleList | None:
    """The list of modules that has the most of the model."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)
