"""Verbs that ask a model: a base, or a base with an adapter."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from deltaw.cli.app import AllowCode, BaseName, Json, app, as_path, display, examples, show
from deltaw.config import METRICS

ModelName = Annotated[str, typer.Argument(help="A run, an adapter folder or a base model.", callback=as_path)]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="Ask the base model without the adapter.")]
MaxTokens = Annotated[int, typer.Option(help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens; 0 means all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@app.command(
    "eval",
    epilog=examples(
        "deltaw eval runs/demo",
        "deltaw eval runs/demo data.jsonl --metrics f1,rouge_l",
        "deltaw eval runs/demo --metrics judge.py:score -o answers.jsonl",
    ),
)
def evaluate(
    model: ModelName,
    data: Annotated[
        str | None,
        typer.Argument(help="A data file. Without one, a run is measured on its own held-out rows.", callback=as_path),
    ] = None,
    base: BaseName = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Measure the base alone.")] = False,
    no_base: Annotated[bool, typer.Option("--no-base", help="Measure the adapter alone.")] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help=f"In place of the run's own, comma-separated: {', '.join(METRICS)}, a function of yours as "
            "file.py:function, or none."
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Measure only this many rows, from all over the data.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest answer, in tokens. Without it, as the run has it.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Write each row's answers and scores to this JSONL file.", callback=as_path
        ),
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Measure loss and task metrics, the base beside the adapter. On a run's own held-out rows, or on a file."""
    from deltaw.commands.eval import eval_named

    if no_adapter and no_base:
        raise typer.BadParameter("--no-adapter and --no-base together leave nothing to measure")
    result = eval_named(
        model,
        data,
        base=base,
        use_adapter=not no_adapter,
        use_base=not no_base,
        metrics=[name.strip() for one in metrics for name in one.split(",")] if metrics else None,
        rows=rows,
        max_tokens=max_tokens,
        output=output,
        allow_code=allow_code,
        display=display(as_json),
    )
    show(result, as_json)


@app.command(epilog=examples("deltaw generate runs/demo 'h e l l o ->'    (- reads the prompt from stdin)"))
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    base: BaseName = None,
    no_adapter: NoAdapter = False,
    as_chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message, in the chat template.")] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt. The text appears as it is generated."""
    from deltaw.commands.generate import generate_named

    stream: Callable[[str], None] = lambda piece: None if as_json else print(piece, end="", flush=True)  # noqa: E731
    result = generate_named(
        model,
        prompt,
        base=base,
        use_adapter=not no_adapter,
        as_chat=as_chat,
        sampling=_sampling(max_tokens, temperature, top_p, top_k, seed),
        show=stream,
        display=display(as_json),
    )
    show(result, as_json)


@app.command(epilog=examples("deltaw chat runs/demo"))
def chat(
    model: ModelName,
    base: BaseName = None,
    no_adapter: NoAdapter = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """Talk to a model. /base asks the base model, /adapter the adapter, /new starts over, Ctrl-D leaves."""
    from deltaw.commands.chat import chat_named

    sampling = _sampling(max_tokens, temperature, top_p, top_k, seed)
    chat_named(model, base=base, system=system, use_adapter=not no_adapter, sampling=sampling, display=display())


def _sampling(max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None) -> dict[str, Any]:
    """The options under the names of Sampling's fields."""
    return {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
