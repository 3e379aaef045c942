"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere, always on stderr.

stdout belongs to results, so that `deltaw … --json | jq` works. A line a second would drown a log file, so off a
terminal progress is written at the first sign, at the end, and every `EVERY` seconds between.

There are two ways to show progress, and no third. A function that knows how much it has to do takes the `display` and
opens a task. One that does a part of its caller's task takes a `progress` and says how much is done. Off by default
(`QUIET`, `unseen`): libraries don't speak unasked.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from deltaw.show.text import clock

EVERY = 10.0  # seconds between plain lines
FLICKER = 0.2  # seconds between two looks of a table


Progress = Callable[[int], None]  # how much of a task is done; whoever opened it knows how much there is


class Task(Protocol):
    """The progress of a task that is open, with a few words beside the figure where there is something to say."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Board(Protocol):
    """The progress of a task in parts: how much is done of all, and a row of cells for each part."""

    def __call__(self, done: int, rows: Sequence[Sequence[str]], note: str = "") -> None: ...


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
    def board(self, name: str, total: int, head: Sequence[str]) -> Iterator["Board"]:
        """A task whose parts stand in a table that changes, a row each; where there is no terminal, in lines."""
        if self.quiet:
            yield lambda done, rows, note="": None
        elif sys.stderr.isatty() and self._bar is None:
            with self._table(name, total, head) as board:
                yield board
        else:
            lines = self._lines(name, total)
            yield lambda done, rows, note="": lines(done, note)

    @contextmanager
    def _table(self, name: str, total: int, head: Sequence[str]) -> Iterator["Board"]:
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        began = shown = time.monotonic()
        first: int | None = None

        def board(done: int, rows: Sequence[Sequence[str]], note: str = "") -> None:
            nonlocal first, shown
            now = time.monotonic()
            if first is None:
                first = done
            elif now - shown < FLICKER and done < total:
                return
            shown, fresh = now, done - first
            left = f", {clock((now - began) * (total - done) / fresh)} left" if fresh > 0 and done < total else ""
            grid = Table(*head, box=None, pad_edge=False, header_style="bold", title_justify="left")
            grid.title = Text(f"{name}: {amount(done, total)}{', ' + note if note else ''}{left}")
            for row in rows:
                grid.add_row(*map(Text, row))
            live.update(grid, refresh=True)

        with Live(console=Console(stderr=True), auto_refresh=False) as live:
            self._bar = live
            try:
                yield board
            finally:
                self._bar = None

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


class Within(Display):
    """Of one part of a larger work: its lines begin with the part's name, and its tasks are called by it."""

    def __init__(self, outer: Display, name: str) -> None:
        super().__init__(quiet=outer.quiet)
        self._outer, self._name = outer, name

    def say(self, text: str = "") -> None:
        self._outer.say(f"{self._name}: {text}" if text else "")

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        with self._outer.task(f"{self._name}: {name}", total) as task:
            yield task


class Once(Display):
    """Of several parts that have much in common: what one has said isn't said again by another."""

    def __init__(self, outer: Display) -> None:
        super().__init__(quiet=outer.quiet)
        self._outer, self._said = outer, set[str]()

    def say(self, text: str = "") -> None:
        if text not in self._said:
            self._said.add(text)
            self._outer.say(text)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        with self._outer.task(name, total) as task:
            yield task


def amount(done: int, total: int) -> str:
    """ "40 of 122 (32%)": 100 % is only said of all."""
    return f"{done:,} of {total:,} ({100 * done // max(total, 1)}%)"


QUIET = Display(quiet=True)


def unseen(done: int) -> None:
    """The progress of a task that nobody watches."""
