"""An adapter in a few numbers: each module's by name, and their totals over the whole model.

Norms add up as √Σ‖·‖²_F, shares by their entries, so the totals are those of one large block-diagonal matrix.
"""

from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

from deltaw.analysis.measure import Amplification, Measures, ratio

OWN = ("frobenius", "two", "effective_rank", "stable_rank", "energy_rank", "used")
CHANGES = ("magnitude_change", "direction_change", "merge_changed", "merge_kept", "merge_error")
BESIDE_BASE = ("relative", "reads", "writes", "intruders", *CHANGES)


def quantities(measures: Measures) -> dict[str, float]:
    """A module's single numbers by name: what a table or `summarise` shows of it. Without W, ΔW's alone."""
    numbers = {name: getattr(measures, name) for name in OWN}
    if base := measures.base:
        numbers |= {name: getattr(base, name) for name in BESIDE_BASE}
        for name in ("amplification", "amplification_top"):
            one: Amplification = getattr(base, name)
            known = {name: one.factor, f"{name}_chance": one.chance, f"{name}_percentile": one.percentile}
            numbers |= {key: value for key, value in known.items() if value is not None}
    return numbers


def noise_of(kept: float, error: float) -> float:
    """Of a merge: the part of its relative error that stands at a right angle to ΔW."""
    return max(0.0, error**2 - (1 - kept) ** 2) ** 0.5


def summarise(measures: Mapping[str, Measures]) -> dict[str, Any]:
    """Over the model: totals, then `median`, `largest` and `smallest` {module, value} of each of its `quantities`.

    `zero` lists the modules whose update is zero. What needs W is absent without it. ValueError for no modules.
    """
    if not measures:
        raise ValueError("no modules")
    every = list(measures.values())
    summary: dict[str, Any] = {
        "modules": len(every),
        "parameters": sum(m.parameters for m in every),
        "frobenius": _root_sum(m.frobenius for m in every),
        "zero": [path for path, m in measures.items() if m.numerical_rank == 0],
    }
    if bases := [m.base for m in every if m.base]:
        entries = [m.shape[0] * m.shape[1] for m in every if m.base]
        updates = [m.frobenius for m in every if m.base]
        changed = sum(base.merge_changed * count for base, count in zip(bases, entries, strict=True))
        lost = _root_sum(base.merge_error * size for base, size in zip(bases, updates, strict=True))
        kept = sum(base.merge_kept * size**2 for base, size in zip(bases, updates, strict=True))
        shares = [base.amplification_top.percentile for base, size in zip(bases, updates, strict=True) if size]
        known = [share for share in shares if share is not None]
        summary |= {
            "relative": ratio(_root_sum(updates), _root_sum(base.frobenius for base in bases)),
            "intruders": sum(base.intruders for base in bases),
            "outside": sum(base.outside for base in bases),
            "intruders_of": sum(base.intruders_of for base in bases),
            "intruders_exact": all(base.intruders_exact for base in bases),
            "merge_changed": changed / sum(entries),
            "merge_kept": ratio(kept, _root_sum(updates) ** 2),
            "merge_error": ratio(lost, _root_sum(updates)),
            "percentile": fmean(known) if known else None,
        }
    summary |= {"median": {}, "largest": {}, "smallest": {}}
    numbers = {path: quantities(m) for path, m in measures.items()}
    for name in {name: None for of_module in numbers.values() for name in of_module}:
        values = {path: of_module[name] for path, of_module in numbers.items() if name in of_module}
        summary["median"][name] = median(values.values())
        for which, pick in (("largest", max), ("smallest", min)):
            path = pick(values, key=lambda path: values[path])
            summary[which][name] = {"module": path, "value": values[path]}
    return summary


def _root_sum(values: Iterable[float]) -> float:
    return sum(value**2 for value in values) ** 0.5
