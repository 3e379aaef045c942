"""Verbs that look at an adapter, or make another one out of it."""

from typing import Annotated

import typer

from deltaw.cli.app import Adapter, BaseName, Json, Output, app, as_path, display, examples, show

Rank = Annotated[int | None, typer.Option(help="The largest rank of a module.")]
Energy = Annotated[
    float | None, typer.Option(help="Take the least rank that keeps this share of ‖ΔW‖²: 0.99 for 99 %.")
]
Data = Annotated[
    str | None,
    typer.Option(help="Rows to measure on. Without it, a run's own held-out rows are used.", callback=as_path),
]


@app.command(epilog=examples("deltaw inspect runs/demo", "deltaw inspect some-lora rows.jsonl --base org/name --deep"))
def inspect(
    adapter: Adapter,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Rows of the task to try the update on. Without them, a run's own held-out rows.", callback=as_path
        ),
    ] = None,
    base: BaseName = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="The page to write. Without it, report.html in that folder.", callback=as_path
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also switch the update off layer by layer and kind by kind, on more rows: up to 10 minutes."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a fine-tune did to the weights, and what that does to the model. Writes a page with pictures and prints
    the gist."""
    from deltaw.commands.inspect import inspect_named

    show(inspect_named(adapter, data, base=base, page=output, deep=deep, display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw compare runs/one runs/two"))
def compare(
    one: Adapter,
    other: Annotated[str, typer.Argument(help="Another one on the same base.", callback=as_path)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The page to write.", callback=as_path)
    ] = "comparison.html",
    as_json: Json = False,
) -> None:
    """Show which directions two adapters share. Says what chance alone would give."""
    from deltaw.commands.compare import compare_named

    show(compare_named(one, other, output, display=display(as_json)), as_json)


@app.command(
    epilog=examples(
        "deltaw resize runs/demo -o small --rank 4", "deltaw resize runs/demo -o small --max-loss-increase 0.5%"
    )
)
def resize(
    adapter: Adapter,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    max_loss_increase: Annotated[
        str | None,
        typer.Option(help="Take the smallest adapter whose held-out loss rises by at most this: 0.5% or 0.005."),
    ] = None,
    data: Data = None,
    base: BaseName = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Give all modules one rank.")] = False,
    as_json: Json = False,
) -> None:
    """Make an adapter smaller. By rank, by energy, or by what it may cost in held-out loss."""
    from deltaw.commands.resize import resize_named

    result = resize_named(
        adapter,
        output,
        rank=rank,
        energy=energy,
        max_loss_increase=_share(max_loss_increase),
        data=data,
        base=base,
        uniform=uniform,
        display=display(as_json),
    )
    show(result, as_json)


@app.command(epilog=examples("deltaw combine runs/one runs/two --weights 0.7,0.3 -o both"))
def combine(
    adapters: Annotated[list[str], typer.Argument(help="Runs or adapter folders on one base.", callback=as_path)],
    output: Output,
    weights: Annotated[
        str | None, typer.Option(help="One per adapter, separated by commas. Without it, each counts once.")
    ] = None,
    method: Annotated[str, typer.Option(help="linear (the exact sum), ties or dare.")] = "linear",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[float | None, typer.Option(help="ties, dare: the share of entries that is kept.")] = None,
    seed: Annotated[int, typer.Option(help="dare: which entries these are.")] = 0,
    as_json: Json = False,
) -> None:
    """Combine several adapters into one. Their weighted sum, exactly, or by TIES or DARE."""
    from deltaw.commands.combine import combine_named

    result = combine_named(
        adapters,
        output,
        weights=_numbers(weights, "--weights"),
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        seed=seed,
        display=display(as_json),
    )
    show(result, as_json)


@app.command(
    epilog=examples(
        "deltaw extract tuned-model --base org/name --rank 16 -o lora", "deltaw extract runs/full --energy 0.9 -o lora"
    )
)
def extract(
    tuned: Annotated[
        str, typer.Argument(help="A fine-tuned model's folder, or a run with adapter: full.", callback=as_path)
    ],
    output: Output,
    base: Annotated[
        str | None, typer.Option("--base", help="The model that it was fine-tuned from.", callback=as_path)
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    as_json: Json = False,
) -> None:
    """Extract a LoRA from a full fine-tune. Says what it can't hold."""
    from deltaw.commands.extract import extract_named

    show(extract_named(tuned, base, output, rank=rank, energy=energy, display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw scale runs/demo", "deltaw scale runs/demo --to 0.6 -o gentler"))
def scale(
    adapter: Adapter,
    to: Annotated[float | None, typer.Option(help="Write the adapter multiplied by this factor.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to write, with --to.", callback=as_path)
    ] = None,
    factors: Annotated[str | None, typer.Option(help="The factors to measure, separated by commas.")] = None,
    data: Data = None,
    base: BaseName = None,
    as_json: Json = False,
) -> None:
    """Slide between base and fine-tune. Measures what each factor gains on the task and costs on general text."""
    from deltaw.commands.scale import scale_named

    result = scale_named(
        adapter,
        to=to,
        output=output,
        factors=_numbers(factors, "--factors"),
        data=data,
        base=base,
        display=display(as_json),
    )
    show(result, as_json)


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} isn't numbers separated by commas", param_hint=option) from None


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} isn't a share: write 0.5% or 0.005") from None
