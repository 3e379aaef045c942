"""The process in which strangers' regular expressions run. `patterns.py` starts it; nothing imports it.

It runs by itself (`python -I -S pattern_worker.py LIMITS`), on the standard library only, reads [keys, paths] from its
input and answers with JSON, one value a line: the number of each key before it is tried, so that who waits knows which
one took too long, and at the end {"keys": [the number of each path's first key, or null]} or {"error": why the key is
none}. A clock that counts computing time alone ends it, and so does the limit of its memory.
"""

import json
import re
import resource
import signal
import sys
from typing import Any

OWN = 2**27  # bytes that the interpreter takes itself


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    limits = json.loads(sys.argv[1])
    keys, paths = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (OWN + limits["memory"],) * 2)
    signal.setitimer(signal.ITIMER_VIRTUAL, limits["seconds"])  # its signal's default is to end the process
    taken: list[int | None] = [None] * len(paths)
    for number, key in enumerate(keys):
        left = [at for at, key_number in enumerate(taken) if key_number is None]
        if not left:
            break
        say(number)
        try:
            rule = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            say({"error": str(error) or type(error).__name__})
            return
        for at in left:
            if rule.match(paths[at]):
                taken[at] = number
    say({"keys": taken})


if __name__ == "__main__":
    main()
