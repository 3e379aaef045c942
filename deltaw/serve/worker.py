"""The thread that owns model and engine, and what the event loop sees of it."""

from collections.abc import AsyncIterator

from deltaw.model import Model
from deltaw.serve.adapters import Adapters, Served
from deltaw.serve.ask import Ask, Piece
from deltaw.serve.figures import Figures


class Answering(AsyncIterator[Piece]):
    """The answers to one Ask, as an async iterator of pieces. Iterating raises InputError for what was asked wrongly
    (an adapter that can't be put on this base, say), RunError for what failed while running.

    `ask`, `served` (the adapter's version that answers, once begun; None for the base), `prompt_tokens`,
    `generated_tokens` (all that were made, those of stop texts too).
    """

    ask: Ask
    served: Served | None
    prompt_tokens: int
    generated_tokens: int

    async def begun(self) -> None:
        """Wait until its rows are being decoded. Raises what keeps them from it."""
        raise NotImplementedError

    async def __anext__(self) -> Piece:
        raise NotImplementedError

    def cancel(self) -> None:
        """The client has left: nothing more is decoded than the token that is being made. From any thread; nothing for
        one that has ended."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """The same, for `contextlib.aclosing`."""
        self.cancel()


class Worker:
    """One thread that answers. `slots`: how many rows one client may have decoded at a time; `queue`: how many requests
    may wait."""

    def __init__(self, model: Model, adapters: Adapters, *, slots: int = 16, queue: int = 256) -> None:
        self.model, self.adapters, self.slots, self.queue = model, adapters, slots, queue

    def start(self) -> None:
        """Begin to answer."""
        raise NotImplementedError

    def close(self, timeout: float = 10.0) -> None:
        """End all requests with an error and the thread within `timeout` seconds."""
        raise NotImplementedError

    def submit(self, ask: Ask) -> Answering:
        """Queue a request, from a running event loop. Raises Busy where the queue is full or the worker is closed,
        Unknown for an adapter that isn't served, and InputError for a prompt or a number that can't be."""
        raise NotImplementedError

    async def load(self, name: str) -> Served:
        """Read an adapter's files now, also after `drop`, and put it on the model. Raises Unknown or InputError."""
        raise NotImplementedError

    async def drop(self, name: str) -> None:
        """Serve it no more until `load`; requests that run end on it. Raises Unknown."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        """Whether it answers: for /health."""
        raise NotImplementedError

    def figures(self) -> Figures:
        """What has been counted so far."""
        raise NotImplementedError
