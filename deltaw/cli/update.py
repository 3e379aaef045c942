"""Verbs that look at an adapter, or make another of it."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import BaseName, Json, app, as_path, display, give

Output = Annotated[str, typer.Option("--output", "-o", help="The folder to write.", callback=as_path)]
Rank = Annotated[int | None, typer.Option(help="At most this rank.")]
Energy = Annotated[float | None, typer.Option(help="The least rank that keeps this share of ‖ΔW‖², 0.99 for 99 %.")]
Data = Annotated[
    str | None, typer.Option(help="Rows to measure on; a run's own held-out rows without it.", callback=as_path)
]


@app.command(epilog="Example: deltaw inspect runs/demo    (an adapter folder works, too)")
def inspect(
    adapter: Annotated[str, typer.Argument(help="A run or an adapter folder, any tool's.", callback=as_path)],
    base: BaseName = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The page; report.html in the folder.", callback=as_path)
    ] = None,
    as_json: Json = False,
) -> None:
    """What a fine-tune did to the weights: writes a page with pictures, prints the gist."""
    from deltaw.analysis.report import PAGE
    from deltaw.analysis.report import inspect as look
    from deltaw.files.lock import claimed_file

    with claimed_file(Path(output) if output else Path(adapter) / PAGE):
        report = look(adapter, base=base, display=display(as_json))
        path = report.write(output)
    give(report.to_json(), f"{report.gist()}\n\npage: {path}", as_json)


@app.command(epilog="Example: deltaw compare runs/one runs/two")
def compare(
    one: Annotated[str, typer.Argument(help="A run or an adapter folder.", callback=as_path)],
    other: Annotated[str, typer.Argument(help="Another on the same base.", callback=as_path)],
    output: Annotated[str, typer.Option("--output", "-o", help="The page.", callback=as_path)] = "comparison.html",
    as_json: Json = False,
) -> None:
    """Which directions two adapters share, against what chance would give."""
    from deltaw.commands.compare import compare_named
    from deltaw.files.lock import claimed_file

    with claimed_file(Path(output)):
        result, text = compare_named(one, other, output, display=display(as_json))
    give(result, text, as_json)


@app.command(
    epilog="Examples: deltaw resize runs/demo -o small --rank 4    "
    "deltaw resize runs/demo -o small --max-loss-increase 0.5%"
)
def resize(
    adapter: Annotated[str, typer.Argument(help="A run or an adapter folder.", callback=as_path)],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    max_loss_increase: Annotated[
        str | None, typer.Option(help="The smallest adapter whose held-out loss rises by at most this: 0.5% or 0.005.")
    ] = None,
    data: Data = None,
    base: BaseName = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="One rank for all modules.")] = False,
    as_json: Json = False,
) -> None:
    """A smaller adapter: by rank, by energy, or by what it may cost in held-out loss."""
    from deltaw.commands.reshape import resize_named

    result, text = resize_named(
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
    give(result, text, as_json)


@app.command(epilog="Example: deltaw combine runs/one runs/two --weights 0.7,0.3 -o both")
def combine(
    adapters: Annotated[list[str], typer.Argument(help="Runs or adapter folders of one base.", callback=as_path)],
    output: Output,
    weights: Annotated[str | None, typer.Option(help="One a adapter, with commas between; 1 each without it.")] = None,
    method: Annotated[str, typer.Option(help="linear (the exact sum), ties or dare.")] = "linear",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[float | None, typer.Option(help="Of ties and dare: the share of entries kept.")] = None,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    as_json: Json = False,
) -> None:
    """One adapter out of several: their weighted sum, exactly, or by TIES or DARE."""
    from deltaw.commands.reshape import combine_named

    result, text = combine_named(
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
    give(result, text, as_json)


@app.command(
    epilog="Examples: deltaw extract tuned-model --base org/name --rank 16 -o lora    "
    "deltaw extract runs/full --energy 0.9 -o lora"
)
def extract(
    tuned: Annotated[
        str, typer.Argument(help="A fine-tuned model's folder, or a run with adapter: full.", callback=as_path)
    ],
    output: Output,
    base: BaseName = None,
    rank: Rank = None,
    energy: Energy = None,
    as_json: Json = False,
) -> None:
    """A LoRA out of full fine-tuning, and what it can't hold."""
    from deltaw.commands.reshape import extract_named

    result, text = extract_named(tuned, base, output, rank=rank, energy=energy, display=display(as_json))
    give(result, text, as_json)


@app.command(epilog="Examples: deltaw scale runs/demo    deltaw scale runs/demo --to 0.6 -o gentler")
def scale(
    adapter: Annotated[str, typer.Argument(help="A run or an adapter folder.", callback=as_path)],
    to: Annotated[float | None, typer.Option(help="Write the adapter times this factor.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to write, with --to.", callback=as_path)
    ] = None,
    factors: Annotated[str | None, typer.Option(help="What to measure at, with commas between.")] = None,
    data: Data = None,
    base: BaseName = None,
    as_json: Json = False,
) -> None:
    """The slider between base and fine-tune: what each factor gains on the task and costs on general text."""
    from deltaw.commands.reshape import scale_named

    result, text = scale_named(
        adapter,
        to=to,
        output=output,
        factors=_numbers(factors, "--factors"),
        data=data,
        base=base,
        display=display(as_json),
    )
    give(result, text, as_json)


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not numbers with commas between", param_hint=option) from None


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no share: write 0.5% or 0.005") from None
