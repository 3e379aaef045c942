"""What remembering costs and keeps: the task's loss against forgetting, by `train.retain` and by what else there is.

    python -m benchmarks.retain            the curve: some 15 short runs of the demo's task, 20 minutes on two cores
    python -m benchmarks.retain --demo     recipes/demo.yaml with and without it, 10 minutes
    … --record                             keep the figures for docs/performance.md; a finished run isn't repeated

    lower rates    the cheapest way to forget less: to learn less
    scale          the same adapter, weaker (`deltaw scale`)
    replay         plain text among the rows, trained on like them, for as much time as `retain` takes: half as many
                   tokens again as `share` says, since the base is asked, too
    retain         the KL from the base, at two shares and several weights

A run is 48 steps of 512 tokens of the task; replay's text comes on top, as retain's does. Held-out words and the
general text that is measured are the same for all. Time is that of the steps.
"""

import argparse
import json
import random
from collections.abc import Iterator
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
STEPS, TOKENS, WORDS, HELD_OUT = 48, 512, 3000, 200
RATE, RATES, SCALES = 2e-3, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), (0.25, 0.5, 0.75)
WEIGHTS, SHARES = (0.1, 0.3, 1.0, 3.0), (0.05, 0.1)


@dataclass(frozen=True)
class Row:
    """An arm at its end: nats per token, and the seconds of its steps."""

    name: str
    loss: float
    kl: float
    seconds: float


def arms() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings of `train`); `replay` is taken out again."""
    for rate in RATES:
        yield f"lr {rate:g}", {"lr": rate}
    for rate in RATES[-3:]:
        yield f"lr {rate:g}, retain", {"lr": rate, "retain": {"data": KEPT}}
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


def trained(folder: Path, name: str, settings: dict[str, Any]) -> Run:
    """The arm's run, which may be there already."""
    run = Run(folder / name.replace(" ", "-").replace(",", ""))
    if run.result.is_file():
        return run
    replay, words = settings.pop("replay", 0.0), str(folder / "words.jsonl")
    more = {"steps": round(STEPS * (1 + replay)), "tokens_per_step": TOKENS, "tokens_per_batch": TOKENS}
    config = {
        "base": "builtin:smollm2-135m",
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


def curve(folder: Path, record: bool) -> None:
    """Train every arm, and print the table."""
    files(folder)
    rows, every = list[Row](), list(arms())
    with Display().task("remembering", len(every)) as progress:
        for number, (name, settings) in enumerate(every):
            progress(number, name)
            run = trained(folder, name, dict(settings))
            rows.append(row_of(name, run))
            if settings == {"lr": RATE}:
                rows += scaled(run)
        progress(len(every))
    plain = next(row for row in rows if row.name == f"lr {RATE:g}")
    cells = [(row.name, f"{row.loss:.3f}", f"{row.kl:.3f}", f"{row.seconds / plain.seconds - 1:+.0%}") for row in rows]
    print(table(cells, ("", "task, nats", "KL, nats", "time"), align="lrrr"))
    if record:
        for row in rows:
            for what, value in (("held-out loss of the task", row.loss), ("KL from the base", row.kl)):
                note(
                    Measured(SECTION, f"{row.name}: {what}", value, unit="nats", command="python -m benchmarks.retain")
                )


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
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/performance.md")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.demo:
        demo(asked.out, asked.weight, asked.share, asked.record)
    else:
        curve(asked.out, asked.record)


if __name__ == "__main__":
    main()
