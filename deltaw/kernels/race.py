"""Which kernel of attention a run takes: those that are installed are tried on the model's own heads, and timed.

    each kernel that a package offers (flash.py) runs forward and backward over ragged documents, some of them empty
    it is out if its results aren't as good as those of PyTorch's own, if it fails, or if it can't be recorded
    it is timed as a run uses it: a recorded graph, replayed
    the fastest is preferred for calls with these heads, if it beats PyTorch's own by more than noise

Right means: against attention over padded rows in float32 no output is further off than PyTorch's own kernel, plus one
rounding. That is asked of tokens by how far they stand in their document, since the further, the smaller the numbers,
and a kernel that drops distant keys is hardly off over all. The first 63 count together: the first token's dQ is 0 but
for rounding.

A kernel that writes where it mustn't takes the process's GPU with it, and that can't be tried without risk but in a
process of its own, seconds at every start: such a one is named, with what to do.

Letters: T tokens, H query heads, K key/value heads, E head size, S documents + 1, G groups of tokens.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import InputError, first_line
from deltaw.kernels import flash
from deltaw.kernels.flash import OWN, Attend, Heads, Offer
from deltaw.kernels.graphs import capture
from deltaw.kernels.varlen import own_attention, padded_attention

TOKENS = 8192  # of the batch that is raced on
SHARES = (1.0, 0.6, 0.3, 0.9, 0.1, 0.03, 0.0)  # of the longest document that others have
EMPTY = 2  # documents behind the others
NEAR = 5  # log2 of the places that count as one group, less one
MARGIN = 1.05  # times as fast as PyTorch's own, at least: less is noise, which must not choose
REPLAYS = 5

Clock = Callable[[Callable[[], object]], float]  # work -> ms


@dataclass(frozen=True)
class Race:
    """What was found. `ms`: of a layer's attention, forward and backward, by the name of each kernel that is right;
    `out`: why others that are installed aren't used."""

    winner: str
    ms: Mapping[str, float]
    out: Mapping[str, str]

    def lines(self) -> list[str]:
        """For the run's log."""
        others = "; ".join(f"{name} takes {ms:.2f}" for name, ms in self.ms.items() if name != self.winner)
        lines = [f"{name} isn't used: {why:.200}" for name, why in self.out.items()]
        if others:
            lines.insert(0, f"attention by {self.winner}: {self.ms[self.winner]:.2f} ms a layer and pass; {others}")
        return lines


@cache
def fastest_attention(heads: Heads, longest: int, device: torch.device, kept: Path) -> Race:
    """Let the fastest kernel have the calls with these heads, for the rest of the process. `longest`: tokens of the
    longest document; `kept`: the folder for kernels that are compiled. Raises InputError for a kernel that leaves the
    GPU unusable."""
    kernels, out = installed(flash.offers(device, kept))
    if not kernels:
        return Race(OWN, {}, out)
    race, attend = decide(kernels, Course(heads, layout(TOKENS, min(longest, TOKENS)), device), _recorded_ms)
    flash.prefer(heads, attend)
    return replace(race, out={**out, **race.out})


def installed(offers: Mapping[str, Offer]) -> tuple[dict[str, Attend], dict[str, str]]:
    """(the kernels that are there, why others that are installed can't be had)."""
    kernels: dict[str, Attend] = {}
    out: dict[str, str] = {}
    for name, offer in offers.items():
        try:
            attend = offer()
        except Exception as error:  # whatever a package does when it is imported
            out[name] = f"importing it fails: {first_line(error)}"
        else:
            kernels |= {} if attend is None else {name: attend}
    return kernels, out


def decide(kernels: Mapping[str, Attend], course: "Course", clock: Clock) -> tuple[Race, Attend | None]:
    """(what was found, the kernel to prefer to PyTorch's own)."""
    out: dict[str, str] = {}
    ms = {OWN: clock(course.run(course.own))}
    for name, attend in kernels.items():
        try:
            off = course.off(attend)
            if off <= 1:
                ms[name] = clock(course.run(attend))
            else:  # also NaN
                out[name] = f"its results are wrong here, {off:.1f} times as far off as they may be"
        except Exception as error:
            out[name] = first_line(error)
        _check_still_usable(name, course.device)
    winner = min(ms, key=lambda name: ms[name] * (1 if name == OWN else MARGIN))
    return Race(winner, ms, out), kernels.get(winner)


def _check_still_usable(name: str, device: torch.device) -> None:
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        what = f"{name} left the GPU unusable: {first_line(error):.200}"
        raise InputError(what, fix="uninstall it, or install another release of it") from error


def layout(tokens: int, longest: int) -> list[int]:
    """The starts of documents of all lengths up to `longest`, the total last; the last ones are empty."""
    starts = [0]
    for share in itertools.cycle(SHARES):
        if starts[-1] == tokens:
            return starts + [tokens] * EMPTY
        starts.append(min(tokens, starts[-1] + max(1, round(share * longest))))
    raise AssertionError


class Course:
    """What kernels are tried on: documents that begin at `starts`, with queries, keys and values of these heads. They
    are slices of one matrix, as a joined projection leaves them. `own`: what they are held to."""

    def __init__(self, heads: Heads, starts: list[int], device: torch.device, own: Attend = own_attention) -> None:
        generator, T = torch.Generator(device).manual_seed(0), starts[-1]
        every = heads.query + 2 * heads.shared
        shapes = [(T, every, heads.size), (T, heads.query, heads.size)]
        joined, grad = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        self.own, self.device, self._eps = own, device, torch.finfo(heads.dtype).eps
        self._inputs = joined.to(heads.dtype).split([heads.query, heads.shared, heads.shared], 1)
        self._grad = grad.to(heads.dtype)
        self._starts_S = torch.tensor(starts, dtype=torch.int32, device=device)
        self._longest = max(end - start for start, end in itertools.pairwise(starts))
        place_T = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(starts)])
        self._group_T = ((place_T + 1.5).log2().long() - NEAR).clamp_min(0).to(device)
        self._truth = self._results(_padded, torch.promote_types(heads.dtype, torch.float32))
        self._budget_G = [
            self._sizes(own - truth) + self._eps * self._sizes(truth)
            for own, truth in zip(self._results(own, heads.dtype), self._truth, strict=True)
        ]

    def off(self, attend: Attend) -> float:
        """How far off the output or a gradient is at worst, in what is allowed. More than 1, or NaN: it is wrong."""
        results = self._results(attend, self._grad.dtype)
        errors = [self._sizes(x - truth) for x, truth in zip(results, self._truth, strict=True)]
        return float(torch.stack([e / b for e, b in zip(errors, self._budget_G, strict=True)]).max())

    def run(self, attend: Attend, dtype: torch.dtype | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward: (O, dQ, dK, dV)."""
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in self._inputs]
        (q, k, v), grad, scale = leaves, self._grad.to(leaves[0].dtype), leaves[0].shape[2] ** -0.5

        def work() -> tuple[Tensor, ...]:
            out = attend(q, k, v, self._starts_S, self._longest, scale)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad))

        return work

    def _results(self, attend: Attend, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in self.run(attend, dtype)()]

    def _sizes(self, x_THE: Tensor) -> Tensor:
        """‖x‖ [G] of each group of tokens."""
        squares_T = x_THE.square().flatten(1).sum(1)
        groups = int(self._group_T.max()) + 1
        return squares_T.new_zeros(groups).index_add_(0, self._group_T, squares_T).sqrt_()


def _padded(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts_S: Tensor, longest: int, scale: float, /) -> Tensor:
    return padded_attention(q_THE, k_TKE, v_TKE, starts_S, longest, scale=scale)


def _recorded_ms(work: Callable[[], object]) -> float:
    """The time of a replay of `work`, recorded as a captured step would record it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph, _ = capture(work)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    marks[-1].synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(marks))
