"""Which threads torch computes with: one for many small decompositions, and none that is left over from elsewhere.

LAPACK's work on a matrix of some hundred rows is a long chain of short steps; with several threads they wait for each
other at each. On a busy machine that made 42 modules take 23 s instead of 0.2 s, and it gains little on an idle one.
Several modules at once, a thread each, is what uses the cores.

OpenMP keeps a team of waiting threads for each thread that has run torch, as long as that thread lives. Once all teams
together have more threads than the machine has cores, libgomp lets none of them spin any more, and each product waits
for the system to wake its helpers. So a program that opens a model in one thread and decodes in another decodes slowly:
16 rows of SmolLM2-135M on two cores made 130 tokens/s instead of 200. `apart` opens it in a thread that ends.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on a single thread for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def apart(call: Callable[[], T]) -> T:
    """What `call` gives or raises, from a thread that ends with it and takes its team along. A signal that comes
    meanwhile is handled here, and doesn't wait for it."""
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(call))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="deltaw-apart", daemon=True)
    thread.start()
    given = outcome.result()
    thread.join()
    return given
