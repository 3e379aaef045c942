"""The verb that holds two places of one model against each other."""

from typing import Annotated

import typer

from deltaw.cli.app import BaseName, Json, app, as_path, display, give

SIDE = (
    "A run, an adapter or a model folder, peft:FOLDER, mlx:FOLDER, model.gguf, model.gguf+adapter.gguf (in llama.cpp), "
    "or http://host:port/v1#model."
)


@app.command(
    epilog="Examples: deltaw verify runs/demo merged    deltaw verify runs/demo builtin:smollm2-135m+adapter.gguf    "
    "deltaw verify runs/demo http://localhost:8000/v1#demo    (the server's key: DELTAW_API_KEY)"
)
def verify(
    a: Annotated[str, typer.Argument(help=SIDE, callback=as_path)],
    b: Annotated[str, typer.Argument(help="The other one.", callback=as_path)],
    data: Annotated[
        str | None, typer.Option(help="Rows to ask; a run's own held-out rows without it.", callback=as_path)
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many rows.", min=1)] = 20,
    base: BaseName = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A page with the answers side by side.", callback=as_path)
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether two places answer alike: prompts, answers and log-probabilities. Exit code 1 when they don't."""
    from deltaw.commands.verify import verify_named

    result, text, agree = verify_named(
        a, b, data=data, prompts=prompts, base=base, page=output, display=display(as_json)
    )
    give(result, text, as_json)
    if not agree:
        raise typer.Exit(1)
