"""A worker: reads `{"fault": name, "from": a, "to": b}` or `{"peer": n}` a line, answers with what came of it.

It is a process of its own, so that a crash of a foreign parser (a segmentation fault) fails the chunk and not the list.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults.fault import SEEN, load_faults, run_tries


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")  # what a check prints must not get between the answers
    os.dup2(2, 1)
    faults = {known.name: known for known in load_faults()}
    for line in sys.stdin:
        asked = json.loads(line)
        if "peer" in asked:
            answer = {"said": _look(asked["peer"])}
        else:
            answer = dataclasses.asdict(run_tries(faults[asked["fault"]], range(asked["from"], asked["to"])))
        print(json.dumps(answer), file=channel, flush=True)


def _look(number: int) -> str:
    load_faults(peers=True)  # seconds of other tools' imports
    scratch = Path(tempfile.mkdtemp(prefix="peer-"))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return SEEN[number].look(scratch)
    except Exception as error:
        return f"not tried: {type(error).__name__}: {str(error)[:100]}"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
