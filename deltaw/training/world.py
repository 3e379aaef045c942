"""Many processes that train one adapter: `torchrun --nproc-per-node N -m deltaw train run.yaml`.

Rank 0 does all that a run does; the others take the steps with it. They open base and rows as it does, are given the
adapter, its moments and the state by it, and after that every rank decides everything by itself from the same numbers:

    step k        the documents that one process would take, their batches dealt out (data/loader.py)
    gradients     one buffer, summed over the ranks (`add`); the loss was divided by the tokens of *all* batches
    losses        of each batch, by its number in the step (`sums`): so a loss is the same sum in the same order at
                  every size of the world, and a NaN is seen by all, with its rows
    signals       a rank that was told to stop says so after the step (`most`), and all stop there
    checkpoints   rank 0's, after a hash of the adapter was compared (`check_alike`)

Two ways to talk. Sums run over torch.distributed (gloo on a CPU, nccl on GPUs; what is small goes over gloo always).
Everything rare (`first`, `gathered`, errors) goes through the store that torchrun has anyway, as JSON: who waits there
waits for as long as the other gives a sign, so rank 0 may download, measure or answer for hours without a timeout.

A rank that fails writes why into the store; the others look there while they wait, end with the same error, and rank 0
prints it. A rank that dies closes its connections (gloo: "Connection closed by peer", of whom it doesn't say), or
gives no sign of life (a counter in the store, by a thread): who that is, the store tells. A rank that lives and doesn't
come to a sum is named after `DELTAW_TIMEOUT` seconds (600). Rejected: gloo's `monitored_barrier` before each sum (it
names the rank, but is a round trip more in every step, and nccl has none).

One process has a world of its own, `ALONE`: no process group, no store, and every method gives back what it got. torch
is imported where it is used: the command line asks for the rank before it has it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from deltaw.errors import InputError, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deltaw.training.distributed import Link

Value = TypeVar("Value")


class World:
    """The processes of a run, as this one sees them. `rank` of `size`, `local_rank` of `local_size` on its machine."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._link: Link | None = None
        self._depth = self._generation = 0
        self.speaks = rank == 0  # whether it is this process that tells a person how it ends

    @staticmethod
    def of_environment() -> "World":
        """What torchrun says (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE); `ALONE` where nothing does. Always the
        same value in one process. Raises InputError."""
        return _of_environment()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0: the one that writes and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Around all that the processes do together; a block inside another one is part of it. What one raises in it,
        all raise: an error of another rank names that rank."""
        if self.is_alone or self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        from deltaw.training.distributed import Link

        self._generation += 1
        link = self._link = Link(self.rank, self.size, self._generation)
        self._depth = 1
        try:
            yield
            link.leave()
        except BaseException as error:
            ended = link.fail(error)
            self.speaks = link.speaks
            if ended is error:
                raise
            raise ended from error
        finally:
            self._depth, self._link = 0, None
            link.close()

    def start(self, device: "torch.device") -> None:
        """Make ready for sums of tensors on `device` (and of small ones on the CPU). By every rank."""
        if not self.is_alone:
            self._linked.start(device)

    def first(self, work: Callable[[], Value], what: str) -> Value:
        """What `work` gives on rank 0, as JSON, on every rank; the others wait for as long as rank 0 lives. What it
        raises, all raise."""
        if self.is_alone:
            return work()
        link = self._linked
        number = link.enter(what)
        if self.is_first:
            value = work()
            link.put(f"first/{number}", value)
            return value
        return link.get(f"first/{number}", 0)

    def gathered(self, value: Value, what: str) -> list[Value]:
        """Every rank's value (JSON), in their order, on every rank."""
        if self.is_alone:
            return [value]
        link = self._linked
        number = link.enter(what)
        link.put(f"all/{number}/{self.rank}", value)
        return [link.get(f"all/{number}/{rank}", rank) for rank in range(self.size)]

    def sums(self, values: Sequence[float], what: str) -> list[float]:
        """The sum over the ranks of each value, in float64; NaN and infinity come through."""
        return self._reduced(values, what, "SUM")

    def most(self, value: float, what: str) -> float:
        """The largest of all ranks' values."""
        return self._reduced([value], what, "MAX")[0]

    def _reduced(self, values: Sequence[float], what: str, kind: str) -> list[float]:
        if self.is_alone or not values:
            return list(values)
        import torch

        numbers = torch.tensor(values, dtype=torch.float64)
        self._linked.reduce(numbers, what, kind)
        return numbers.tolist()

    def add(self, tensors: Sequence["Tensor"], what: str) -> None:
        """Put the sum over the ranks into each tensor: one buffer, one sum. All of one dtype and device, and of the
        same shapes on every rank."""
        if self.is_alone or not tensors:
            return
        import torch

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._linked.reduce(flat, what, "SUM")
        self._put(flat, tensors)

    def hand_out(self, tensors: Sequence["Tensor"], what: str) -> None:
        """Put rank 0's numbers into the other ranks' tensors."""
        if self.is_alone or not tensors:
            return
        import torch

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._linked.broadcast(flat, what)
        if not self.is_first:
            self._put(flat, tensors)

    def gather(self, whole: "Tensor", part: "Tensor", what: str, *, in_background: bool = False) -> Any:
        """Put the parts of all ranks into `whole`, one after another. `in_background`: the work to wait for, or None
        where it is done."""
        return self._linked.gather(whole, part, what, in_background)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Around what the processes of one machine do one after another."""
        turns = max(self.gathered(self.local_size, "the turns"))
        for _ in range(self.local_rank):
            self.barrier("the turn of another rank")
        yield
        for _ in range(turns - self.local_rank):
            self.barrier("the turn of another rank")

    @staticmethod
    def _put(flat: "Tensor", tensors: Sequence["Tensor"]) -> None:
        import torch

        parts = flat.split([tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def check_alike(self, value: str, what: str) -> None:
        """Raise RunError, on all ranks, where one's `value` isn't rank 0's. `what` is it, in words: "the adapter"."""
        values = self.gathered(value, what)
        other = [rank for rank, one in enumerate(values) if one != values[0]]
        if other:
            names = ", ".join(map(str, other))
            raise RunError(
                f"{what} of rank {names} isn't that of rank 0",
                fix="run the same software and data on every machine, then resume from the newest checkpoint",
            )

    def barrier(self, what: str) -> None:
        """Wait until every rank is here."""
        self.gathered(None, what)

    def mark(self, name: str) -> None:
        """Leave a mark that outlives a restart of the processes by torchrun (--max-restarts)."""
        if not self.is_alone:
            self._linked.mark(name)

    def is_marked(self, name: str) -> bool:
        """Whether an earlier start of this same torchrun job has left that mark."""
        return not self.is_alone and self._linked.is_marked(name)

    @property
    def _linked(self) -> "Link":
        assert self._link is not None, "the ranks aren't joined"
        return self._link


ALONE = World()


@cache
def _of_environment() -> World:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given.get("WORLD_SIZE", "1") == "1" or "MASTER_ADDR" not in os.environ:
        return ALONE
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is gone is an error of ours, with no C++ frames
    try:
        rank, size, local_rank, local_size = (int(given[name]) for name in names)
    except (KeyError, ValueError):
        raise InputError(
            f"WORLD_SIZE is set, but {' and '.join(n for n in names if not given.get(n, '').isdigit())} isn't",
            fix="start several processes with torchrun --nproc-per-node N -m deltaw train run.yaml; for one, unset it",
        ) from None
    return World(rank, size, local_rank, local_size)
