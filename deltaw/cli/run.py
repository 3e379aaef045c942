"""Verbs that train a model, and that ask one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.app import BaseName, Json, Quiet, app, as_path, display, give, print_json

if TYPE_CHECKING:
    from deltaw.config import RunConfig
    from deltaw.model import Model

NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="The plain base.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that make up this share.")]
TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@app.command(epilog="Example: deltaw demo")
def demo(
    output: Annotated[str, typer.Option(help="The run folder.", callback=as_path)] = "runs/demo", as_json: Json = False
) -> None:
    """Teach a 135M model to pronounce English words, with real data, in minutes on a CPU."""
    from deltaw.commands.demo import DEMO
    from deltaw.config import parse_config
    from deltaw.files.paths import written

    _train(parse_config({**DEMO, "output": written(output)}), replace=True, as_json=as_json)


@app.command(epilog="Examples: deltaw train run.yaml train.lr=1e-3    deltaw train runs/first  (resumes)")
def train(
    run: Annotated[Path, typer.Argument(help="A run file, or a run folder to resume.", callback=as_path)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, over the run file.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Discard an earlier run in the output folder.")] = False,
    allow: Annotated[bool, typer.Option("--allow", help="Resume although settings were changed.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter, or go on with an interrupted run."""
    from deltaw.config import load_config
    from deltaw.run import Run

    if not run.is_dir():
        _train(load_config(run, overrides or ()), replace=replace, as_json=as_json, quiet=quiet)
        return
    Run(run).check_resumable()
    from deltaw.training.run import resume

    resume(run, overrides or (), allow=allow, display=display(quiet))
    _print_summary(run, as_json)


@app.command("verify-resume", epilog="Example: deltaw verify-resume run.yaml")
def verify_resume(
    run: Annotated[Path, typer.Argument(help="A run file.", callback=as_path)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, over the run file.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="How many steps to take, and to stop after each of.")] = 4,
    as_json: Json = False,
) -> None:
    """Prove on this run file and this machine that a stopped run ends with the same bits."""
    from deltaw.config import load_config

    config = load_config(run, overrides or ())
    from deltaw.training.verify import verify_resume as verify

    found = verify(config, steps, display(as_json))
    give(found.to_json(), found.text(), as_json)
    if not found.exact:
        raise typer.Exit(1)


@app.command(epilog="Example: deltaw preview run.yaml -n 5")
def preview(
    run: Annotated[Path, typer.Argument(help="A run file.", callback=as_path)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, over the run file.")] = None,
    rows: Annotated[int, typer.Option("-n", help="How many examples.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what would be trained: examples with the trained tokens marked, counts, warnings. Loads no model."""
    from dataclasses import asdict

    from deltaw.config import load_config
    from deltaw.data.preview import preview as draw
    from deltaw.model import limits_of, open_dataset

    config = load_config(run, overrides or ())
    source, renderer, dataset = open_dataset(config, display(as_json))
    dataset.report.warnings.extend(limits_of(source, dataset))
    if as_json:
        print_json(asdict(dataset.report))
    else:
        from rich.console import Console

        Console().print(draw(dataset, renderer.tokenizer, rows))


@app.command("eval", epilog="Examples: deltaw eval runs/demo    deltaw eval runs/demo data.jsonl --no-adapter --json")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, an adapter folder or a base.", callback=as_path)],
    data: Annotated[
        str | None, typer.Argument(help="A data file; a run's own held-out rows without one.", callback=as_path)
    ] = None,
    base: BaseName = None,
    no_adapter: NoAdapter = False,
    metrics: Annotated[list[str] | None, typer.Option(help="exact_match, phoneme_error_rate.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Only this many rows, chosen at random.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens; the run's own without it.")] = None,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and task metrics on held-out rows or on a file."""
    from deltaw.commands.eval import evaluate_on

    result = evaluate_on(
        model,
        data,
        base=base,
        use_adapter=not no_adapter,
        metrics=metrics,
        rows=rows,
        max_tokens=max_tokens,
        display=display(as_json),
    )
    if as_json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name.replace('_', ' '):20} {value}")


@app.command(epilog="Example: deltaw generate runs/demo 'h e l l o ->'    (- reads the prompt from stdin)")
def generate(
    model: Annotated[str, typer.Argument(help="A run, an adapter folder or a base.", callback=as_path)],
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - is stdin.")],
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
    """Continue one prompt, streaming."""
    text = _stdin() if prompt == "-" else prompt
    asked: Any = [{"role": "user", "content": text}] if as_chat else text
    sampling = _sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    opened = _open(model, base, as_json)
    answer = ""
    for piece in opened.stream(asked, adapter=not no_adapter, **sampling):
        answer += piece
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print_json({"prompt": text, "text": answer, "adapter": opened.attached is not None and not no_adapter})
    else:
        print()


@app.command(epilog="Example: deltaw chat runs/demo")
def chat(
    model: Annotated[str, typer.Argument(help="A run, an adapter folder or a base.", callback=as_path)],
    base: BaseName = None,
    no_adapter: NoAdapter = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
) -> None:
    """Talk to a model, streaming. /base asks the plain base, /adapter the adapter, /new forgets, Ctrl-D leaves."""
    from deltaw.commands.chat import talk

    sampling = _sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    talk(_open(model, base, False), system=system, use_adapter=not no_adapter, sampling=sampling)


def _stdin() -> str:
    from deltaw.errors import InputError

    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not {error.encoding} text", fix="send the prompt as UTF-8") from None


def _train(config: "RunConfig", *, replace: bool = False, as_json: bool, quiet: bool = False) -> None:
    from deltaw.run import Run

    Run.check(config, replace=replace)  # before torch is loaded, which takes seconds
    from deltaw.training.run import train

    train(config, replace=replace, display=display(quiet))
    _print_summary(Path(config.output), as_json)


def _print_summary(folder: Path, as_json: bool) -> None:
    from deltaw.run import Run
    from deltaw.training.result import summary

    run = Run(folder)
    give(run.read_json(run.result), "" if as_json else summary(run), as_json)


def _open(name: str, base: str | None, quiet: bool) -> "Model":
    from deltaw.model import open_model

    return open_model(name, base=base, display=display(quiet))


def _sampling(**fields: Any) -> dict[str, Any]:
    """The options as given, once they are known to be right."""
    from deltaw.generate.sampling import Sampling

    return Sampling.checked(**fields).model_dump()
