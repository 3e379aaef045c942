"""Verbs that ask a model: a base, or a base with an adapter."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from deltaw.cli.app import AllowCode, BaseName, Json, app, as_path, display, examples, show
from deltaw.config import METRICS

ModelName = Annotated[str, typer.Argument(help="A run, an adapter folder or a base model.", callback=as_path)]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="Ask the base model without the adapter.")]
AsChat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Ask as a user's message, in the chat template, or the text as it is. Without either: as the adapter was "
        "trained.",
        show_default=False,
    ),
]
System = Annotated[
    str | None,
    typer.Option(help="A system prompt. Without it, the one that all chats of the adapter's training had."),
]
Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to answer; - reads it from stdin.")
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--file",
        help="Answer a file: JSON lines, JSON, CSV or Parquet with prompt or messages, or .txt with a prompt per line; "
        "- is stdin.",
        callback=as_path,
    ),
]
AnswerFile = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="The file to write: the rows of --file with their answers, as JSON lines. Without it: stdout.",
        callback=as_path,
    ),
]
DataFile = Annotated[
    str | None,
    typer.Argument(help="A data file. Without one, a run is measured on its own held-out rows.", callback=as_path),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        help=f"In place of the run's own, comma-separated: {', '.join(METRICS)}, a function of yours as "
        "file.py:function, or none."
    ),
]
ScoredFile = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Write each row's answers and scores to this JSONL file.", callback=as_path),
]
TaskFile = Annotated[
    str | None,
    typer.Option(
        help="A task file: which rows are asked and how they are scored. Figures come with intervals and a test.",
        callback=as_path,
    ),
]
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
        "deltaw eval runs/demo --tasks recipes/tasks.yaml -o rows.jsonl    (goes on where it was stopped)",
    ),
)
def evaluate(
    model: ModelName,
    data: DataFile = None,
    base: BaseName = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Measure the base alone.")] = False,
    no_base: Annotated[bool, typer.Option("--no-base", help="Measure the adapter alone.")] = False,
    metrics: Metrics = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Measure only this many rows, from all over the data.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest answer, in tokens. Without it, as the run has it.")
    ] = None,
    output: ScoredFile = None,
    tasks: TaskFile = None,
    replace: Annotated[bool, typer.Option("--replace", help="With --tasks: replace rows of other tasks.")] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Measure loss and task metrics, the base beside the adapter. On a run's own held-out rows, on a file, or on the
    tasks of a task file."""
    if no_adapter and no_base:
        raise typer.BadParameter("--no-adapter and --no-base together leave nothing to measure")
    if tasks is not None:
        if data is not None or metrics or max_tokens is not None:
            raise typer.BadParameter("--tasks says which data, metrics and lengths: leave them out beside it")
        from deltaw.commands.eval_tasks import eval_tasks_named

        sides: dict[str, Any] = {"base": base, "use_adapter": not no_adapter, "use_base": not no_base}
        files: dict[str, Any] = {"rows": rows, "output": output, "replace": replace, "allow_code": allow_code}
        show(eval_tasks_named(model, tasks, **sides, **files, display=display(as_json)), as_json)
        return
    if replace:
        raise typer.BadParameter("--replace needs --tasks: other files are replaced anyway")
    from deltaw.commands.eval import eval_named

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


@app.command(
    epilog=examples(
        "deltaw generate runs/demo 'h e l l o ->'    (- reads the prompt from stdin)",
        "deltaw generate runs/demo --file prompts.jsonl -o answers.jsonl    (goes on where it was stopped)",
    )
)
def generate(
    model: ModelName,
    prompts: Prompts = None,
    file: PromptFile = None,
    output: AnswerFile = None,
    base: BaseName = None,
    no_adapter: NoAdapter = False,
    as_chat: AsChat = None,
    system: System = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a file of other answers.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or a file of them. Asks as the adapter was trained: as a chat or as plain text."""
    stream: Callable[[str], None] = lambda piece: None if as_json else print(piece, end="", flush=True)  # noqa: E731
    how: dict[str, Any] = {
        "base": base,
        "use_adapter": not no_adapter,
        "chat": as_chat,
        "system": system,
        "sampling": _sampling(max_tokens, temperature, top_p, top_k, seed),
        "show": stream,
        "display": display(as_json),
    }
    if file is None:
        if not prompts:
            raise typer.BadParameter("name a prompt, or a file of prompts with --file")
        if output or replace:
            raise typer.BadParameter("-o and --replace need --file: a prompt's answer is printed")
        from deltaw.commands.generate import generate_named

        show(generate_named(model, prompts, **how), as_json)
        return
    if prompts:
        raise typer.BadParameter("give prompts or --file, not both")
    if as_json and output in (None, "-"):
        raise typer.BadParameter("--json needs -o: the answers are JSON lines on stdout already")
    from deltaw.commands.generate import generate_file_named

    result = generate_file_named(model, file, output, replace=replace, **how)
    if output not in (None, "-"):
        show(result, as_json)


@app.command(epilog=examples("deltaw chat runs/demo"))
def chat(
    model: ModelName,
    base: BaseName = None,
    no_adapter: NoAdapter = False,
    as_chat: AsChat = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """Talk to a model. /help lists the commands; /base asks the base model, /adapter the adapter, /quit leaves."""
    from deltaw.commands.chat import chat_named

    sampling = _sampling(max_tokens, temperature, top_p, top_k, seed)
    chat_named(
        model,
        base=base,
        chat=as_chat,
        system=system,
        use_adapter=not no_adapter,
        sampling=sampling,
        display=display(),
    )


def _sampling(max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None) -> dict[str, Any]:
    """The options under the names of Sampling's fields."""
    return {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
