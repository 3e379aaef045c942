"""Verbs that explain: a matrix, a published claim."""

from typing import Annotated

import typer

from deltaw.cli.app import Json, app, as_path, display, examples, show


@app.command(
    epilog=examples("deltaw decompose M.npy", "deltaw decompose builtin:smollm2-135m:model.layers.0.mlp.down_proj")
)
def decompose(
    matrix: Annotated[
        str, typer.Argument(help="M.npy, M.csv, file.safetensors:tensor, or BASE:module.path.", callback=as_path)
    ],
    rank: Annotated[int | None, typer.Option(help="The rank of the low-rank approximations.")] = None,
    as_json: Json = False,
) -> None:
    """Take a matrix apart. Its rank, its exact and low-rank factorisations, and its spectrum."""
    from deltaw.commands.decompose import decompose_named

    show(decompose_named(matrix, rank=rank, display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw study    (lists them)", "deltaw study rank", "deltaw study all --full"))
def study(
    name: Annotated[str | None, typer.Argument(help="A study, or all. Without a name they are listed.")] = None,
    full: Annotated[bool, typer.Option("--full", help="On SmolLM2-135M instead of a tiny model: hours.")] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The folder for runs and pages.", callback=as_path)
    ] = "runs/studies",
    as_json: Json = False,
) -> None:
    """Reproduce a published claim about LoRA. Says whether it held on this machine."""
    from deltaw.commands.study import list_studies, run_studies

    show(run_studies(name, output, full, display(as_json)) if name else list_studies(), as_json)
