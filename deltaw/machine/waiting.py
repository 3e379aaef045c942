"""How OpenMP's threads wait for each other, chosen before torch is loaded: it reads that once.

By default they spin, which is fastest on cores of one's own and worst where another program has one: a thread spins for
one that can't run. The demo's steps on two Xeon cores (tokens/s, float32; docs/log.md):

    waiting                      idle    one core taken
    spins (libgomp's default)     392         124
    passive                       315         196, with two other programs
    GOMP_SPINCOUNT=1000           347         102, with three
    one thread                      -         204

So passive waiting is no default (a fifth is lost), and is chosen where the cores aren't ours as a run starts: `taken`
of them over SECONDS, by /proc/stat, of the cores that this process may run on. The bits are the same either way; one
thread less would be as fast, but adds in another order, and a run's last bits would depend on who else was there.
Whatever the user has set stays. What comes later is noticed by training/contention.py.
"""

import os
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

SECONDS = 0.4
SPARE = 0.3  # of a core, that others may take: a desktop's own
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
Ticks = dict[int, tuple[int, int]]  # of each core since the machine began: (busy, all)


def core_ticks(path: Path = Path("/proc/stat")) -> Ticks:
    """Of the cores that this process may run on; none where the system doesn't say."""
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    ticks: Ticks = {}
    try:
        for line in path.read_text().splitlines():
            name, *words = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in ours:
                counts = [int(word) for word in words[:8]]  # guests' time is in user's already
                ticks[int(name[3:])] = (sum(counts) - counts[3] - counts[4], sum(counts))
    except (OSError, ValueError, IndexError):
        return {}
    return ticks


def taken(before: Ticks, after: Ticks) -> float:
    """How many cores were busy in between; of a process that slept meanwhile, by others."""
    shares = (
        (after[core][0] - busy, after[core][1] - whole) for core, (busy, whole) in before.items() if core in after
    )
    return sum(busy / whole for busy, whole in shares if whole > 0)


def choose_waiting(
    say: Callable[[str], None],
    environment: MutableMapping[str, str] = os.environ,
    look: Callable[[], Ticks] = core_ticks,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Make OpenMP's threads sleep where they wait, if others are on the cores that they would have. Without effect
    where torch is loaded already."""
    if any(environment.get(name) for name in SETTINGS):
        return
    before = look()
    threads = _threads(environment.get("OMP_NUM_THREADS", ""), len(before))
    if min(threads, len(before)) < 2:  # one thread waits for nobody
        return
    sleep(SECONDS)
    others = taken(before, look())
    if others > max(0, len(before) - threads) + SPARE:
        environment["OMP_WAIT_POLICY"] = "passive"
        say(
            f"other programs take {others:.1f} of {len(before)} cores, so threads sleep where they wait "
            "(OMP_WAIT_POLICY=passive): the same bits, and the less slow way on a busy machine"
        )


def _threads(setting: str, cores: int) -> int:
    """Of `OMP_NUM_THREADS`, which may be a list by depth."""
    first = setting.split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) else cores
