"""What a client waits on: the pieces of its answers, handed from the worker's thread to the event loop."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from deltaw.serve.ask import Ask, Piece
from deltaw.serve.version import Served


class Answering(AsyncIterator[Piece]):
    """The answers to one Ask, as an async iterator of pieces. Iterating raises InputError for what was asked wrongly
    (an adapter that can't be put on this base, say), RunError for what failed while running.

    `served`: the adapter's version that answers, once it has begun; None for the base. `prompt_tokens`, and
    `generated_tokens`: all that were made so far, those of stop texts too. `submitted`: when it came, by the monotonic
    clock.
    """

    def __init__(self, ask: Ask, leave: Callable[["Answering"], None]) -> None:
        """Made in the event loop that waits for it. `leave`: what tells the worker that the client has left."""
        self.ask = ask
        self.submitted = time.monotonic()
        self.served: Served | None = None
        self.prompt_tokens, self.generated_tokens = len(ask.prompt), 0
        self.loop = asyncio.get_running_loop()
        self._leave = leave
        self._pieces: deque[Piece] = deque()
        self._begun = self._ended = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def client(self) -> str:
        """Whom it is from."""
        return self.ask.client

    @property
    def rows(self) -> int:
        """How many are decoded for it at a time."""
        return self.ask.n

    async def begun(self) -> None:
        """Wait until its rows are being decoded. Raises what keeps them from it."""
        while not self._begun and not self._ended:
            await self._change()
        if not self._begun and self._error is not None:
            raise self._error

    def __aiter__(self) -> "Answering":
        return self

    async def __anext__(self) -> Piece:
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._change()
        return self._pieces.popleft()

    def cancel(self) -> None:
        """The client has left: nothing more is decoded than the token that is being made. From any thread; nothing for
        one that has ended."""
        if not self._ended:
            self._leave(self)

    async def aclose(self) -> None:
        """The same, for `contextlib.aclosing`."""
        self.cancel()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # For the worker, in the event loop.

    def begin(self, served: Served | None) -> None:
        """Its rows are being decoded."""
        self._begun, self.served = True, served
        self._changed.set()

    def take(self, pieces: Sequence[Piece], tokens: int) -> None:
        """More of its answers, for which so many tokens were made."""
        self._pieces.extend(pieces)
        self.generated_tokens += tokens
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """No more comes."""
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()
