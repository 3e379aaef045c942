"""The verb that says what becomes of an adapter where it is to run."""

from typing import Annotated

import typer

from deltaw.cli.app import BaseName, Json, app, as_path, display, give


@app.command(
    epilog="Examples: deltaw lint runs/demo    deltaw lint adapter --to vllm --json    "
    "(exit code 1: it shouldn't be shipped; docs/lint.md has all codes)"
)
def lint(
    adapter: Annotated[
        str, typer.Argument(help="A run, an adapter's folder or .gguf file, any tool's.", callback=as_path)
    ],
    base: BaseName = None,
    to: Annotated[
        str | None,
        typer.Option(help="Look at these only, with commas between: peft, transformers, vllm, llama.cpp, ollama, mlx."),
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="Of the vLLM that it is for.")] = 16,
    as_json: Json = False,
) -> None:
    """Whether an adapter loads and answers rightly in each place where it may run, and how to mend it."""
    from deltaw.commands.lint import lint_named

    places = [place.strip() for place in to.split(",")] if to else []
    result, text, code = lint_named(
        adapter, base=base, to=places, max_lora_rank=max_lora_rank, display=display(as_json)
    )
    give(result, text, as_json)
    raise typer.Exit(code)
