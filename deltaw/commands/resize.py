"""`deltaw resize`: a smaller adapter, by rank, by energy, or by how much its held-out loss may rise."""

from collections.abc import Sequence
from dataclasses import asdict

from deltaw.adapter.algebra import pad_all, resize
from deltaw.commands.made import Made, saved
from deltaw.errors import InputError
from deltaw.evaluation.budget import Trial, resize_to_loss
from deltaw.evaluation.rows import rows_of
from deltaw.files.lock import new_folder
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import table
from deltaw.show.text import percent


def resize_named(
    name: str,
    output: str,
    *,
    rank: int | None,
    energy: float | None,
    max_loss_increase: float | None,
    data: str | None,
    base: str | None,
    uniform: bool,
    display: Display,
) -> Result:
    """Exactly one of `rank`, `energy` and `max_loss_increase` is given; `uniform`: one rank for all modules."""
    if sum(way is not None for way in (rank, energy, max_loss_increase)) != 1:
        raise InputError("give one of --rank, --energy and --max-loss-increase")
    named = Named(name)
    with new_folder(output) as folder:
        if max_loss_increase is None:
            made = Made(*resize(named.adapter, rank=rank, energy=energy, uniform=uniform))
        else:
            model, examples = rows_of(named, data, base=base, display=display)
            smaller, trials = resize_to_loss(model, named.adapter, examples, max_loss_increase, display=display)
            more = {"trials": [asdict(trial) for trial in trials]}
            made = Made(pad_all(smaller) if uniform else smaller, (), [trial_table(trials)], more)
        return saved(made, folder, named.adapter, name)


def trial_table(trials: Sequence[Trial]) -> str:
    """What each size came to, beside the full adapter's loss, which is the first."""
    full = trials[0].loss
    rows = [
        (f"{percent(t.energy, 3)}", f"{t.parameters:,}", f"{t.mean_rank:.1f}", f"{t.loss:.4f}", _change(t.loss, full))
        for t in trials
    ]
    return table(rows, ("energy", "parameters", "mean rank", "held-out loss", ""), align="r")


def _change(loss: float, full: float) -> str:
    """A share of the full adapter's loss, which is 0 where a task was learnt by heart."""
    return f"{percent(loss / full - 1, 2, signed=True)}" if full > 0 else f"{loss - full:+.4f}"
