"""The verbs that look at the machine, and at what deltaw keeps on it."""

from typing import Annotated

import typer

from deltaw.cli.app import Json, app, display, examples, show


@app.command(epilog=examples("deltaw doctor", "deltaw doctor --json    (for a bug report: no paths, no names)"))
def doctor(as_json: Json = False) -> None:
    """Show what this machine has and what follows for training. Takes some seconds."""
    from deltaw.commands.doctor import doctor_named

    show(doctor_named(display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw cache", "deltaw cache --clean", "deltaw cache --clean --older-than 30"))
def cache(
    clean: Annotated[bool, typer.Option("--clean", help="remove it; what a running process uses stays")] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="with --clean: only what wasn't used for so many days")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what was converted and prepared once to be used again, or remove it."""
    from deltaw.commands.cache import cache_listed

    show(cache_listed(clean=clean, older_than=older_than), as_json)
