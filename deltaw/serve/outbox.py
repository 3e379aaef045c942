"""What a thread has to say to event loops: kept until the end of its round, then handed over with one call per loop."""

import asyncio
from collections.abc import Callable

Call = Callable[[], None]


class Outbox:
    """Belongs to the thread that tells. A loop that is closed hears nothing."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[Call]] = {}

    def tell(self, loop: asyncio.AbstractEventLoop, call: Call) -> None:
        """Have it called in the event loop, at the end of the round."""
        self._calls.setdefault(loop, []).append(call)

    def flush(self) -> None:
        """The end of a round."""
        out, self._calls = self._calls, {}
        for loop, calls in out.items():

            def tell(calls: list[Call] = calls) -> None:
                for call in calls:
                    call()

            if not loop.is_closed():
                loop.call_soon_threadsafe(tell)
