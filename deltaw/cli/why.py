"""Verbs that explain: a matrix's rank, a published claim."""

from typing import Annotated

import typer

from deltaw.cli.app import Json, app, as_path, display, give


@app.command(
    epilog="Examples: deltaw decompose M.npy    deltaw decompose builtin:smollm2-135m:model.layers.0.mlp.down_proj"
)
def decompose(
    matrix: Annotated[
        str, typer.Argument(help="M.npy, M.csv, file.safetensors:tensor, or BASE:module.path.", callback=as_path)
    ],
    rank: Annotated[int | None, typer.Option(help="Of the low-rank approximations.")] = None,
    as_json: Json = False,
) -> None:
    """A matrix's rank, its exact and its low-rank factorisations, and its spectrum."""
    from deltaw.analysis.decompose import describe, run

    found, source = run(matrix, rank, display(as_json))
    give(found.to_json(), describe(found, source), as_json)


@app.command(epilog="Examples: deltaw study rank    deltaw study all --full    (without a name: the list)")
def study(
    name: Annotated[str | None, typer.Argument(help="A study, or all; the list without it.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The real grid with three seeds: hours.")] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Where runs and pages go.", callback=as_path)
    ] = "runs/studies",
    as_json: Json = False,
) -> None:
    """Try a published claim about LoRA on this machine, and say whether it held."""
    from deltaw.commands.study import list_studies, run_studies

    result, text = run_studies(name, output, full, display(as_json)) if name else list_studies()
    give(result, text, as_json)
