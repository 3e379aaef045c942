"""Those who wait: clients take turns, whatever each of them has asked for."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """Somebody in the line."""

    @property
    def client(self) -> str:
        """Whom it is from."""

    @property
    def rows(self) -> int:
        """How many places it takes."""


W = TypeVar("W", bound=Waiter)


class Line(Generic[W]):
    """A queue for each client, and the clients in the order of their turns."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[W]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[W]:
        return iter([waiter for queue in self._queues.values() for waiter in queue])

    def add(self, waiter: W) -> None:
        """At the end of its client's queue."""
        self._queues.setdefault(waiter.client, deque()).append(waiter)

    def remove(self, waiter: W) -> bool:
        """It has left. False where it isn't in the line."""
        queue = self._queues.get(waiter.client, deque())
        if waiter not in queue:
            return False
        queue.remove(waiter)
        if not queue:
            del self._queues[waiter.client]
        return True

    def take(self, free: int, allowed: Callable[[W], bool]) -> W | None:
        """The first of the client whose turn it is and who is `allowed`, if it fits into the `free` places: one that
        takes many waits for them and isn't overtaken for ever. Its client's next turn is after all others'."""
        for client, queue in self._queues.items():
            if not allowed(queue[0]):
                continue
            if queue[0].rows > free:
                return None
            waiter = queue.popleft()
            del self._queues[client]
            if queue:
                self._queues[client] = queue
            return waiter
        return None
