"""Two adapters on one base, module by module: do they read and write the same directions, and do the same in them?

    φ(i, j)       share of the smaller one of the first i directions of ΔW₁ and the first j of ΔW₂ that lies in the
                  other (LoRA §7.2, eq. 4; linalg/subspace.py): of the right singular vectors (what an update reads)
                  and of the left ones (what it writes). `…_excess` is φ less max(i, j) / D, which random directions of
                  D dimensions have on average: D = N on the right, M on the left.
    cosines       of the principal angles between all the directions compared
    cosine        ⟨ΔW₁, ΔW₂⟩_F / (‖ΔW₁‖_F ‖ΔW₂‖_F)
    distance      ‖ΔW₁ − ΔW₂‖_F / ‖ΔW₁‖_F

Two adapters may do opposite things in one subspace, which φ doesn't see but the cosine does. All of it comes from
the factors, whatever the ranks:

    ⟨s₁B₁A₁, ΔW₂⟩_F = s₁ tr(A₁ᵀB₁ᵀΔW₂) = s₁ Σ B₁ ∘ (ΔW₂A₁ᵀ)      both [M, R₁], ΔW₂A₁ᵀ = s₂ B₂(A₂A₁ᵀ)

in float64. The distance is the norm of the difference as a value (stacked factors), since ‖ΔW₁‖² + ‖ΔW₂‖² − 2⟨ΔW₁, ΔW₂⟩
loses half of the digits if the two are nearly equal. Only directions that can be told from zero are compared, at most
64; a zero update has none, so its φ are empty and its cosine is None.

Letters: M outputs, N inputs, R rank, I and J directions of the first and the second.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.analysis.measure import in_order
from deltaw.base.fingerprint import describe
from deltaw.config.adapter import parameter_of
from deltaw.errors import InputError, listed
from deltaw.linalg.rank import tolerance
from deltaw.linalg.subspace import principal_angles, random_similarity, similarity
from deltaw.linalg.threads import one_thread
from deltaw.show.progress import Progress, unseen
from deltaw.updates import Plain

DIRECTIONS = 64  # compared, at most
PAIRS = (1, 4)  # φ(i, i) picked out of the grid, besides the last
DECIMALS = 5  # of φ in JSON, where the grids are nearly all of it


@dataclass(frozen=True, eq=False)
class Side:
    """One side's directions: φ and φ less the random baseline, float64 [I, J], and the principal angles' cosines."""

    phi_IJ: Tensor
    excess_IJ: Tensor
    cosines: list[float]  # descending

    @property
    def pairs(self) -> dict[str, dict[str, float]]:
        """{"1": {"phi": φ(1, 1), "excess": …}, "4": …, "last": …}, where there are as many; "last" is R = min(I, J)."""
        last = min(self.phi_IJ.shape)
        at = {str(i): i for i in PAIRS if i <= last} | ({"last": last} if last else {})
        grids = {"phi": self.phi_IJ, "excess": self.excess_IJ}
        return {name: {of: float(x_IJ[i - 1, i - 1]) for of, x_IJ in grids.items()} for name, i in at.items()}

    def to_json(self) -> dict[str, Any]:
        grids = {"phi": _rounded(self.phi_IJ), "excess": _rounded(self.excess_IJ)}
        return {**grids, "pairs": self.pairs, "cosines": self.cosines}


@dataclass(frozen=True, eq=False)
class ModuleComparison:
    """One module in both adapters. `cosine` and `distance` are None if an update that they divide by is zero."""

    shape: tuple[int, int]
    ranks: tuple[int, int]
    frobenius: tuple[float, float]
    inner: float
    cosine: float | None
    difference: float  # ‖ΔW₁ − ΔW₂‖_F
    distance: float | None
    right: Side
    left: Side

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "right": self.right.to_json(), "left": self.left.to_json()}


@dataclass(frozen=True, eq=False)
class Comparison:
    """`modules` by path, layer by layer; `only`: the modules of the first and of the second adapter alone."""

    modules: Mapping[str, ModuleComparison]
    only: tuple[list[str], list[str]]

    @property
    def cosine(self) -> float | None:
        """The cosine of the two adapters as wholes, over the modules that they share."""
        return _cosine(sum(m.inner for m in self.modules.values()), *self.frobenius)

    @property
    def frobenius(self) -> tuple[float, float]:
        first, second = (sum(m.frobenius[i] ** 2 for m in self.modules.values()) ** 0.5 for i in (0, 1))
        return first, second

    @property
    def distance(self) -> float | None:
        """‖ΔW₁ − ΔW₂‖_F / ‖ΔW₁‖_F over the modules that they share."""
        apart = sum(m.difference**2 for m in self.modules.values()) ** 0.5
        return apart / self.frobenius[0] if self.frobenius[0] else None

    @property
    def medians(self) -> dict[str, float | None]:
        """Medians over the modules of cosine, distance and each side's pairs; None if no module has the number."""
        values_of: dict[str, list[float | None]] = {"cosine": [], "distance": []}
        for module in self.modules.values():
            values_of["cosine"].append(module.cosine)
            values_of["distance"].append(module.distance)
            for name, side in (("right", module.right), ("left", module.left)):
                for pair, numbers in side.pairs.items():
                    for of, value in numbers.items():
                        values_of.setdefault(f"{name}_{of}_{pair}", []).append(value)
        known = {name: [value for value in values if value is not None] for name, values in values_of.items()}
        return {name: median(values) if values else None for name, values in known.items()}

    @property
    def kinds(self) -> dict[str, dict[str, Side]]:
        """{"q_proj": {"right": …, "left": …}, …}: means over the modules of each kind, the last part of their paths.

        Cut to the directions that all of a kind's modules have; modules whose update is zero don't count.
        """
        groups: dict[str, list[ModuleComparison]] = {}
        for path, module in self.modules.items():
            if module.right.phi_IJ.numel():
                groups.setdefault(parameter_of(path).rpartition(".")[2], []).append(module)
        return {
            kind: {"right": _mean([m.right for m in group]), "left": _mean([m.left for m in group])}
            for kind, group in groups.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything; φ rounded to five decimals."""
        return {
            "cosine": self.cosine,
            "distance": self.distance,
            "frobenius": self.frobenius,
            "medians": self.medians,
            "only": {"first": self.only[0], "second": self.only[1]},
            "kinds": {
                kind: {name: side.to_json() for name, side in sides.items()} for kind, sides in self.kinds.items()
            },
            "modules": {path: module.to_json() for path, module in self.modules.items()},
        }


def compare(first: Adapter, second: Adapter, *, progress: Progress = unseen) -> Comparison:
    """All modules that both adapt. `progress` gets the number of modules done.

    Raises InputError: bases of different fingerprints, no module in common, updates of different shapes.
    """
    if first.base.mismatch(second.base):
        names = [f"{base.name or 'unnamed'} ({describe(base.fingerprint)})" for base in (first.base, second.base)]
        raise InputError(
            f"the two adapters have different bases: {names[0]} and {names[1]}",
            fix="compare adapters of one base: only updates of the same weights can be compared",
        )
    common = in_order(first.factors.keys() & second.factors.keys())
    only = tuple(in_order(x.factors.keys() - y.factors.keys()) for x, y in ((first, second), (second, first)))
    if not common:
        raise InputError(f"no module in common: one adapts {_some(only[0])}, the other {_some(only[1])}")
    shapes = {path: (first.factors[path].shape, second.factors[path].shape) for path in common}
    differ = [f"{path}: {one} and {two}" for path, (one, two) in shapes.items() if one != two]
    if differ:
        raise InputError(
            f"{len(differ)} of {len(common)} modules have different shapes:\n{listed(differ, 2)}",
            fix="the adapters belong to different bases",
        )
    modules = {}
    with one_thread():
        for path in common:
            modules[path] = compare_updates(_plain(path, first), _plain(path, second))
            progress(len(modules))
    return Comparison(modules, (only[0], only[1]))


def compare_updates(first: Plain, second: Plain) -> ModuleComparison:
    """One module's two updates, of any ranks. Raises ValueError when the shapes differ."""
    product, difference = first.inner(second), (first.double() - second.double()).norm()
    norms = first.inner(first) ** 0.5, second.inner(second) ** 0.5
    (u_MI, v_NI), (u_MJ, v_NJ) = _directions(first), _directions(second)
    return ModuleComparison(
        shape=first.shape,
        ranks=(first.rank, second.rank),
        frobenius=norms,
        inner=product,
        cosine=_cosine(product, *norms),
        difference=difference,
        distance=difference / norms[0] if norms[0] else None,
        right=_side(v_NI, v_NJ),
        left=_side(u_MI, u_MJ),
    )


def _directions(update: Plain) -> tuple[Tensor, Tensor]:
    """U [M, I] and V [N, I] in float64, I the numerical rank and at most 64."""
    u_MK, sigma_K, vt_KN = update.svd()
    count = min(DIRECTIONS, int((sigma_K > tolerance(sigma_K, *update.shape)).sum()))
    return u_MK[:, :count].double(), vt_KN[:count].T.double()


def _side(x_DI: Tensor, y_DJ: Tensor) -> Side:
    phi_IJ = similarity(x_DI, y_DJ).clamp(max=1)  # bases of float32 are orthonormal to float32
    if not phi_IJ.numel():
        return Side(phi_IJ, phi_IJ, [])
    i, j = phi_IJ.shape
    excess_IJ = phi_IJ - random_similarity(i, j, len(x_DI)).to(phi_IJ)
    return Side(phi_IJ, excess_IJ, principal_angles(x_DI, y_DJ).cos().tolist())


def _mean(sides: list[Side]) -> Side:
    i, j, k = (min(sizes) for sizes in zip(*((*s.phi_IJ.shape, len(s.cosines)) for s in sides), strict=True))
    phi_IJ, excess_IJ = (
        torch.stack([grid[:i, :j] for grid in grids]).mean(0)
        for grids in ([s.phi_IJ for s in sides], [s.excess_IJ for s in sides])
    )
    return Side(phi_IJ, excess_IJ, torch.tensor([s.cosines[:k] for s in sides], dtype=torch.float64).mean(0).tolist())


def _plain(path: str, adapter: Adapter) -> Plain:
    try:
        return adapter.factors[path].plain()
    except InputError as error:
        raise InputError(
            f"{path}: {error.what}, so it can't be compared without the base",
            fix="make a LoRA of it: deltaw merge, then deltaw extract with --base",
        ) from None


def _cosine(product: float, one: float, other: float) -> float | None:
    return max(-1.0, min(1.0, product / (one * other))) if one and other else None


def _rounded(grid: Tensor) -> list[list[float]]:
    return grid.round(decimals=DECIMALS).tolist()


def _some(paths: list[str]) -> str:
    return f"{paths[0]:.80}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}"
