"""The verb that looks at the machine."""

from deltaw.cli.app import Json, app, display, examples, show


@app.command(epilog=examples("deltaw doctor", "deltaw doctor --json    (for a bug report: no paths, no names)"))
def doctor(as_json: Json = False) -> None:
    """Show what this machine has and what follows for training. Takes some seconds."""
    from deltaw.commands.doctor import doctor_named

    show(doctor_named(display=display(as_json)), as_json)
