"""Adapters as values: cut, padded, scaled; and the spec that describes the resulting factors.

Everything works on the two thin factors. The SVD of each ΔW comes from them in float64, once per update however many
sizes are tried (`LowRank.wide_svd`), and the best update of a rank keeps its first terms, at an error that is stated
for every module (cut.py). A module that keeps its rank keeps its factors bit for bit.

How small is small enough? `resize` asks each module alone: for a rank, or for a share of its own ‖ΔW‖²_F.
`resize_global` asks once: the largest σ² of *all* modules are kept until they hold the share of the whole model's
Σ ‖ΔW‖²_F. That is the least rank in total for that error, since one module's σ counts as much as another's; it leaves
many directions to the modules that learnt much. A module keeps one direction at least: PEFT can't store rank 0.

The spec. PEFT derives a module's scale from alpha and rank (α/r, or α/√r for rsLoRA) and keeps ranks that differ in
`rank_pattern`, alphas in `alpha_pattern`. `adapter_of` inverts that: the commonest rank and alpha are the defaults, the
others are overrides by full path, and each alpha is chosen such that the division gives the scale again. Not every
float is a quotient by r; where none is, the scale moves by one unit in the last place of float64, 2⁻⁵³ of it. Signs and
zeros go into B, exactly, because an alpha is positive.

All experts of a parameter share one rank and one scale in the file, so what was cut to several is filled up with zeros
to the largest of them (`_even`), exact as long as their scales are one.

vLLM silently drops both patterns. `uniform` pads with rows of zeros instead: the same update, one rank, one
alpha. Cut factors keep their module's scale, which costs nothing here and makes that exact in the usual case of one
scale for all modules.

Rejected: scale 1 and √S in both factors after a cut (mixes scales, so that `uniform` would have to round B), and a
ratio of ranks ("half") as the budget: it says nothing of what is lost.

Letters: M outputs, N inputs, R rank, K singular values of a module or of all.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from deltaw.adapter.cut import Loss, check_size, relative_error, wanted_rank
from deltaw.adapter.file import Adapter, describes
from deltaw.config import AdapterSpec
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.linalg.rank import energy_rank

Value = TypeVar("Value", bound=Hashable)


def resize(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None, uniform: bool = False
) -> tuple[Adapter, list[Loss]]:
    """Every module at `rank`, or at the least rank that keeps the share `energy` of its own ‖ΔW‖²_F.

    A module of lower rank stays as it is. `uniform`: padded to one rank afterwards. Raises InputError unless exactly
    one of both is given and possible: 1 ≤ rank ≤ the adapter's own largest, 0 < energy ≤ 1.
    """
    updates = low_rank_updates(adapter, "resized", beside=True)
    check_size(rank, energy)
    largest = max(update.rank for update in updates.values())
    if rank is not None and rank > largest:
        raise InputError(f"rank {rank} is above the adapter's own {largest}, and nothing would be gained")
    ranks = {path: wanted_rank(update.wide_svd[1], rank, energy) for path, update in updates.items()}
    smaller, losses = _cut_all(adapter, updates, ranks)
    return (pad_all(smaller) if uniform else smaller), losses


def resize_global(adapter: Adapter, energy: float) -> tuple[Adapter, list[Loss]]:
    """The least total rank that keeps the share `energy` of Σ ‖ΔW‖²_F over all modules, each at rank 1 or more.

    Raises InputError unless 0 < energy ≤ 1.
    """
    updates = low_rank_updates(adapter, "resized", beside=True)
    check_size(None, energy)
    spectra = [update.wide_svd[1] for update in updates.values()]
    sigma_K, order_K = torch.cat(spectra).sort(descending=True, stable=True)
    module_K = torch.repeat_interleave(torch.tensor([len(s_K) for s_K in spectra]))
    counts = module_K[order_K[: int(energy_rank(sigma_K, energy))]].bincount(minlength=len(updates))
    ranks = {path: max(1, count) for path, count in zip(updates, counts.tolist(), strict=True)}
    return _cut_all(adapter, updates, ranks)


def energy_shares(adapter: Adapter) -> Tensor:
    """[K], float64: the share of Σ ‖ΔW‖²_F that the largest 1, 2, …, K singular values of all modules hold."""
    updates = low_rank_updates(adapter, "resized", beside=True)
    sigma_K = torch.cat([update.wide_svd[1] for update in updates.values()]).sort(descending=True).values
    energy_K = (sigma_K / (float(sigma_K[0]) or 1)).square().cumsum(0)
    return energy_K / (float(energy_K[-1]) or 1)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """factor · ΔW in every module: alpha times |factor|, and B turned round for a negative one, zero for 0.

    Exact but for the scale's rounding to float64. Raises InputError for NaN, infinity, or an alpha that leaves float64.
    """
    updates = low_rank_updates(adapter, "scaled")
    if not math.isfinite(factor):
        raise InputError(
            f"an adapter can't be scaled by {factor}", fix=("give a finite number; 1 leaves it as it was trained")
        )
    return adapter_of({path: update.times(factor) for path, update in updates.items()}, adapter)


def pad_all(adapter: Adapter) -> Adapter:
    """The same update with one rank (the largest there is) and one alpha for all modules, by rows of zeros.

    Exact where all modules have one scale; where they differ, the ratio goes into B, which rounds it. Raises
    InputError where a module that is to be padded is too narrow for the largest rank.
    """
    updates = low_rank_updates(adapter, "padded", beside=True)
    rank = max(update.rank for update in updates.values())
    narrow = next((path for path, update in updates.items() if min(update.shape) < rank > update.rank), None)
    if narrow:
        limit = min(updates[narrow].shape)
        raise InputError(
            f"{narrow} has no room for rank {rank}; the most is {limit}", fix=f"resize to rank {limit} first"
        )
    scale = _commonest({path: update.scale for path, update in updates.items()})
    padded = {path: pad(_rescaled(update, scale), rank) for path, update in updates.items()}
    plain = adapter.spec.model_copy(update={"rank_overrides": {}, "alpha_overrides": {}})
    return adapter_of(padded, replace(adapter, spec=plain))


def pad(update: LowRank, rank: int) -> LowRank:
    """The same update in factors of a rank no lower, the rest of them zeros."""
    more = rank - update.rank
    a_RN = torch.nn.functional.pad(update.a_RN, (0, 0, 0, more))
    return LowRank(a_RN, torch.nn.functional.pad(update.b_MR, (0, more)), update.scale)


def baked(updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same updates for a reader of one rank and no scales: all of the largest rank by rows of zeros, scale 1.

    Exact but for one rounding of s B, none where s is a power of 2.
    """
    rank = max(update.rank for update in updates.values())
    return {path: pad(_rescaled(update, 1.0), rank) for path, update in updates.items()}


def mixed(adapter: Adapter) -> str | None:
    """A warning if a reader of nothing but r and lora_alpha would get a module's rank or scale wrong, else None."""
    spec = adapter.spec
    plain = spec.model_copy(update={"rank_overrides": {}, "alpha_overrides": {}})
    if all(describes(plain, path, update) for path, update in adapter.factors.items()):
        return None
    ranks = sorted({update.rank for update in adapter.factors.values()})
    differing = f"ranks from {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "different alphas"
    return f"the modules have {differing}; vLLM ignores that and would answer wrongly: make them uniform for it"


def adapter_of(factors: Mapping[str, LowRank], like: Adapter) -> Adapter:
    """An adapter of `factors` whose spec describes them exactly; base and layout are those of `like`, dropout is 0.
    What `like` has beside modules like these (trained tokens, whole modules) stays.

    The spec of `like` stays if it still fits, its targets if the modules are the same, else they are the paths. Raises
    InputError where a scale needs an alpha beyond float64.
    """
    spec, factors = like.spec, _even(factors)
    same = factors.keys() == like.body.keys()
    beside = like.replaced if same else {}
    if same and all(describes(spec, path, u) for path, u in factors.items()):
        return replace(like, spec=spec.model_copy(update={"dropout": 0.0}), factors={**factors, **beside})
    known = {} if spec.full else {(spec.scale(p), spec.rank_of(p)): spec.alpha_of(p) for p in like.factors}
    divisors = {path: math.sqrt(u.rank) if spec.scaling == "rslora" else u.rank for path, u in factors.items()}
    signed = {path: _positive(update) for path, update in factors.items()}
    alphas = {p: known.get((u.scale, u.rank)) or _alpha(u.scale, divisors[p]) for p, u in signed.items()}
    ranks = {path: update.rank for path, update in signed.items()}
    # A parameter counts once, however many experts it is of.
    by_parameter = {parameter_of(path): path for path in factors}
    ranks = {name: ranks[path] for name, path in by_parameter.items()}
    settings = {name: alphas[path] for name, path in by_parameter.items()}
    rank, alpha = _commonest(ranks), _commonest(settings)
    described = AdapterSpec.checked(
        rank=rank,
        alpha=alpha,
        targets=spec.targets if same else tuple(by_parameter),
        **({"also": spec.also, "tokens": spec.tokens} if same else {}),
        scaling=spec.scaling,
        rank_overrides=_overrides(ranks, rank),
        alpha_overrides=_overrides(settings, alpha),
    )
    exact = {path: replace(update, scale=alphas[path] / divisors[path]) for path, update in signed.items()}
    return replace(like, spec=described, factors={**exact, **beside})


def low_rank_updates(adapter: Adapter, verb: str, *, beside: bool = False) -> dict[str, LowRank]:
    """The adapter's factors; `beside`: trained tokens and whole modules may stay beside them. Raises InputError for
    full fine-tuning, DoRA, an adapter of nothing, and for those unless they may."""
    if not adapter.factors:
        raise InputError(f"the adapter has no modules, so it can't be {verb}")
    try:
        updates = adapter.body if beside and adapter.body else adapter.factors
        return {path: update.low_rank() for path, update in updates.items()}
    except InputError as error:
        raise InputError(f"{error.what}, so it can't be {verb}", error.fix) from None


def _cut_all(adapter: Adapter, updates: Mapping[str, LowRank], ranks: Mapping[str, int]) -> tuple[Adapter, list[Loss]]:
    factors = {path: update.truncate(ranks[path]) for path, update in updates.items()}
    losses = [
        Loss(path, updates[path].rank, new.rank, relative_error(updates[path].wide_svd[1], new.rank))
        for path, new in factors.items()
    ]
    return adapter_of(factors, adapter), losses


def _even(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same updates, those of all experts of a parameter in one rank and with one positive scale."""
    groups: dict[str, list[str]] = {}
    for path in factors:
        if expert_of(path) is not None:
            groups.setdefault(parameter_of(path), []).append(path)
    new = dict(factors)
    for paths in groups.values():
        some = {path: _positive(factors[path]) for path in paths}
        rank, scale = max(update.rank for update in some.values()), _commonest({p: u.scale for p, u in some.items()})
        if any((factors[path].rank, factors[path].scale) != (rank, scale) for path in paths):
            new |= {path: pad(_rescaled(update, scale), rank) for path, update in some.items()}
    return new


def _positive(update: LowRank) -> LowRank:
    """The same update with a positive scale."""
    if update.scale > 0:
        return update
    if update.scale == 0:
        return LowRank(update.a_RN, torch.zeros_like(update.b_MR))
    return LowRank(update.a_RN, -update.b_MR, -update.scale)


def _rescaled(update: LowRank, scale: float) -> LowRank:
    if update.scale == scale:
        return update
    return LowRank(update.a_RN, update.b_MR * (update.scale / scale), scale)


def _alpha(scale: float, divisor: float) -> float:
    """The alpha whose division by `divisor` gives `scale`, or the nearest to it."""
    alpha = scale * divisor
    near = (alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
    return next((candidate for candidate in near if candidate / divisor == scale), alpha)


def _commonest(values: Mapping[str, Value]) -> Value:
    return Counter(values.values()).most_common(1)[0][0]


def _overrides(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """The values that differ from the default, by full path. A path also names every longer one that ends in it
    (and the first match wins), so longer paths come first, and theirs are written even where they are the default."""
    differ = {path for path, value in values.items() if value != default}
    named = [path for path in values if path in differ or any(tail in differ for tail in _tails(path))]
    return {path: values[path] for path in sorted(named, key=len, reverse=True)}


def _tails(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
