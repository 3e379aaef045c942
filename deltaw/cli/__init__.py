"""The command line: verbs, no logic. What they do stands in deltaw/commands.

    app.py        the application, the options that verbs share, how a Result is shown
    run.py        demo · train · verify-resume · preview · plan · runs
    ask.py        eval · generate · chat
    serve.py      serve
    update.py     inspect · compare · resize · extract · combine · scale
    ship.py       merge · export · lint · verify
    why.py        decompose · study
    machine.py    doctor · cache
    verbs.py      the groups of `deltaw --help`, hints for names that are no verb (elsewhere.py: other tools' names)
    signals.py    Ctrl-C and SIGTERM

Heavy imports stand inside the verbs, so that `--help` answers at once. Prose and progress go to stderr, results to
stdout; `--json` makes stdout one JSON object. Exit codes: 0 done, 1 failed while running, 2 the user's input,
130 / 143 stopped by a signal.
"""

import importlib
import io
import sys
import traceback

import typer

from deltaw.cli.app import app
from deltaw.cli.signals import Signals
from deltaw.cli.verbs import usage
from deltaw.errors import DeltawError
from deltaw.training.stop import Stopped

for _verbs in ("run", "ask", "serve", "update", "ship", "why", "machine"):  # each registers its verbs
    importlib.import_module(f"deltaw.cli.{_verbs}")


def main() -> None:
    """The entry point: runs a verb and turns what it raises into a message and an exit code."""
    _print_whatever_comes()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with Signals() as signals:
        try:
            code = app(args=arguments, prog_name="deltaw", standalone_mode=False) or 0
            if code == 130:  # typer's, of a KeyboardInterrupt
                raise KeyboardInterrupt
            sys.exit(code)
        except Stopped as stopped:
            signals.leaving = True
            _fail(str(stopped), stopped.exit_code, debug)
        except (KeyboardInterrupt, typer.Abort):
            signals.leaving = True
            _fail("stopped", signals.exit_code or 130, debug)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(141)
        except Exception as error:
            if signals.exit_code:
                signals.leaving = True
                _fail("stopped", signals.exit_code, debug)
            _fail(*_said(error), debug)


def _said(error: Exception) -> tuple[str, int]:
    """What is printed of an error, and the exit code."""
    if isinstance(error, DeltawError):
        return f"error: {error}", error.exit_code
    if hasattr(error, "format_message"):  # click's own, which typer carries under varying names
        return usage(error), 2
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"error: {what:.300}\nthis is a defect of deltaw: --debug shows where", 1


def _print_whatever_comes() -> None:
    """Let what a terminal of another encoding can't show be a question mark: a finished run must not end in an error
    because its summary has a Greek letter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    sys.exit(code)
