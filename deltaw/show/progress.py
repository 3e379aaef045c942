"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere, always on stderr.

stdout belongs to results, so that `deltaw … --json | jq` works. A line a second would drown a log file, so off a
terminal progress is written at the first sign, at the end, and every `EVERY` seconds between.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 10.0  # seconds between plain lines
Update = Callable[..., None]  # update(done, note="")


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
    def task(self, name: str, total: int) -> Iterator[Update]:
        """Yields `update(done, note="")`."""
        if self.quiet:
            yield lambda done, note="": None
        elif sys.stderr.isatty() and self._bar is None:
            with self._rich(name, total) as update:
                yield update
        else:
            yield self._lines(name, total)

    @contextmanager
    def _rich(self, name: str, total: int) -> Iterator[Update]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            self._bar = bar
            task = bar.add_task(name, total=total, note="")
            try:
                yield lambda done, note="": bar.update(task, completed=done, note=note)
            finally:
                self._bar = None

    def _lines(self, name: str, total: int) -> Update:
        began = last = time.monotonic()
        first: int | None = None

        def update(done: int, note: str = "") -> None:
            nonlocal last, first, began
            now = time.monotonic()
            if first is None:
                first, began = done, now
            elif now - last < EVERY and done < total:
                return
            last = now
            fresh = done - first
            left = f", {clock((now - began) * (total - done) / fresh)} left" if fresh > 0 and done < total else ""
            self.say(f"{name}: {done}/{total}{', ' + note if note else ''}{left}")

        return update


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
