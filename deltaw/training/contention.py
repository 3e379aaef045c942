"""Whether other programs take the cores that a run computes on, while it runs. Told once, with what to do.

    waited = seconds that this process's threads were ready to run and had no core / (clock's seconds · threads)

Linux counts them for each thread (the second figure of /proc/self/task/*/schedstat), whoever took the core: another
program, a container's neighbour, or threads of our own beyond the cores. On two cores: 0.004 on an idle machine, 0.36
with one core taken, where a step takes three times as long, since OpenMP's threads spin at barriers for one that has no
core. Rejected: the process's CPU time by the clock's (spinning counts as computing, and passive waiting as idleness),
the load average (a minute old), involuntary context switches (34 a second idle, 80 in a crowd, 2,900 where threads
sleep), /proc/stat (other cores' work is no matter; not seen in every container).

Nothing is changed here: with other threads sums are added in another order, and a run's last bits must not depend on
who else is on the machine. Waiting that sleeps instead of spinning leaves the bits alone, but OpenMP reads it when it
is loaded; so it is chosen when the process starts (machine/waiting.py), and later it is advice.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from deltaw.errors import command
from deltaw.show.text import percent

CONTESTED = 0.1  # of the threads' time without a core; an idle machine's is a hundredth
STEPS, SECONDS = 3, 4.0  # that a window has at least; the first one begins after the first step, which is never typical

Clock = Callable[[], float]


def seconds_without_core() -> float | None:
    """Of all threads of this process, since each began; None where the system doesn't count."""
    try:
        files = list(Path("/proc/self/task").iterdir())
    except OSError:
        return None
    waited, counted = 0, False
    for folder in files:
        try:
            waited += int((folder / "schedstat").read_text().split()[1])
            counted = True
        except (OSError, ValueError, IndexError):  # a thread that has ended
            continue
    return waited / 1e9 if counted else None


def waits_passively() -> bool:
    """Whether OpenMP's threads sleep where they wait."""
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


class Contention:
    """Told of every step that was taken. `waited`: the largest share of a window, None as long as there was none."""

    def __init__(
        self,
        run: object,
        threads: int,
        say: Callable[[str], None],
        *,
        clock: Clock = time.monotonic,
        without_core: Callable[[], float | None] = seconds_without_core,
        passive: bool | None = None,
    ) -> None:
        self.waited: float | None = None
        self._run, self._threads, self._say, self._told = run, threads, say, False
        self._clock, self._without_core = clock, without_core
        self._passive = waits_passively() if passive is None else passive
        self._steps, self._began, self._before = 0, 0.0, 0.0

    def stepped(self) -> None:
        """A step has been taken."""
        now = self._clock()
        if self._steps and (self._steps < STEPS or now - self._began < SECONDS):
            self._steps += 1
            return
        without = self._without_core()
        if without is None:
            return
        if self._steps:
            # A thread that has ended takes its count along.
            share = max(0.0, without - self._before) / ((now - self._began) * self._threads)
            self.waited = max(share, self.waited or 0.0)
            if share > CONTESTED and not self._told:
                self._told = True
                self._say(self._advice(share))
        self._steps, self._began, self._before = 1, now, without

    def _advice(self, share: float) -> str:
        """One line: what is seen, and what can be done."""
        seen = f"warning: other programs take the cores: this run's threads had none for {percent(share)} of the time"
        if self._threads == 1 or self._passive:
            return f"{seen}; it goes on, slower; end them, or use another machine"
        resumed = command("train", self._run)
        return (
            f"{seen}, and spin where they wait. Ctrl-C saves it, and OMP_WAIT_POLICY=passive {resumed} goes on, "
            "faster in such company, and with the same bits"
        )
