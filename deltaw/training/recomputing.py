"""train.checkpointing: auto, as what the run does; and what it costs.

Whether layers keep what their backward needs, or run again for it (base/recompute.py), changes no bit of a run on a
CPU, so it may be chosen by what this machine has free, anew whenever the run resumes: config.yaml keeps `auto`, and
result.json says what was done. It costs time, so it is done only where the largest batch wouldn't fit without it:

    1. one pass over a 32nd of that batch. Most runs end here: even if all that it took grew with the batch, half of the
       free memory would do
    2. passes over a 16th and an 8th: what the whole batch would take, by fit.py. It fits: layers keep what they need
    3. the same passes with layers recomputed; on a GPU where that isn't enough, with their inputs offloaded. What takes
       less is done, and a line says how much less and how much longer it takes

The predicted peak is that of the whole run, as `deltaw plan` has it (memory.py). A base whose layers give another
gradient when they run again is refused where they were asked to, and left alone where they weren't.

Rejected: trying the largest batch and falling back when memory runs out (on a CPU it has by then pushed out everything
else on the machine), and writing the choice into config.yaml, as is done with what changes the bits: a run that goes on
where there is less memory would need to be told.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.base.forward import Forward
from deltaw.base.recompute import WORDS, Recompute, blocks_of
from deltaw.data.pack import pack
from deltaw.errors import InputError
from deltaw.files.output import gib
from deltaw.show.progress import Display
from deltaw.training.fit import Point, cut, fit_memory, measure
from deltaw.training.largest import Work
from deltaw.training.learner import Learner
from deltaw.training.memory import (
    bounded,
    few_holes,
    free_memory,
    held_memory,
    is_out_of_memory,
    of_all_steps,
    release,
)
from deltaw.training.opening import Opened

PARTS = (32, 16, 8)  # of the largest batch, that are tried
AMPLE = 0.5  # of the free memory: what surely takes less needn't be measured
TRIED = 48  # tokens on which a recomputed gradient is compared
CLOSE = 1e-2  # of the gradient on a GPU, by which two runs of one backward may differ: attention adds in any order


@dataclass(frozen=True)
class Choice:
    """How the layers of a run keep their activations. Where that was measured: the predicted peaks in bytes with it and
    without, and how much longer a step takes, as a share."""

    way: str = "none"
    peak: int | None = None
    instead_of: int | None = None
    slower: float | None = None

    def line(self) -> str:
        """In words."""
        if self.peak is None or self.instead_of is None:
            return WORDS[self.way]
        cost = f", about {self.slower:.0%} slower" if self.slower else ""
        return f"{WORDS[self.way]}: {gib(self.peak)} instead of {gib(self.instead_of)}{cost}"


def choose(opened: Opened, learner: Learner, work: Work, display: Display) -> tuple[Opened, Choice]:
    """The run with layers that keep what they should, which a line names where it isn't all. `work`: what is left of
    it. Raises InputError where it asks for what this base can't do."""
    asked = opened.config.train.checkpointing
    if asked == "none" or not work.longest:
        return opened, Choice()
    choice = Choice(asked) if asked != "auto" else _chosen(opened, learner, work)
    if choice.way == "none":
        return opened, choice
    if not same_gradient(opened, learner, choice.way):
        what = "this base's layers give another gradient when they run again"
        if asked != "auto":
            raise InputError(
                f"train.checkpointing: {asked}: {what}", fix="leave it out, and lower train.tokens_per_batch"
            )
        display.say(f"warning: memory is short, but activations can't be recomputed: {what}")
        return opened, Choice()
    display.say(choice.line())
    return keeping(opened, choice.way), choice


def keeping(opened: Opened, way: str) -> Opened:
    """The run with layers that keep what `way` says."""
    if way == "none":
        return opened
    few_holes(opened.device)
    forward = replace(opened.model.forward, recompute=_recompute(opened, way))
    return replace(opened, model=replace(opened.model, forward=forward))


def ways_left(opened: Opened) -> list[str]:
    """What would take less memory than what the run does now, the cheapest first."""
    now = opened.model.forward.recompute
    if now is None:
        known = blocks_of(opened.model.base.model, opened.attached.paths)
        ways = ["blocks", "offload"] if known else []
    else:
        ways = ["offload"] if now.way == "blocks" else []
    return [way for way in ways if way != "offload" or opened.device.type == "cuda"]


@contextmanager
def recomputed(opened: Opened, way: str) -> Iterator[Forward]:
    """Inside, the run's layers are recomputed as `way` says; afterwards they are what they were."""
    forward = opened.model.forward
    now = forward.recompute
    if now is not None:
        now.remove()
    other = _recompute(opened, way)
    try:
        yield replace(forward, recompute=other)
    finally:
        other.remove()
        if now is not None:
            _recompute(opened, now.way)


def _recompute(opened: Opened, way: str) -> Recompute:
    model, attached = opened.model.base.model, opened.attached
    blocks = blocks_of(model, attached.paths)
    return Recompute(model, blocks, draws=bool(attached.spec.dropout), offload=way == "offload")


def _chosen(opened: Opened, learner: Learner, work: Work) -> Choice:
    """By what the largest batch takes."""
    held, free = held_memory(opened.device), free_memory(opened.device)
    ways, forward = ways_left(opened), opened.model.forward

    def enough(point: Point) -> bool:
        most = (point.peak - held) * work.longest_tokens / point.tokens
        return bool(point.supervised) and most <= AMPLE * free

    kept = _measured(opened, learner, work, forward, enough) if ways else None
    if kept is None or (plain := kept.peak(work, opened.device)) <= held + free:
        return Choice()
    few_holes(opened.device)
    best = Choice()
    for way in ways:
        with recomputed(opened, way) as again:
            tried = _measured(opened, learner, work, again)
        peak = tried.peak(work, opened.device) if tried is not None and tried.points else plain
        if peak < (best.peak or plain):
            slower = max(0.0, tried.seconds / kept.seconds - 1) if tried and kept.seconds else None
            best = Choice(way, peak, plain, slower)
        if peak <= held + free:
            break
    return best


@dataclass(frozen=True)
class _Passes:
    """Small batches that were measured; `short`: memory ran out before the last."""

    points: list[Point]
    short: bool = False

    def peak(self, work: Work, device: torch.device) -> int:
        """Of the whole run, as far as training goes; beyond all bounds where even small batches don't fit."""
        if self.short or len(self.points) < 2:
            return 1 << 62
        peak = fit_memory(self.points).bytes_at(work.longest_tokens, work.longest_supervised)
        return of_all_steps(peak, work.steps, device)

    @property
    def seconds(self) -> float:
        """Of a pass over the largest of them, taken twice: the faster one, as other programs run, too."""
        return 0.0 if self.short or not self.points else min(point.seconds for point in self.points[-2:])


def _measured(
    opened: Opened,
    learner: Learner,
    work: Work,
    forward: Forward,
    enough: Callable[[Point], bool] = lambda point: False,
) -> _Passes | None:
    """Passes over parts of the largest batch; None where the first of them is `enough` to tell that it fits."""
    points, sizes = list[Point](), [work.longest_tokens // part for part in PARTS]
    try:
        with bounded(opened.device):
            for point in measure(forward, learner, work.longest, sizes, accumulating=work.batches > 1):
                if not points and enough(point):
                    return None
                points.append(point)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _Passes(points, short=True)
    finally:
        release(opened.device)
    return _Passes(points)


def same_gradient(opened: Opened, learner: Learner, way: str) -> bool:
    """Whether loss and gradient of a few tokens are those of the pass that keeps all: to the bit on a CPU."""
    plain = _gradient(opened.model.forward, opened, learner)
    with recomputed(opened, way) as forward:
        try:
            again = _gradient(forward, opened, learner)
        except RuntimeError as error:  # a layer that saves other tensors the second time, or writes to its input
            if is_out_of_memory(error):
                raise
            return False
    if opened.device.type == "cpu":
        return all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    pairs = [(a.double(), b.double()) for a, b in zip(plain, again, strict=True)]
    return all(bool((a - b).norm() <= CLOSE * a.norm().clamp_min(1e-30)) for a, b in pairs)


def _gradient(forward: Forward, opened: Opened, learner: Learner) -> list[Tensor]:
    """The loss of a few tokens and its gradient; no random number is drawn, and no gradient stays."""
    batch = pack(cut(opened.dataset.train, TRIED)).to(opened.device)
    parameters = learner.attached.parameters
    with torch.random.fork_rng(), learner.dropping():
        try:
            loss, labels = forward.loss(batch)
            if labels:
                loss.backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        finally:
            learner.optimizer.zero_grad()
    return [loss.detach(), *gradients]
