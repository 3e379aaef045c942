"""The verb that writes an adapter for another program."""

from typing import Annotated

import typer

from deltaw.cli.app import BaseName, Json, app, as_path, display, give

EXAMPLES = """Examples:\n
deltaw export runs/demo --to peft -o demo-peft\n
deltaw export runs/demo --to vllm -o demo-vllm --push me/demo\n
deltaw export runs/demo --to mlx -o demo-mlx\n
deltaw export runs/demo --to gguf -o demo-gguf    (for llama.cpp and Ollama)\n
deltaw export runs/demo --to gguf --merged --type Q8_0 -o demo-q8"""


@app.command(epilog=EXAMPLES)
def export(
    adapter: Annotated[str, typer.Argument(help="A run or an adapter folder, any tool's.", callback=as_path)],
    to: Annotated[str, typer.Option(help="peft, vllm, mlx, or gguf (llama.cpp, Ollama).")],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.", callback=as_path)],
    plain: Annotated[bool, typer.Option("--plain", help="vllm: for older servers; scales in B, one rank.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="gguf: the whole model instead of the adapter.")] = False,
    type_: Annotated[str | None, typer.Option("--type", help="Of a merged model's numbers: F16, Q8_0, …")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where little of the update survives that type.")] = False,
    base: BaseName = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a folder that deltaw wrote, or what is on the hub.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Push it to org/name on the hub, private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Push it for all to see.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for the place where it will run, with a model card."""
    from deltaw.commands.export import export_named
    from deltaw.shipping.destination import Options

    result, text = export_named(
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
    give(result, text, as_json)
