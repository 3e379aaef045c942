"""PEFT's patterns: a stranger's regular expressions, matched by PEFT's own rule and never for long.

PEFT finds the rank and the alpha of a module by the first key of `rank_pattern` or `alpha_pattern` for which

    re.match(rf"(.*\\.)?({key})$", path)

holds. So a dot is any character, `^q_proj` is a module whose whole path is q_proj, and everything that `re` knows means
what `re` makes of it. Any rule of our own that is simpler means another scale for somebody, without a word; so `re`
itself decides here, too. A key of letters, dots and anchors is matched in this process: it has nothing that could be
repeated, and takes time proportional to the path's length. Any other may take exponential time or all memory, and is
matched by `pattern_worker.py`, a process with `SECONDS` of computing time and `MEMORY`. What isn't decided there is
refused by name.

Rejected: a list of what is safe (which alternations and repetitions are is a research question), and translating the
common notations into literal names (how `^` came to match a suffix).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from deltaw.errors import InputError

SECONDS, MEMORY = 0.25, 2**28  # of computing time, which a busy machine doesn't shorten; bytes
LATE = 30.0  # seconds by the clock, after which a worker that neither answered nor died is given up
SCRIPT = Path(__file__).with_name("pattern_worker.py")
LINEAR = re.compile(r"(?:[^\\.*+?{}()|\[\]]|\.|\\\.)*")  # nothing is repeated, chosen or remembered


def first_matches(keys: Sequence[str], paths: Iterable[str]) -> dict[str, str]:
    """path -> the key that PEFT takes for it, for the paths that have one. Raises InputError naming a key that is no
    regular expression, or can't be decided in time."""
    taken: dict[str, str] = {}
    left = list(paths)
    for at, key in enumerate(keys):
        if not left:
            return taken
        if not LINEAR.fullmatch(key):
            return taken | _by_worker(keys[at:], left)
        rule = re.compile(rf"(.*\.)?({key})$")
        taken |= {path: key for path in left if rule.match(path)}
        left = [path for path in left if path not in taken]
    known = set(keys)  # PEFT looks a path that nothing matches up as it is
    return taken | {path: path for path in left if path in known}


def _by_worker(keys: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The same in a process of its own."""
    limits = json.dumps({"seconds": SECONDS, "memory": MEMORY})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", str(SCRIPT), limits],
            input=json.dumps([list(keys), list(paths)]).encode(),
            capture_output=True,
            timeout=LATE,
            cwd="/",
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        )
        *begun, last = [json.loads(line) for line in done.stdout.splitlines()] or [-1, -1]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        begun, last = [], -1
    if isinstance(last, dict) and "keys" in last:
        return {path: keys[at] for path, at in zip(paths, last["keys"], strict=True) if at is not None} | {
            path: path for path, at in zip(paths, last["keys"], strict=True) if at is None and path in keys
        }
    if isinstance(last, dict):
        raise InputError(f"the pattern {keys[begun[-1]]!r:.80} is no regular expression: {last['error']:.80}")
    named = f"the pattern {keys[last]!r:.80}" if last >= 0 else f"the patterns ({', '.join(keys):.80})"
    raise InputError(f"{named} needs a regular expression that can't be decided within {SECONDS:g} s")
