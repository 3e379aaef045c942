"""The process: what `deltaw` and `python -m deltaw` start.

Ctrl-C and SIGTERM end every verb in one line, "stopped", and exit code 130 or 143. A signal unwinds what is under way
(a folder that is being written goes again) and is said once. The process then ends without the interpreter's own
farewell: a thread that was still reading weights would be waited for, and would complain of being cut off.

Imports stand inside the function, so that a signal that comes while they run is answered, too.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Run the command line; never returns."""
    try:
        _run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        _leave(130)


def _run() -> None:
    try:
        from deltaw.cli import main

        main()
    except SystemExit as done:
        if done.code not in (130, 143):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done and said: a traceback would say it isn't
            raise
        _leave(int(done.code))


def _leave(code: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # one more changes nothing
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
