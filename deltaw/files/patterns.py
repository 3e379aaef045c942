"""PEFT's patterns: a stranger's regular expressions, matched by PEFT's own rule and never for long.

PEFT finds the rank and the alpha of a module by the first key of `rank_pattern` or `alpha_pattern` for which

    re.match(rf"(.*\\.)?({key})$", path)

holds. So a dot is any character, `^q_proj` is a module whose whole path is q_proj, and everything that `re` knows means
what `re` makes of it. Any rule of our own that is simpler means another scale for somebody, silently; so `re`
itself decides here, too. A key of letters, dots and anchors is matched in this process: it has nothing that could be
repeated, and takes time proportional to the path's length. Any other may take exponential time or all memory, and is
matched in the bounded process (bounded.py), in `SECONDS` of computing time. What isn't decided there is refused by
name.

Rejected: a list of what is safe (which alternations and repetitions are is a research question), and translating the
common notations into literal names (how `^` came to match a suffix).
"""

import re
from collections.abc import Iterable, Sequence

from deltaw.errors import InputError
from deltaw.files.bounded import Failed, line, worker

SECONDS = 0.25  # of computing time, which a busy machine doesn't shorten
LATE = 30.0  # seconds by the clock, after which a worker that neither answered nor died is given up
LINEAR = re.compile(r"(?:[^\\.*+?{}()|\[\]]|\.|\\\.)*")  # nothing is repeated, chosen or remembered


def first_matches(keys: Sequence[str], paths: Iterable[str]) -> dict[str, str]:
    """path -> the key that PEFT takes for it, for the paths that have one. Raises InputError naming a key that isn't a
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
    """The same in the bounded process."""
    question = {"keys": keys, "paths": paths, "seconds": SECONDS, "alarm": int(LATE) + 1}
    named = f"the patterns ({', '.join(keys):.80})"
    try:
        with worker().asking(line(question), LATE) as process:
            while not isinstance(answer := process.answer(), dict):
                named = f"the pattern {keys[answer]!r:.80}"
    except Failed:
        raise InputError(f"{named} needs a regular expression that can't be decided within {SECONDS:g} s") from None
    if "error" in answer:
        raise InputError(f"{named} isn't a regular expression: {answer['error']:.80}")
    taken = {path: keys[at] for path, at in zip(paths, answer["taken"], strict=True) if at is not None}
    return {path: path for path in paths if path in keys} | taken
