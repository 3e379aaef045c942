"""The verb that serves a model to other programs."""

from typing import Annotated

import typer

from deltaw.cli.app import Json, app, as_path, display, examples, show
from deltaw.config import BaseWeights


@app.command(
    epilog=examples(
        "deltaw serve runs/demo",
        "deltaw serve builtin:smollm2-135m --adapters runs",
        "DELTAW_API_KEY=$(openssl rand -hex 24) deltaw serve org/name --adapters adapters --host 0.0.0.0",
    )
)
def serve(
    base: Annotated[
        str,
        typer.Argument(help="A base model; or a run or an adapter, which is served with its base.", callback=as_path),
    ],
    adapters: Annotated[
        str | None,
        typer.Option(help="A folder whose subfolders are runs or adapters, each served by its name.", callback=as_path),
    ] = None,
    base_weights: Annotated[
        BaseWeights | None,
        typer.Option(help="How the base's matrices are kept in memory. Without it, as the run has it, or unpacked."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on: 0.0.0.0 for other machines too.")] = "127.0.0.1",
    api_key_file: Annotated[
        str | None,
        typer.Option(help="A file with the key that clients must send; or DELTAW_API_KEY.", callback=as_path),
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let everybody ask, also from other machines.")] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages of this origin may ask: https://example.org, or '*'.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer other programs over HTTP as OpenAI's API does: a base and many adapters at once."""
    screen = display()
    screen.say("starting: loading libraries")
    from deltaw.commands.serve import Place, serve_named

    serve_named(
        base,
        folder=adapters,
        weights=base_weights,
        place=Place(host, port, api_key_file, no_key, tuple(allow_origin or ())),
        show=lambda result: show(result, as_json, now=True),
        display=screen,
    )
