"""Combining adapters into one: the weighted sum, exactly; TIES and DARE on the entries of ΔW.

linear. Σ wᵢ ΔWᵢ is one product of stacked factors,

    Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ w₂s₂B₂ …] [A₁; A₂; …]

with no cross terms (summing the A and the B apart, PEFT's `linear`, adds Σ_{i≠j} Bᵢ Aⱼ, as large as what is wanted;
peft#3013). The ranks add up; unless a rank or an energy is asked for, the sum keeps its numerical rank, which loses
nothing. What only one adapter changes keeps that adapter's factors bit for bit, with the weight in the scale, so one
adapter of weight 1 comes back as it was.

A direction is noise if σ ≤ ε max(M, N) Σⱼ ‖bⱼ‖ ‖aⱼ‖ over the stacked columns bⱼ and rows aⱼ, ε of float64, in which it
is computed: rounding is relative to what was added, not to what is left after it cancelled.

ties (Yadav et al. 2023). Trim each wᵢ ΔWᵢ to the share `density` of its largest entries; elect for each entry the sign
of Σ sign(wᵢ) trimᵢ; take the mean of wᵢ trimᵢ over those that agree with it. As PEFT's `ties_svd` where all weights are
positive. Trimmed by module, as PEFT and mergekit do; the paper trims the whole model's vector at once.

dare (Yu et al. 2023). Drop entries at random, all but the share `density`, divide the rest by `density`, and add. As
PEFT's `dare_linear_svd`, with a seed.

Both need the dense ΔW, formed one module at a time, and what they leave has full rank: it is recompressed to the
nearest update of `rank` (the inputs' largest unless given), and the loss of that, stated, is seldom small. PEFT's
`ties` and `dare_linear` without `_svd` act on the entries of A and B instead, which depend on the basis that training
happened to end in: rejected.

Letters: M outputs, N inputs, R rank, K singular values, D adapters.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltaw.adapter.algebra import adapter_of, low_rank_updates
from deltaw.adapter.cut import Loss, check_size, nearest, relative_error, wanted_rank
from deltaw.adapter.file import Adapter
from deltaw.base.fingerprint import describe
from deltaw.errors import InputError, listed
from deltaw.factors import LowRank
from deltaw.show.progress import Progress, unseen
from deltaw.show.text import counted

METHODS = ("linear", "ties", "dare")
DENSITY = 0.5  # of entries kept; TIES's authors take 0.2, for full fine-tuning
Part = tuple[float, LowRank]  # a weight and one adapter's update of the module at hand


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "linear",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    progress: Progress = unseen,
) -> tuple[Adapter, list[Loss]]:
    """Σ wᵢ ΔWᵢ over the union of the adapters' modules (an absent one counts as zero), or its TIES or DARE kin.

    `rank`: at most that in every module. `energy`: the share of each module's ‖ΔW‖²_F to keep. `density` in (0, 1] is
    for ties and dare, `seed` for dare. Losses are relative to the combination before it was cut; `old_rank` counts the
    stacked factors, or min(M, N). The chat template is recorded as the first adapter's.

    Raises InputError: weights that don't match the adapters or aren't finite, adapters of different bases or shapes,
    full fine-tuning, a combination that is zero everywhere.
    """
    _check(adapters, weights, method, rank, energy, density)
    share, generator = DENSITY if density is None else density, torch.Generator().manual_seed(seed)
    entrywise: dict[str, Callable[[list[float], Tensor], Tensor]] = {
        "ties": lambda w, deltas_DMN: ties(w, deltas_DMN, share),
        "dare": lambda w, deltas_DMN: dare(w, deltas_DMN, share, generator),
    }
    modules = _modules(adapters, weights)
    factors: dict[str, LowRank] = {}
    losses: list[Loss] = []
    for done, (path, parts) in enumerate(modules.items(), 1):
        if method == "linear":
            factors[path], old_rank, error = _sum(parts, rank, energy)
        else:
            factors[path], old_rank, error = _recompressed(parts, entrywise[method], rank, energy)
        losses.append(Loss(path, old_rank, factors[path].rank, error))
        progress(done)
    if not any(update.a_RN.any() and update.b_MR.any() for update in factors.values()):
        raise InputError("the combination is zero in every module: the weights cancel, or nothing was trained")
    like = next((adapter for adapter in adapters if adapter.factors.keys() == factors.keys()), adapters[0])
    base = next((adapter.base for adapter in adapters if adapter.base.fingerprint), adapters[0].base)
    base = replace(base, template=adapters[0].base.template, system=adapters[0].base.system)
    rewritten = frozenset[str]().union(*(adapter.rewritten for adapter in adapters))
    words = frozenset[str]().union(*(adapter.embeddings for adapter in adapters))
    return adapter_of(factors, replace(like, base=base, rewritten=rewritten, embeddings=words)), losses


def ties(weights: Sequence[float], deltas_DMN: Tensor, density: float) -> Tensor:
    """[M, N]: trimmed to `density`, sign elected, mean of the weighted entries that agree."""
    count = max(1, int(density * deltas_DMN[0].numel()))
    flat_DE = deltas_DMN.flatten(1)
    largest_DK = flat_DE.abs().topk(count, dim=1).indices
    trimmed_DMN = torch.zeros_like(flat_DE).scatter(1, largest_DK, flat_DE.gather(1, largest_DK)).view_as(deltas_DMN)
    weights_D11 = deltas_DMN.new_tensor(weights)[:, None, None]
    signed_DMN = weights_D11.sign() * trimmed_DMN
    elected_MN = torch.where(signed_DMN.sum(0) >= 0, 1.0, -1.0)
    agrees_DMN = signed_DMN.sign() == elected_MN
    return (weights_D11 * trimmed_DMN * agrees_DMN).sum(0) / agrees_DMN.sum(0).clamp(min=1)


def dare(weights: Sequence[float], deltas_DMN: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """[M, N]: each entry kept with probability `density` and divided by it, then the weighted sum."""
    keep_DMN = torch.rand(deltas_DMN.shape, generator=generator) < density
    return (deltas_DMN.new_tensor(weights)[:, None, None] * deltas_DMN * keep_DMN / density).sum(0)


def _sum(parts: Sequence[Part], rank: int | None, energy: float | None) -> tuple[LowRank, int, float]:
    """(the sum, cut; its rank when stacked; the relative error)."""
    dtype = parts[0][1].a_RN.dtype
    wide = [update.double().times(weight) for weight, update in parts]
    total = functools.reduce(LowRank.stacked, wide)
    lossless = rank is None and energy is None
    if len(parts) == 1 and lossless:
        return total.map(lambda factor: factor.to(dtype)), total.rank, 0.0
    s_K = total.wide_svd[1]
    added = sum(float((part.b_MR.norm(dim=0) * part.a_RN.norm(dim=1)).sum()) * abs(part.scale) for part in wide)
    numerical = int((s_K > torch.finfo(s_K.dtype).eps * max(total.shape) * added).sum())
    if not numerical:
        zeros = LowRank(torch.zeros_like(total.a_RN[:1]), torch.zeros_like(total.b_MR[:, :1]))
        return zeros.map(lambda factor: factor.to(dtype)), total.rank, 0.0
    wanted = numerical if lossless else min(numerical, wanted_rank(s_K, rank, energy))
    smaller = total.truncate(wanted).map(lambda factor: factor.to(dtype))
    return smaller, total.rank, relative_error(s_K, wanted)


def _recompressed(
    parts: Sequence[Part],
    combined: Callable[[list[float], Tensor], Tensor],
    rank: int | None,
    energy: float | None,
) -> tuple[LowRank, int, float]:
    deltas_DMN = torch.stack([update.dense() for _, update in parts])
    delta_MN = combined([weight for weight, _ in parts], deltas_DMN)
    if rank is None and energy is None:
        rank = max(update.rank for _, update in parts)
    most = min(delta_MN.shape)
    update, error = nearest(delta_MN, rank=None if rank is None else min(rank, most), energy=energy)
    return update, most, error


def _modules(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Part]]:
    """The union of the modules, in order, each with what adds to it."""
    modules: dict[str, list[Part]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, update in low_rank_updates(adapter, "combined").items() if weight else ():
            modules.setdefault(path, []).append((weight, update))
    return modules


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
) -> None:
    """Raise InputError for whatever can be seen before anything is computed."""
    if not adapters:
        raise InputError("no adapters to combine")
    if len(weights) != len(adapters):
        raise InputError(
            f"{counted(len(adapters), 'adapter')} but {counted(len(weights), 'weight')}",
            fix="give one weight per adapter",
        )
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise InputError(f"a weight must be a finite number, not {wrong[0]}")
    if method not in METHODS:
        raise InputError(f"no method {method!r:.40}", fix=f"known: {', '.join(METHODS)}")
    if density is not None and (method == "linear" or not 0 < density <= 1):
        raise InputError(f"density {density}: a share above 0 and at most 1, for ties and dare only")
    if rank is not None or energy is not None:
        check_size(rank, energy)
    for other in range(1, len(adapters)):
        for one in range(other):
            _check_pair(one, adapters[one], other, adapters[other])


def _check_pair(one: int, a: Adapter, other: int, b: Adapter) -> None:
    """Raise InputError unless both belong to one base and fit each other where both have a module."""
    pair = f"adapters {one + 1} and {other + 1}"
    if a.base.mismatch(b.base):
        named = [f"{x.base.name or 'unnamed'} ({describe(x.base.fingerprint)})" for x in (a, b)]
        raise InputError(f"{pair} belong to different bases: {' and '.join(named)}")
    updates = low_rank_updates(a, "combined"), low_rank_updates(b, "combined")
    problems = [
        f"{path}: {update.shape} and {updates[1][path].shape}"
        for path, update in updates[0].items()
        if path in updates[1] and update.shape != updates[1][path].shape
    ]
    if problems:
        raise InputError(f"{pair} differ in the shape of {len(problems)} modules:\n{listed(problems)}")
