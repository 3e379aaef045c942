"""The verb that makes one model of base and adapter."""

from typing import Annotated

import typer

from deltaw.cli.app import BaseName, Json, app, as_path, display, give


@app.command(epilog="Examples: deltaw merge runs/demo -o merged    deltaw merge runs/demo -o merged --dtype float32")
def merge(
    adapter: Annotated[str, typer.Argument(help="A run or an adapter folder, any tool's.", callback=as_path)],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.", callback=as_path)],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; each tensor as the base stores it without it.")
    ] = None,
    base: BaseName = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of an earlier export.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write it although nothing of the update survives rounding.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Base and adapter as one model folder; says first what of the update survives rounding."""
    from deltaw.commands.merge import merge_named

    result, text = merge_named(
        adapter, output, dtype=dtype, base=base, replace=replace, force=force, display=display(as_json)
    )
    give(result, text, as_json)
