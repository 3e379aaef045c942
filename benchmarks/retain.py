"""What remembering costs and keeps: the task's loss against forgetting, by `train.retain` and by what else there is.

    python -m benchmarks.retain            the curve: 14 short runs of the demo's task, some 17 minutes on two cores
    python -m benchmarks.retain --demo     recipes/demo.yaml with and without it, 10 minutes
    … --record                             write docs/remembering.md and its picture, and what of it is compared into
                                           docs/performance.md

It may be stopped at any time: runs that are finished lie in `--out`, and aren't repeated.

    lower rates    the cheapest way to forget less: to learn less
    scale          the same adapter, weaker (`deltaw scale`)
    replay         plain text among the rows, trained on like them, for as much time as `retain` takes: half as many
                   tokens again as `share` says, since the base is asked, too
    retain         the KL from the base, at two shares and several weights

A run is 40 steps of 512 tokens of the task; replay's text comes on top, as retain's does. Held-out words and the
general text that is measured are the same for all. Time is that of the steps.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Measured, note
from deltaw.config import load_config
from deltaw.data.builtin import read_builtin
from deltaw.data.opening import open_dataset
from deltaw.evaluation.forgetting import forgetting, general_text
from deltaw.evaluation.held_out import held_out_loss
from deltaw.model import open_model
from deltaw.run import Run
from deltaw.show.progress import QUIET, Display
from deltaw.show.table import table
from deltaw.training.run import train

SECTION, GENERAL, KEPT = "Remembering", "builtin:general", "builtin:general-train"
WORDS, HELD_OUT = 3000, 150
PAGE = Path(__file__).parents[1] / "docs" / "remembering.md"
BASE = "builtin:smollm2-135m"
PLAIN, RETAIN, WAYS = "lower rates", "retain", ("retain", "replay", "scale")
RATE, RATES, SCALES = 2e-3, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), (0.25, 0.5, 0.75)
WEIGHTS, SHARES = (0.1, 0.3, 1.0, 3.0), (0.05, 0.1)


@dataclass(frozen=True)
class Row:
    """An arm at its end: nats per token, and the seconds of its steps."""

    name: str
    loss: float
    kl: float
    seconds: float

    @property
    def way(self) -> str:
        """By what it forgets less."""
        return next((way for way in WAYS if way in self.name), PLAIN)


def arms() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings of `train`); `replay` is taken out again."""
    for rate in RATES:
        yield f"lr {rate:g}", {"lr": rate}
    for rate in RATES[-3:]:
        yield f"lr {rate:g}, {RETAIN}", {"lr": rate, "retain": {"data": KEPT}}
    for weight in WEIGHTS:
        if weight != 1:
            yield f"lr {RATE:g}, retain, weight {weight:g}", {"lr": RATE, "retain": {"data": KEPT, "weight": weight}}
    yield f"lr {RATE:g}, retain, share {SHARES[0]:g}", {"lr": RATE, "retain": {"data": KEPT, "share": SHARES[0]}}
    for rate in RATES[-3:-1]:
        yield f"lr {rate:g}, replay", {"lr": rate, "replay": 1.5 * SHARES[1]}


def files(folder: Path) -> None:
    """The task's rows, and those that are held out."""
    rows = [row.value for row in read_builtin("cmudict")]
    random.Random(0).shuffle(rows)
    for name, some in (("words", rows[HELD_OUT:WORDS]), ("held-out", rows[:HELD_OUT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def trained(folder: Path, name: str, settings: dict[str, Any], steps: int, tokens: int) -> Run:
    """The arm's run, which may be there already."""
    run = Run(folder / name.replace(" ", "-").replace(",", ""))
    if run.result.is_file():
        return run
    replay, words = settings.pop("replay", 0.0), str(folder / "words.jsonl")
    more = {"steps": round(steps * (1 + replay)), "tokens_per_step": tokens, "tokens_per_batch": tokens}
    config = {
        "base": BASE,
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": [words, KEPT] if replay else words, "eval": str(folder / "held-out.jsonl")},
        "train": {**more, "save_every": 1000, "keep": 1, **settings},
        "evaluate": {"general": GENERAL, "samples": 0, "report": False},
        "output": str(run.folder),
    }
    train(config, replace=True, display=QUIET)
    return run


def row_of(name: str, run: Run) -> Row:
    result = run.read_json(run.result)
    return Row(name, result["eval"]["after"]["loss"], result["forgetting"]["kl"], result["seconds"])


def scaled(run: Run) -> Iterator[Row]:
    """The run's adapter at each of `SCALES`."""
    model = open_model(run.folder, display=QUIET)
    assert model.attached is not None
    general = general_text(GENERAL, model.renderer)
    _, _, dataset = open_dataset(load_config(run.config), QUIET, model.base.source)
    factors = {path: layer.factors() for path, layer in model.attached.layers.items()}
    seconds = run.read_json(run.result)["seconds"]
    for scale in SCALES:
        for path, layer in model.attached.layers.items():
            layer.set_factors(factors[path].times(scale))
        lost = forgetting(model, GENERAL, general, QUIET)
        yield Row(f"lr {RATE:g}, scale {scale:g}", held_out_loss(model.forward, dataset.eval)[0], lost.kl, seconds)


def curve(folder: Path, steps: int, tokens: int) -> list[Row]:
    """Every arm, trained where it isn't yet."""
    folder = folder / f"{steps}-steps-of-{tokens}"
    folder.mkdir(parents=True, exist_ok=True)
    files(folder)
    rows, every = list[Row](), list(arms())
    with Display().task("remembering", len(every)) as progress:
        for number, (name, settings) in enumerate(every):
            progress(number, name)
            run = trained(folder, name, dict(settings), steps, tokens)
            rows.append(row_of(name, run))
            if settings == {"lr": RATE}:
                rows += scaled(run)
        progress(len(every))
    return rows


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of the table: the task, what is forgotten, the time beside that of the plain run."""
    plain = next(row for row in rows if row.name == f"lr {RATE:g}")
    return [(row.name, f"{row.loss:.3f}", f"{row.kl:.3f}", f"{row.seconds / plain.seconds - 1:+.0%}") for row in rows]


def kept(rows: Sequence[Row]) -> tuple[float, float]:
    """(the KL of the run that is held to its base, the least of the other ways that learn the task as well or better;
    NaN where none does)."""
    held = next(row for row in rows if row.name == f"lr {RATE:g}, {RETAIN}")
    others = [row.kl for row in rows if row.way != RETAIN and row.loss <= held.loss]
    return held.kl, min(others, default=math.nan)


def draw(rows: Sequence[Row], file: Path) -> None:
    """The task's loss against what was forgotten, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for way, mark in zip((PLAIN, *WAYS), "osD^", strict=True):
        own = sorted((row for row in rows if row.way == way), key=lambda row: row.kl)
        axes.plot([row.kl for row in own], [row.loss for row in own], mark + ("" if way == RETAIN else "-"), label=way)
    axes.set_xscale("log")
    axes.set_xlabel("forgotten: KL(base ‖ tuned) on general text, nats per token")
    axes.set_ylabel("held-out loss of the task, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def write(rows: Sequence[Row], steps: int, tokens: int) -> None:
    """docs/remembering.md, its picture, and the figure that is compared."""
    draw(rows, PAGE.with_suffix(".svg"))
    head = ("run", "task, nats", "KL, nats", "time")
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---", *["---:"] * 3), *cells(rows))]
    held, other = kept(rows)
    PAGE.write_text(
        "# Remembering: the task against forgetting\n\n"
        f"Each point is a run of the demo's task, {steps} steps of {tokens} tokens, rank 16 (SmolLM2-135M). To the "
        "left less is forgotten of general text that no run has seen, and further down the task is learnt better.\n\n"
        f"![The held-out loss of the task against the KL from the base, by way]({PAGE.stem}.svg)\n\n"
        + "\n".join(lines)
        + f"\n\n*lr*: the rate; *scale*: the adapter of lr {RATE:g}, weaker; *replay*: plain text among the rows, for "
        "as much time as *retain* takes; *retain*: `train.retain`, with weight 1 and share 0.1 where the name doesn't "
        "say otherwise. *time*: of the steps, beside the plain run at "
        f"lr {RATE:g}. Written by `python -m benchmarks.retain --record`.\n",
        encoding="utf-8",
    )
    what = f"held to the base, lr {RATE:g}: KL from it, of the least that another way has at no higher loss of the task"
    if math.isfinite(other):
        note(Measured(SECTION, what, held / other, at_most=True, bound=1.0, command="python -m benchmarks.retain"))


def demo(folder: Path, weight: float, share: float, record: bool) -> None:
    """The demo itself, without it and with it."""
    recipe = Path(__file__).parents[1] / "recipes/demo.yaml"
    results = []
    for name, retain in (("demo", None), ("demo-retain", {"data": KEPT, "weight": weight, "share": share})):
        run = Run(folder / name)
        if not run.result.is_file():
            retained = f"train.retain={json.dumps(retain)}"
            train(load_config(recipe, [retained, f"output={run.folder}"]), replace=True)
        results.append(run.read_json(run.result))
    without, held = results
    error = held["eval"]["after"]["phoneme_error_rate"]
    kl, more = held["forgetting"]["kl"], held["seconds"] / without["seconds"]
    cells = [
        (name, f"{one['eval']['after']['phoneme_error_rate']:.3f}", f"{one['forgetting']['kl']:.3f}", one["seconds"])
        for name, one in zip(("without", "with"), results, strict=True)
    ]
    print(table([(*cell[:3], f"{cell[3]:.0f} s") for cell in cells], ("", "phoneme errors", "KL, nats", "time")))
    if record:
        command = f"python -m benchmarks.retain --demo --weight {weight:g} --share {share:g}"
        for what, value, bound, unit in (
            ("the demo held to its base: phoneme error rate", error, 0.25, "errors"),
            ("the demo held to its base: KL from it on general text", kl, 0.4, "nats"),
            ("the demo held to its base: time of its steps, of that without", more, 1.2, "x"),
        ):
            note(Measured(SECTION, what, value, unit=unit, bound=bound, at_most=True, command=command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the demo with and without it")
    parser.add_argument("--weight", type=float, default=0.3, help="of the demo's KL")
    parser.add_argument("--share", type=float, default=0.05, help="of the demo's general tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/retain"))
    parser.add_argument("--steps", type=int, default=40, help="of the curve's runs")
    parser.add_argument("--tokens", type=int, default=512, help="of each step")
    parser.add_argument("--record", action="store_true", help="write the page, and keep the figures")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.demo:
        demo(asked.out, asked.weight, asked.share, asked.record)
        return
    rows = curve(asked.out, asked.steps, asked.tokens)
    print(table(cells(rows), ("", "task, nats", "KL, nats", "time"), align="lrrr"))
    if asked.record:
        write(rows, asked.steps, asked.tokens)


if __name__ == "__main__":
    main()
