"""compress: training at a high rank and cutting the adapter afterwards beats training at the low rank.

The cut is the best there is in the Frobenius norm (adapter/algebra.py). Whether the task needs only the largest
singular values is another matter, and the question here. The cut adapter is measured in the layers of the high one, its
factors padded with zeros: the update is the same and the base is opened once.
"""

import statistics
from collections.abc import Mapping

from deltaw.adapter.algebra import resize
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.evaluation.budget import wear
from deltaw.evaluation.held_out import held_out_loss
from deltaw.evaluation.rows import rows_of
from deltaw.studies.lab import RANKS, Lab, Trial, best
from deltaw.studies.study import Claim, Judgement, Outcome

HIGH, LOW = RANKS[-1], RANKS[-2::-1]  # 64; 16, 4, 1

CLAIM = Claim(
    name="compress",
    title="Train high, compress after?",
    claim="An adapter trained at a high rank and cut to a low one does better than one trained at the low rank.",
    source="PEFT's MetaMathQA benchmark: r = 64 52.92, cut to r = 32 51.48, trained at r = 32 48.22",
    method=f"rank {HIGH} at its best rate of the study `rank`, every module cut to ranks {', '.join(map(str, LOW))} by "
    "the SVD of its update; against the same ranks trained, each at its own best rate; held-out loss",
    rule="at each rank the cut adapter wins or loses if its loss differs from the trained one's by more than seeds "
    f"do. Held, if it wins more often than it loses and doesn't lose at rank {LOW[0]}; too noisy, if it never wins nor "
    "loses",
)


def run(lab: Lab) -> Outcome:
    trained = {rank: _at_best_rate(lab, rank) for rank in RANKS}
    losses = {rank: statistics.mean(trial.loss for trial in trials) for rank, trials in trained.items()}
    each = [cut_losses(trial, lab) for trial in trained[HIGH]]
    cut = {rank: statistics.mean(losses_of[rank] for losses_of in each) for rank in LOW}
    tie = lab.margin(len(lab.seeds))
    because = (
        f"Rank {HIGH} ends at {losses[HIGH]:.3f} nats; "
        + "; ".join(f"cut to {rank} at {cut[rank]:.3f}, rank {rank} itself at {losses[rank]:.3f}" for rank in LOW)
        + f". Seeds alone make a difference of up to {tie:.3f}."
    )
    rows: list[list[Cell]] = [[rank, cut[rank], losses[rank], cut[rank] - losses[rank]] for rank in LOW]
    curves = {
        "trained at the rank": (list(RANKS), [losses[rank] for rank in RANKS]),
        f"trained at {HIGH} and cut": ([*LOW[::-1], HIGH], [*(cut[rank] for rank in LOW[::-1]), losses[HIGH]]),
    }
    picture = Picture(
        pictures.lines(curves, x_label="rank", y_label="held-out loss, nats per token", log_x=True, log_y=True),
        "Held-out loss against the rank, for adapters trained at it and for one cut to it.",
        "Two curves that meet at the highest rank",
        Table(
            ["rank", "cut", "trained", "difference"],
            [*rows, [HIGH, None, losses[HIGH], None]],
            f"Held-out loss, the mean of {len(lab.seeds)} seeds",
        ),
    )
    figures = {
        "trained": {str(rank): loss for rank, loss in losses.items()},
        "cut": {str(rank): loss for rank, loss in cut.items()},
        "tie": tie,
    }
    return Outcome(verdict(cut, losses, tie), because, [picture], figures)


def verdict(cut: Mapping[int, float], trained: Mapping[int, float], tie: float) -> Judgement:
    """Losses by rank; differences of up to `tie` come from seeds alone."""
    wins = [rank for rank in LOW if trained[rank] - cut[rank] > tie]
    losses = [rank for rank in LOW if cut[rank] - trained[rank] > tie]
    if not wins and not losses:
        return "too noisy"
    return "held" if len(wins) > len(losses) and LOW[0] not in losses else "did not hold"


def cut_losses(trial: Trial, lab: Lab) -> dict[int, float]:
    """The held-out loss of a trial's adapter at each of the low ranks."""
    model, examples = rows_of(str(trial.run.folder), None, base=None, display=lab.display)
    assert model.attached is not None
    adapter, losses = trial.adapter(), {}
    with lab.display.task("cutting", len(LOW)) as progress:
        for rank in LOW:
            smaller, _ = resize(adapter, rank=rank)
            wear(model.attached, smaller)
            losses[rank], _ = held_out_loss(model.forward, examples)
            progress(len(losses), f"rank {rank}, loss {losses[rank]:.3f}")
    return losses


def _at_best_rate(lab: Lab, rank: int) -> list[Trial]:
    """A trial per seed, at the rate that does best with the first seed."""
    adapter = {"rank": rank, "alpha": 32}
    rate, _ = best(lab.sweep(adapter))
    return [
        lab.train(f"rank {rank}, lr {rate:g}, seed {seed}", seed=seed, adapter=adapter, lr=rate) for seed in lab.seeds
    ]
