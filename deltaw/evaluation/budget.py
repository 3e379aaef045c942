"""The smallest adapter that still does as well, with ranks chosen by the loss on held-out rows.

A direction's worth to the task isn't its σ: an energy says how much of the update is kept, and only a loss
says whether that was enough. So the global budget of `resize_global` (the largest singular values of all modules, most
energy for the least rank) is bisected by measuring:

    the fewest directions k with  loss(k) ≤ (1 + max_increase) · loss(all)

Bisected in k, not in the energy: the spectra fall so fast that in the demo's adapter 71 % of all directions share the
last per cent. Each step halves what is left, so seven settle k to 1/128 of all directions. That rests on the loss
growing as directions go; where it doesn't quite, the result is still an adapter that was measured and is good enough,
only not surely the smallest. A size chosen on the rows that judge it looks a little too good: keep other rows for the
final figure.

A smaller adapter is measured in the layers of the full one, its factors padded with zeros: the update is the same and
nothing is rebuilt.

Letters: K singular values of all modules.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from deltaw.adapter.algebra import energy_shares, low_rank_updates, pad, resize_global
from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.file import Adapter
from deltaw.adapter.place import check_bare
from deltaw.data.example import Example
from deltaw.data.examples import supervised_of
from deltaw.errors import InputError
from deltaw.evaluation.held_out import held_out_loss
from deltaw.model import Model
from deltaw.show.progress import Display

STEPS = 7
NOTHING = 0.01  # nats per token: what a loss is held to at least, before a share of it is taken


@dataclass(frozen=True)
class Trial:
    """One size that was measured: the share of Σ ‖ΔW‖²_F kept, the stored numbers, the mean rank over modules, and
    the held-out loss in nats per supervised token."""

    energy: float
    parameters: int
    mean_rank: float
    loss: float


def resize_to_loss(
    model: Model, adapter: Adapter, examples: Sequence[Example], max_increase: float, *, display: Display
) -> tuple[Adapter, list[Trial]]:
    """The smallest adapter found whose loss is at most (1 + max_increase) times the full one's (counted as `NOTHING` at
    least: a share of 0 would allow nothing); all trials, the full adapter's first.

    The model may carry the adapter or none, and is left as it was. Raises InputError: a negative or infinite
    max_increase, no rows, another adapter on the model, an adapter of another base.
    """
    if not (math.isfinite(max_increase) and max_increase >= 0):
        raise InputError(f"the increase in loss must be a share of 0 or more, 0.01 for 1 %, not {max_increase}")
    check_rows(examples)
    shares_K = energy_shares(adapter)
    best, trials = adapter, list[Trial]()
    with carrying(model, adapter) as attached, display.task("resizing", STEPS + 1) as progress:

        def measured(smaller: Adapter, energy: float) -> float:
            wear(attached, smaller)
            loss, _ = held_out_loss(model.forward, examples)
            ranks = [factors.rank for factors in smaller.body.values()]
            trials.append(Trial(energy, smaller.parameters, sum(ranks) / len(ranks), loss))
            progress(len(trials), f"{smaller.parameters:,} parameters, loss {loss:.4f}")
            return loss

        full = measured(adapter, 1.0)
        limit = full + max_increase * max(full, NOTHING)
        too_few, enough = 0, len(shares_K)
        while enough - too_few > 1 and len(trials) <= STEPS:
            k = (too_few + enough) // 2
            energy = float(shares_K[k - 1])
            smaller, _ = resize_global(adapter, energy)
            if measured(smaller, energy) <= limit:
                best, enough = smaller, k
            else:
                too_few = k
        progress(STEPS + 1)
    return best, trials


@contextmanager
def carrying(model: Model, adapter: Adapter) -> Iterator[Attached]:
    """The adapter on the model for the length of a block, then whatever was there. Its layers may be changed within.

    Raises InputError for an adapter of another base, and where the model carries another one.
    """
    if wrong := adapter.base.mismatch(model.id):
        raise InputError(f"the adapter doesn't belong to this base: {wrong}")
    if model.attached is None:
        check_bare(model.base.model)  # rows that say nothing take an adapter that was there before
        attached = attach(model.base.model, adapter, tokens=model.renderer.tokens)
        try:
            yield attached
        finally:
            detach(attached)
        return
    sizes = {path: (update.shape, update.rank) for path, update in adapter.factors.items()}
    values = (layer.values(path) for path, layer in model.attached.layers.items())
    carried = {path: update for some in values for path, update in some.items()}
    if sizes != {path: (update.shape, update.rank) for path, update in carried.items()}:
        raise InputError("the model carries another adapter", fix="open the base alone, or give the adapter it carries")
    with restored(model.attached):
        yield model.attached


@contextmanager
def restored(attached: Attached) -> Iterator[None]:
    """Puts the factors back as they were when the block ends. Raises InputError where other ones can't be set: in
    DoRA's layers, and in those of a run whose start moved the base."""
    if attached.spec.magnitude or attached.spec.moves_base:
        raise InputError("this model's adapter can't be changed in place", fix="open the trained adapter of a LoRA")
    before = {path: layer.factors() for path, layer in attached.layers.items()}
    try:
        yield
    finally:
        for path, layer in attached.layers.items():
            layer.set_factors(before[path])


def check_rows(examples: Sequence[Example]) -> None:
    """Raise InputError if there is nothing to measure on."""
    if not supervised_of(examples).any():
        raise InputError("no rows to measure the loss on", fix="name a data file with at least one usable row")


def wear(attached: Attached, smaller: Adapter) -> None:
    """Give the layers a smaller adapter's factors, padded to their ranks; trained tokens and whole modules stay."""
    updates = low_rank_updates(smaller, "resized", beside=True)
    for path, layer in attached.layers.items():
        ranks = {one: own.rank for one, own in layer.values(path).items() if one in updates}
        if ranks:
            layer.take_values(path, {one: pad(updates[one], rank) for one, rank in ranks.items()})
