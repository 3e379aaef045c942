"""Successive halving: after a part of their steps, the settings whose held-out loss is worse stop (Jamieson & Talwalkar
2016).

    8 settings    after 1/8 of the steps 4 go on, after 1/4 2, after 1/2 1

So a sweep over n settings costs about (log₂ n + 2) / 2 runs instead of n. What is compared are settings and not runs:
the runs of a setting that differ in their seed stop or go on together, by the mean of their losses, or the luckiest
seeds would be what is chosen. A rung below `LEAST` steps would compare warm-ups, so it is left out, and the next one
stops as many as both would have. A run that isn't at a rung yet is waited for (steps of other sizes make other counts).

A rate is judged before it has decayed, so a high one looks worse than it would be: halving saves time and can be
wrong, and the page says which settings were stopped where.

The losses of a rung are no evaluations of the run: its patience and its best step stay what they would be without.
"""

import math
from collections.abc import Mapping, Sequence

from deltaw.sweep.grid import Variant

LEAST = 10  # steps


def shares(settings: int, total: int) -> list[float]:
    """After which shares of the steps is looked, the last of them 1. `total`: steps of the shortest run."""
    count = math.ceil(math.log2(settings)) if settings > 1 else 0
    parts = [2.0 ** -(count - rung) for rung in range(count)]
    return [*(part for part in parts if part * total >= LEAST), 1.0]


def kept(share: float, settings: int) -> int:
    """How many settings go on beyond this share of the steps."""
    return max(1, math.ceil(settings * 2.0 ** -(rungs_until(share, settings))))


def rungs_until(share: float, settings: int) -> int:
    """How many halvings there have been after that rung, those left out counted."""
    count = math.ceil(math.log2(settings)) if settings > 1 else 0
    return count + round(math.log2(share)) + 1


def by_setting(variants: Sequence[Variant], losses: Mapping[str, float | None]) -> list[tuple[str, float]]:
    """(setting, mean loss), the best first; one with a loss that isn't finite comes last."""
    sums: dict[str, list[float]] = {}
    for variant in variants:
        loss = losses.get(variant.name)
        sums.setdefault(variant.setting, []).append(math.inf if loss is None else loss)
    return sorted(((name, sum(values) / len(values)) for name, values in sums.items()), key=lambda pair: pair[1])


def stopped(variants: Sequence[Variant], losses: Mapping[str, float | None], keep: int) -> list[Variant]:
    """The runs of all but the best `keep` settings."""
    going_on = {name for name, _ in by_setting(variants, losses)[:keep]}
    return [variant for variant in variants if variant.setting not in going_on]
