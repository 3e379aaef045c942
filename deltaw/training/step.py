"""One optimiser step of a run's learners, from batches to records.

A learner's loss is the sum over its documents of the step, divided once by what its objective counts in them (its own
supervised tokens, pairs, …): so gradient accumulation is exact, and other learners' documents in a batch change
nothing. In float16 it is the gradient that is divided, not the loss: below 2⁻²⁴ that type has nothing, and on the
demo's rows (SmolLM2-135M) the gradient of a mean over 3,770 tokens was off by 4.4 %, over 37,700 by 28 %, and that of
the sum by 0.2 % (bfloat16's by 1.8 %, whichever is divided: it has float32's range, and so the loss is divided as
ever). A step is applied only if its loss and its gradient are finite (watch.py). It depends on the state before it and
on nothing else, so stopping anywhere and resuming gives the same bits (on a CPU).

With `train.retain` a step's batches have rows that are held to the base (retain.py): the mean of their KL, over all of
the step's, is added with its weight to what goes backward. The loss that is recorded, watched and judged stays the
task's; `retain_kl` is beside it.

Several processes take a step together (world.py): each the passes of its share of the batches, by their numbers in the
step, so that dropout draws as it does in one. Then the gradients are summed over all, the losses are gathered by batch,
and everything after that is decided by every process from the same numbers.

An objective that wants an anchor (KTO's) has it before the step's passes: the mean over the mismatched answers of all
its batches, so that it doesn't hang on how these were cut.

On a GPU the passes and updates of a single learner are recorded and replayed (captured.py): the same steps, with one
wait for the device in each.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.base.objective import sft
from deltaw.data.loader import LoaderState, dealt
from deltaw.kernels.logprobs import IGNORE, Logprobs
from deltaw.kernels.segments import NOBODY
from deltaw.training.anchor import anchors
from deltaw.training.captured import Captured, Ran
from deltaw.training.learner import Learner
from deltaw.training.retain import Retains, informed
from deltaw.training.watch import CannotGoOn, Unfit, check_loss
from deltaw.training.world import ALONE, World

NO_RETAINS: Retains = {}


def step(
    forward: Forward,
    learners: Sequence[Learner],
    batches: Sequence[Batch],
    position: LoaderState,
    captured: Captured | None = None,
    world: World = ALONE,
    abreast: bool = False,
    retains: Retains = NO_RETAINS,
) -> list[dict[str, Any]]:
    """A record for each learner: its update, or why there was none. Its documents are those that take its adapter;
    where batches don't say whose they are, there is one learner.

    `batches`: of the whole step, whoever takes them. `position`: where the data stands afterwards. `captured`: the only
    learner's passes and updates, recorded. `world`: the processes that take the step together; `abreast`: each has to
    make as many passes as every other (sharding.py). `retains`: what holds learners to the base (retain.py). Raises
    CannotGoOn (watch.py) of the first learner that can't, when the others have taken their steps; ValueError for
    documents of nobody here.
    """
    positions = [position] * len(learners)
    how: dict[str, Any] = {"captured": captured, "world": world, "abreast": abreast, "retains": retains}
    taken = step_together(forward, learners, batches, positions, **how)
    for one in taken:
        if one.ended is not None:
            raise one.ended
    return [one.record for one in taken]


class Taken(NamedTuple):
    """What a step came to for one learner: its record, or why it can't go on (CannotGoOn), its state as it was."""

    record: dict[str, Any]
    ended: CannotGoOn | None = None


def step_together(
    forward: Forward,
    learners: Sequence[Learner],
    batches: Sequence[Batch],
    positions: Sequence[LoaderState],
    *,
    numbers: Sequence[int] | None = None,
    captured: Captured | None = None,
    world: World = ALONE,
    abreast: bool = False,
    retains: Retains = NO_RETAINS,
) -> list[Taken]:
    """The same of learners that may each be elsewhere in data of their own, and end by themselves: what became of each.

    `positions`: by learner. `numbers`: by batch, which of its own step it is for the learners whose documents it has;
    else they are numbered as they come.
    """
    _check_owners(learners, batches, retains)
    began = time.monotonic()
    if retains and abreast:
        batches = [informed(batch.to(learners[0].attached.parameters[0].device), retains) for batch in batches]
    shares = [_Share(learner, batches) for learner in learners]
    for number, anchor in anchors(forward, learners, batches, world, abreast=abreast).items():
        share = next(share for share in shares if share.learner.attached.number == number)
        share.objective = share.objective.with_anchor(anchor)

    # 1. Forward and backward, batch by batch. Each learner's loss counts by its own tokens; the gradients add up.
    ran = _taken(forward, shares, batches, numbers or range(len(batches)), captured, world, abreast, retains)
    taken = [_settled(share, position, ran) for share, position in zip(shares, positions, strict=True)]
    # 6. The time is shared as the tokens are.
    seconds, tokens = time.monotonic() - began, sum(share.tokens for share in shares)
    return [
        one._replace(record=share.timed(one.record, seconds, tokens)) for one, share in zip(taken, shares, strict=True)
    ]


def _settled(share: "_Share", position: LoaderState, ran: Ran | None) -> Taken:
    """A learner's update, of the gradients that it has."""
    learner, state = share.learner, share.learner.state
    record: dict[str, Any] = {"step": state.step + 1}
    try:
        # 2. A loss that isn't a number, or is a spike, isn't applied; nor is such a gradient.
        if share.unfit:
            raise share.unfit
        # 3. Clip.
        if learner.undivided and ran is None:
            learner.divide(share.count)
        norm = learner.clip() if ran is None else ran.norm
        if not math.isfinite(norm):
            raise Unfit("the gradient is NaN or infinite", share.rows, not_finite=True)
        check_loss(share.loss, share.rows, state, learner.config)
        # 4. The rate of this step, and the update.
        rate = learner.update(share.loss, share.batches, ran.update if ran is not None else None)
        loss = {"loss": share.loss} if share.objective.has_loss else {}
        record |= {**loss, "lr": rate, "grad_norm": norm, **share.figures}
        learner.falling.see(share.figures, state.step + 1)
    except Unfit as unfit:
        try:
            learner.skip(unfit)
        except CannotGoOn as ended:
            return Taken({}, ended)
        record |= {"skipped": unfit.what, "rows": unfit.rows}
    except CannotGoOn as ended:
        return Taken({}, ended)
    finally:
        if ran is None:  # what is recorded keeps its gradients
            learner.optimizer.zero_grad()
    # 5. Count, and write down.
    state.step += 1
    state.epoch, state.step_in_epoch = position.epoch, position.step
    state.tokens += share.tokens
    state.supervised_tokens += share.supervised
    return Taken(record | {"tokens": state.tokens, "supervised_tokens": state.supervised_tokens})


def _taken(
    forward: Forward,
    shares: Sequence["_Share"],
    batches: Sequence[Batch],
    drawn: Sequence[int],
    captured: Captured | None,
    world: World,
    abreast: bool,
    retains: Retains,
) -> Ran | None:
    """All passes of the step, each by one of the processes; what was recorded gave, where it could be."""
    deal = dealt([len(batch.tokens_T) for batch in batches], world.size)
    ran, mine = None, deal[world.rank]
    if captured is not None and not shares[0].unfit:
        ran = captured.run(shares[0].batches, shares[0].supervised, mine, world)
    if ran is not None:
        shares[0].losses |= ran.losses
    else:
        passes = max(sum(batches[number].teaches for number in numbers) for numbers in deal)
        _passes(forward, shares, batches, drawn, mine, passes if abreast else 0, retains)
        _add_up(shares, world)
    _see_all(shares, deal, world)
    for share in shares:
        share.add_figures(world)
    return ran


def _passes(
    forward: Forward,
    shares: Sequence["_Share"],
    batches: Sequence[Batch],
    drawn: Sequence[int],
    numbers: Sequence[int],
    least: int,
    retains: Retains,
) -> None:
    """Forward and backward of the batches of these numbers, as long as a learner has use for them. `drawn`: by batch,
    the number that dropout draws from. `least`: passes to make in any case; those of which nobody has use add
    nothing."""
    learners = [share.learner for share in shares]
    device = learners[0].attached.parameters[0].device
    with ExitStack() as dropout:
        for learner in learners:
            dropout.enter_context(learner.dropping())
        for number in numbers:
            fit = [share for share in shares if share.is_fit]
            if not fit:
                break
            batch = batches[number].to(device)
            if retains:
                batch = informed(batch, retains)  # before anything is drawn: the base draws nothing
            with ExitStack() as draws:
                for learner in learners:
                    draws.enter_context(learner.drawing(drawn[number], apart=len(learners) > 1))
                losses, drifts = _losses(forward, batch, fit)
                means = [share.mean(loss, number) for share, loss in zip(fit, losses, strict=True)]
                for share, drift in zip(fit, drifts, strict=True):
                    if drift is not None:
                        means.append(share.held(drift, number, retains[share.learner.attached.number].weight))
                counted = [mean for mean in means if mean is not None]
                if least and batches[number].teaches:
                    least, counted = least - 1, counted or [0.0 * losses[0]]
                if counted:
                    sum(counted[1:], counted[0]).backward()
        for _ in range(least):
            batch = next(batch for batch in batches if batch.supervised)
            (0.0 * forward.loss(batch.to(device))[0]).backward()


def _add_up(shares: Sequence["_Share"], world: World) -> None:
    """The gradients of all processes, in each of them."""
    learners = [share.learner for share in shares if share.supervised]
    if learners and not world.is_alone:
        gradients = [gradient for learner in learners for gradient in learner.gradients()]
        world.add(gradients, f"the gradients of step {learners[0].state.step + 1}")


def _see_all(shares: Sequence["_Share"], deal: Sequence[Sequence[int]], world: World) -> None:
    """The losses of all batches, in each process: what a step is judged by."""
    count = sum(map(len, deal))
    losses = [share.losses.get(number, 0.0) for share in shares for number in range(count)]
    drifts = [sum(share.drifts.values()) for share in shares]
    if not world.is_alone:
        sums = world.sums([*losses, *drifts], f"the losses of step {shares[0].learner.state.step + 1}")
        losses, drifts = sums[: len(losses)], sums[len(losses) :]
    ranks = {number: rank for rank, numbers in enumerate(deal) for number in numbers}
    for number, share in enumerate(shares):
        share.judge(losses[number * count : (number + 1) * count], {} if world.is_alone else ranks)
        if share.retained:
            share.judge_drift(drifts[number])


def _check_owners(learners: Sequence[Learner], batches: Sequence[Batch], retains: Retains) -> None:
    """Raise ValueError where a document has no learner here, or could have two. `NOBODY`'s are nobody's to learn."""
    numbers, first = {learner.attached.number for learner in learners}, learners[0].attached.carried.first
    unknown = {update for batch in batches for update in batch.updates or (first,)} - numbers - {NOBODY}
    if unknown:
        raise ValueError(f"documents take update {min(unknown)}, and the learners are of {sorted(numbers)}")
    if len(learners) > 1 and not all(batch.updates for batch in batches):
        raise ValueError(f"{len(learners)} learners, and the batch doesn't say which documents belong to which")
    if any(learner.config.retain and learner.attached.number not in retains for learner in learners):
        raise ValueError("a learner is to retain text, and the step is given none")


class _Share:
    """One learner's part of a step: its documents, its loss (per token, pair, …: what its objective counts), and why it
    can't be an update."""

    def __init__(self, learner: Learner, batches: Sequence[Batch]) -> None:
        self.learner, self.objective, number = learner, learner.objective, learner.attached.number
        self.batches = [batch.labelled_for(number) for batch in batches]
        self.rows = [origin for batch in self.batches for origin in batch.origins]
        self.tokens = sum(batch.tokens_of(number) for batch in batches)
        self.supervised = sum(batch.supervised for batch in self.batches)
        self.count = sum(self.objective.count(batch) for batch in self.batches)
        self.losses: dict[int, float] = {}  # by the number of the batch: of those that this process passed
        self.drifts: dict[int, float] = {}  # likewise: the KL of the rows that are held to the base
        self.retained = sum(batch.retained_rows(number) for batch in batches)
        self._sum, self._drift, self._sums = 0.0, 0.0, dict[str, float]()
        hollow = next((batch.rewarded for batch in batches if batch.rewarded and batch.rewarded.why), None)
        self.unfit = None if self.supervised else Unfit("none of its tokens is trained", self.rows)
        self.unfit = Unfit(hollow.why, self.rows, fix=hollow.fix) if hollow else self.unfit

    @property
    def loss(self) -> float:
        return self._sum / self.count

    @property
    def figures(self) -> dict[str, float]:
        """What the objective reports of the step."""
        drift = {"retain_kl": self._drift / self.retained} if self.retained else {}
        return self.objective.means(self._sums) | drift

    def timed(self, record: dict[str, Any], seconds: float, tokens: int) -> dict[str, Any]:
        """The record with the learner's time: its part of `seconds`, which went to `tokens` of all."""
        if not record:
            return record
        self.learner.state.seconds += seconds * (self.tokens / tokens)
        return {**record, "seconds": round(self.learner.state.seconds, 3)}

    @property
    def is_fit(self) -> bool:
        """Whether there is something to learn from, as far as this process has seen."""
        return self.unfit is None and all(map(math.isfinite, [*self.losses.values(), *self.drifts.values()]))

    def loss_of(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        """Of its documents in a batch, from a pass over all of them; what it reports of them is noted."""
        mine, own = batch.labelled_for(self.learner.attached.number), logprobs
        if batch.updates:
            logp_K = logprobs.logp_K[mine.labels_T[batch.labels_T != IGNORE] != IGNORE]
            own = Logprobs(logp_K, -logp_K.sum())
        for name, value in self.objective.figures(Logprobs(*(part.detach() for part in own)), mine).items():
            before = self._sums.get(name, 0.0)
            self._sums[name] = max(before, value) if name in self.objective.largest else before + value
        return self.objective(own, mine)

    def mean(self, loss: Tensor, number: int) -> Tensor | None:
        """What a batch's loss adds to the step's; None where it adds nothing to learn from."""
        self.losses[number] = float(loss.detach())
        if not self.batches[number].supervised or not self.is_fit:
            return None
        return loss if self.learner.undivided else loss / self.count

    def held(self, drift: Tensor, number: int, weight: float) -> Tensor | None:
        """What the KL of a batch's retained rows adds to the step's loss; None where it adds nothing to learn from."""
        self.drifts[number] = float(drift.detach())
        if not self.is_fit:
            return None
        return drift * (weight / self.retained * (self.count if self.learner.undivided else 1))

    def drift_of(self, drift_R: Tensor, batch: Batch) -> Tensor | None:
        """The sum of the KL over its own rows of a batch; None where it has none."""
        assert batch.retained is not None
        lengths = batch.retained.lengths(self.learner.attached.number)
        if sum(lengths) in (0, len(drift_R)):
            return drift_R.sum() if sum(lengths) else None
        parts = drift_R.split([end - start for start, end in batch.retained.spans])
        return torch.cat([part for part, length in zip(parts, lengths, strict=True) if length]).sum()

    def add_figures(self, world: World) -> None:
        """Those of all processes, in each of them."""
        names = self.objective.sums
        if names and not world.is_alone:
            sums = [self._sums.get(name, 0.0) for name in names]
            self._sums |= dict(zip(names, world.sums(sums, "what the objective reports"), strict=True))
        for name in self.objective.largest if not world.is_alone else ():
            self._sums[name] = world.most(self._sums.get(name, 0.0), "what the objective reports")

    def judge(self, losses: Sequence[float], ranks: Mapping[int, int]) -> None:
        """Take the losses of all batches, up to one that isn't a number. `ranks`: who passed which, where there are
        several."""
        for number, value in enumerate(losses):
            if self.unfit:
                return
            if math.isfinite(value):
                self._sum += value
                continue
            where = f" on rank {ranks[number]}" if number in ranks else ""
            what = f"the loss of batch {number + 1} of {len(losses)} is NaN or infinite{where}"
            self.unfit = Unfit(what, self.batches[number].origins, not_finite=True)

    def judge_drift(self, drift: float) -> None:
        """Take the KL of all batches."""
        self._drift = drift
        if self.unfit is None and not math.isfinite(self._drift):
            self.unfit = Unfit("the KL from the base (train.retain) is NaN or infinite", self.rows, not_finite=True)


def _losses(
    forward: Forward, batch: Batch, shares: Sequence[_Share]
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """By learner (the sum over its documents, the KL of its rows that are held to the base), from one pass."""
    if batch.retained is not None:
        logprobs, drift_R = forward.scores_and_drift(batch)
        return [share.loss_of(logprobs, batch) for share in shares], [
            share.drift_of(drift_R, batch) for share in shares
        ]
    without: list[Tensor | None] = [None] * len(shares)
    if not batch.updates and all(share.objective is sft for share in shares):
        (_,) = shares
        return [forward.loss(batch)[0]], without
    logprobs = forward.scores(batch)
    return [share.loss_of(logprobs, batch) for share in shares], without
