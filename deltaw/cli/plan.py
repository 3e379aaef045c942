"""The verb that says what a run will take before it is started."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import Json, app, as_path, display, give


@app.command(epilog="Examples: deltaw plan run.yaml    deltaw plan run.yaml train.tokens_per_batch=4096 --json")
def plan(
    run: Annotated[Path, typer.Argument(help="A run file.", callback=as_path)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, over the run file.")] = None,
    as_json: Json = False,
) -> None:
    """Rehearse a run in about a minute: memory, time, disk, what becomes of the rows. Leaves nothing behind."""
    from deltaw.config import load_config
    from deltaw.training.plan import plan as rehearse

    found = rehearse(load_config(run, overrides or ()), display(as_json))
    give(found.to_json(), found.text(), as_json)
