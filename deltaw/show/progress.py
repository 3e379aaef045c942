"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere, always on stderr.

stdout belongs to results, so that `deltaw … --json | jq` works. A line a second would drown a log file, so off a
terminal progress is written at the first sign, at the end, and every `EVERY` seconds between.

There are two ways to show progress, and no third. A function that knows how much it has to do takes the `display` and
opens a task. One that does a part of its caller's task takes a `progress` and says how much is done. Off by default
(`QUIET`, `unseen`): libraries don't speak unasked.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from deltaw.show.text import clock

EVERY = 10.0  # seconds between plain lines


Progress = Callable[[int], None]  # how much of a task is done; whoever opened it knows how much there is


class Task(Protocol):
    """The progress of a task that is open, with a few words beside the figure where there is something to say."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Display:
    """`say` a line; `task` shows progress with time left. `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None  # the rich.Progress on screen, if any

    def say(self, text: str = "") -> None:
        """A line above whatever bar is on screen."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Yields what is to be told of the progress, up to `total`."""
        if self.quiet:
            yield lambda done, note="": None
        elif sys.stderr.isatty() and self._bar is None:
            with self._rich(name, total) as progress:
                yield progress
        else:
            yield self._lines(name, total)

    @contextmanager
    def _rich(self, name: str, total: int) -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            self._bar = bar
            task = bar.add_task(name, total=total, note="", amount=amount(0, total))
            try:
                yield lambda done, note="": bar.update(task, completed=done, note=note, amount=amount(done, total))
            finally:
                self._bar = None

    def _lines(self, name: str, total: int) -> Task:
        began = last = time.monotonic()
        first: int | None = None
        ended: str | None = None  # the note at the end: whoever counts may get there twice

        def progress(done: int, note: str = "") -> None:
            nonlocal last, first, began, ended
            if done >= total and ended == note:
                return
            ended = note if done >= total else None
            now = time.monotonic()
            if first is None:
                first, began = done, now
            elif now - last < EVERY and done < total:
                return
            last = now
            fresh = done - first
            left = f", {clock((now - began) * (total - done) / fresh)} left" if fresh > 0 and done < total else ""
            self.say(f"{name}: {amount(done, total)}{', ' + note if note else ''}{left}")

        return progress


def amount(done: int, total: int) -> str:
    """ "40 of 122 (32%)": 100 % is only said of all."""
    return f"{done:,} of {total:,} ({100 * done // max(total, 1)}%)"


QUIET = Display(quiet=True)


def unseen(done: int) -> None:
    """The progress of a task that nobody watches."""
