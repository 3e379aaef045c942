"""Verbs that bring an adapter to where it will run, and that say whether it arrived."""

from typing import Annotated

import typer

from deltaw.cli.app import Adapter, BaseName, Json, Output, app, as_path, display, examples, show

SIDE = (
    "A run, an adapter or a model folder, peft:FOLDER, mlx:FOLDER, model.gguf, model.gguf+adapter.gguf (in llama.cpp), "
    "or http://host:port/v1#model."
)


@app.command(epilog=examples("deltaw merge runs/demo -o merged", "deltaw merge runs/demo -o merged --dtype float32"))
def merge(
    adapter: Adapter,
    output: Output,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32. Without it, each tensor keeps the type that the base has."),
    ] = None,
    base: BaseName = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a folder that deltaw wrote.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write the model even if nothing of the update survives rounding.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge base and adapter into one model folder. Says how much of the update survives rounding."""
    from deltaw.commands.merge import merge_named

    result = merge_named(
        adapter, output, dtype=dtype, base=base, replace=replace, force=force, display=display(as_json)
    )
    show(result, as_json)


@app.command(
    epilog=examples(
        "deltaw export runs/demo --to peft -o demo-peft",
        "deltaw export runs/demo --to vllm -o demo-vllm --push me/demo",
        "deltaw export runs/demo --to mlx -o demo-mlx",
        "deltaw export runs/demo --to gguf -o demo-gguf    (for llama.cpp and Ollama)",
        "deltaw export runs/demo --to gguf --merged --type Q8_0 -o demo-q8",
    )
)
def export(
    adapter: Adapter,
    to: Annotated[str, typer.Option(help="peft, vllm, mlx, or gguf (for llama.cpp and Ollama).")],
    output: Output,
    plain: Annotated[
        bool, typer.Option("--plain", help="vllm: for older servers, with the scales in B and one rank for all.")
    ] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="gguf: write the whole model instead of the adapter.")
    ] = False,
    type_: Annotated[
        str | None, typer.Option("--type", help="The type of a merged model's weights: F16, Q8_0, …")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the model even if little of the update survives in that type.")
    ] = False,
    base: BaseName = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a folder that deltaw wrote, or what is on the hub.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Push it to org/name on the hub, as a private repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Push it as a public repository.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for the program that will run it. A model card goes with it."""
    from deltaw.commands.export import export_named
    from deltaw.shipping.destination import Options

    result = export_named(
        adapter,
        to,
        output,
        options=Options(plain=plain, merged=merged, type=type_, force=force),
        base=base,
        replace=replace,
        push=push,
        public=public,
        display=display(as_json),
    )
    show(result, as_json)


@app.command(
    epilog=examples("deltaw lint runs/demo", "deltaw lint adapter --to vllm --json")
    + "\n\nThe exit code is 1 if it shouldn't be shipped. docs/lint.md explains every code that is printed."
)
def lint(
    adapter: Annotated[
        str, typer.Argument(help="A run, an adapter folder or a .gguf file, made by any tool.", callback=as_path)
    ],
    base: BaseName = None,
    to: Annotated[
        str | None,
        typer.Option(help="Check only these, separated by commas: peft, transformers, vllm, llama.cpp, ollama, mlx."),
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="The setting of that name of the vLLM server.")] = 16,
    as_json: Json = False,
) -> None:
    """Check where an adapter loads and answers correctly. Says how to fix what is wrong."""
    from deltaw.commands.lint import lint_named

    places = [place.strip() for place in to.split(",")] if to else []
    result = lint_named(adapter, base=base, to=places, max_lora_rank=max_lora_rank, display=display(as_json))
    show(result, as_json)


@app.command(
    epilog=examples(
        "deltaw verify runs/demo merged",
        "deltaw verify runs/demo builtin:smollm2-135m+adapter.gguf",
        "deltaw verify runs/demo http://localhost:8000/v1#demo    (the server's key: DELTAW_API_KEY)",
    )
    + "\n\nThe exit code is 1 if they don't answer alike."
)
def verify(
    a: Annotated[str, typer.Argument(help=SIDE, callback=as_path)],
    b: Annotated[str, typer.Argument(help="The other one.", callback=as_path)],
    data: Annotated[
        str | None,
        typer.Option(help="Rows to ask. Without it, a run's own held-out rows are asked.", callback=as_path),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many rows to ask.", min=1)] = 20,
    base: BaseName = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A page to write: the answers side by side.", callback=as_path)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether two places answer alike. Compares prompts, answers and log-probabilities."""
    from deltaw.commands.verify import verify_named

    result = verify_named(a, b, data=data, prompts=prompts, base=base, page=output, display=display(as_json))
    show(result, as_json)
