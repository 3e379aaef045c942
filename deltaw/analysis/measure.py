"""What a fine-tune did to the weights, module by module: from the update ΔW and, where it is given, the base weight W.

From ΔW alone, by its singular values σ₁ ≥ σ₂ ≥ …, which come from the factors (linalg/svd.py); those that can't be
told from zero (linalg/rank.py) count as 0, so the same ΔW measures the same as factors and as a matrix:

    numerical, effective, stable rank, energy rank at 90 %     linalg/rank.py
    used                effective rank / R, R the rank available

With W, whose singular vectors are u_i, v_i, and W' = W + ΔW:

    relative            ‖ΔW‖_F / ‖W‖_F
    amplification       ‖UᵀΔW V‖_F / ‖UᵀW V‖_F with the first k directions U, V of ΔW      (LoRA §7.3, table 7)
                        for k = numerical rank, where the numerator is ‖ΔW‖_F as in the paper, and for the k that
                        carry 90 % of the energy. Beside ‖UᵀW V‖_F stand its value for W's own first k directions,
                        √(σ₁² + … + σ_k²) of W, and its root mean square for random ones, k ‖W‖_F / √(M N).
    reads, writes       ‖ΔW V_p‖²_F / ‖ΔW‖²_F and ‖U_pᵀ ΔW‖²_F / ‖ΔW‖²_F with W's first p directions, p a tenth of
                        them and at most 64; random directions have p / N and p / M
    intruders           of the first 10 left vectors u'_j of W', those with max_i |u'_jᵀ u_i| < 0.5
                        (Shuttleworth et al. 2024, algorithm 1)
    magnitude_change    mean over rows (outputs) of | ‖w'_i‖ − ‖w_i‖ | / ‖w_i‖             (DoRA §3.2, but relative)
    direction_change    mean over rows of 1 − cos(w'_i, w_i)
    merge_changed       share of the entries with round(W + ΔW) ≠ round(W), rounded to bfloat16
    merge_error         ‖round(W + ΔW) − round(W) − ΔW‖_F / ‖ΔW‖_F

Intruders need every u_i. Up to 2048 directions they are the eigenvectors of the smaller Gram matrix, W Wᵀ or WᵀW: four
times as fast as the SVD. Squaring loses the directions below √ε σ₁, which float32 (ε = 1e-7) feels: they are no match,
and where a u'_j finds none, all is done again in float64. Against full SVDs in float64, on 24 modules of SmolLM2-135M,
the cosines are within 7e-5 and the other numbers made of directions within 3e-6. Beyond 2048 W's first 256 directions
stand for all (randomised SVD), `intruders_exact` is False, and the count is an upper bound but for the sketch's error.
A W' of fewer than 10 directions has as many looked at. Rows of zeros have no direction and no relative change; they are
left out of those two means.

W + ΔW is formed once, for one module at a time: its singular vectors and its rounding are of the sum.

Several modules are measured at once, each on one core. Threads inside an eigendecomposition of this size gain little
(a third, of two cores that are idle) and lose all where cores are shared; and so the numbers don't depend on the count.

Rejected: ‖ΔW‖_F as the numerator for the first k directions as well (it would count what lies in the others); the
vectors of W' by iteration from W's and ΔW's (four times faster again, but after three steps one of SmolLM2-135M's had a
cosine of 1 − 5e-4 with the true one).

Letters: M outputs, N inputs, R rank available, K = min(M, N) or fewer directions, P of W's directions.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.errors import InputError
from deltaw.factors import DoRA, Plain, Update, as_plain
from deltaw.linalg.rank import effective_rank, energy_rank, stable_rank, tolerance
from deltaw.linalg.svd import randomised_svd
from deltaw.linalg.threads import one_thread

SPECTRUM = 256  # singular values kept
ENERGY = 0.9
TOP = 64  # at most, of W's directions, a tenth of which are its top
INTRUDER_K, INTRUDER_EPSILON = 10, 0.5  # Shuttleworth et al.'s
EXACT, SKETCH = 2048, 256  # all directions up to the one, else the first of them
WORKERS = 4  # modules at once, each with some copies of its W in memory


@dataclass(frozen=True)
class Amplification:
    """A column of LoRA's table 7, for the first `directions` of ΔW. `factor` is None where W has nothing there."""

    directions: int
    update: float  # ‖UᵀΔW V‖_F
    on_update: float  # ‖UᵀW V‖_F, U and V of ΔW
    on_base: float  # … of W
    on_random: float  # … random
    factor: float | None  # update / on_update


@dataclass(frozen=True)
class BaseMeasures:
    """ΔW beside the W that it updates; the module's docstring defines each number."""

    frobenius: float  # ‖W‖_F
    relative: float
    amplification: Amplification
    amplification_top: Amplification  # of the directions that carry 90 % of the energy
    top_directions: int  # P
    reads: float
    reads_random: float
    writes: float
    writes_random: float
    intruders: int
    intruders_of: int  # how many left vectors of W' were looked at
    intruders_exact: bool
    cosines: list[float]  # each one's largest |cosine| with a left vector of W
    magnitude_change: float
    direction_change: float
    merge_changed: float
    merge_error: float


@dataclass(frozen=True)
class Measures:
    """One module's update in numbers; `base` is None where W wasn't given."""

    shape: tuple[int, int]
    rank: int  # available to ΔW: R of LoRA, min(M, N) of full fine-tuning and of DoRA
    parameters: int
    spectrum: list[float]  # descending, at most 256 of min(M, N, R)
    frobenius: float
    two: float
    numerical_rank: int
    effective_rank: float
    stable_rank: float
    energy_rank: int
    used: float
    base: BaseMeasures | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


OWN = ("frobenius", "two", "effective_rank", "stable_rank", "energy_rank", "used")
CHANGES = ("magnitude_change", "direction_change", "merge_changed", "merge_error")
BESIDE_BASE = ("relative", "reads", "writes", "intruders", *CHANGES)


def quantities(measures: Measures) -> dict[str, float]:
    """A module's single numbers by name: what a table or `summarise` shows of it. Without W, ΔW's alone."""
    numbers = {name: getattr(measures, name) for name in OWN}
    if base := measures.base:
        numbers |= {name: getattr(base, name) for name in BESIDE_BASE}
        factors = {"amplification": base.amplification.factor, "amplification_top": base.amplification_top.factor}
        numbers |= {name: factor for name, factor in factors.items() if factor is not None}
    return numbers


def in_order(paths: Iterable[str]) -> list[str]:
    """Layer 2 before layer 10; alphabetical within a layer."""
    return sorted(paths, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)])


def measure_adapter(
    adapter: Adapter, weights: Mapping[str, Tensor] | None, *, progress: Callable[[int], None] | None = None
) -> dict[str, Measures]:
    """By module path, layer by layer. `weights[path]` gives W, float32 [M, N], read at its turn; None: ΔW alone.

    `progress` gets the number of modules done. Raises InputError for a weight of another shape than its update, and for
    DoRA without weights.
    """

    def of(path: str) -> Measures:
        update, w_MN = adapter.factors[path], None if weights is None else weights[path]
        if w_MN is None and isinstance(update, DoRA):
            raise InputError(f"{path}: DoRA's update depends on the weight", fix="name the base that it was trained on")
        if w_MN is not None and tuple(w_MN.shape) != update.shape:
            raise InputError(
                f"{path}: the update has shape {update.shape}, the base's weight {tuple(w_MN.shape)}",
                fix="measure the adapter against the base that it was trained on",
            )
        return measure(update, w_MN)

    paths, measures = in_order(adapter.factors), {}
    workers = min(torch.get_num_threads(), WORKERS)
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for path, measured in zip(paths, pool.map(of, paths), strict=True):
            measures[path] = measured
            if progress:
                progress(len(measures))
    return measures


def measure(update: Update, w_MN: Tensor | None = None) -> Measures:
    """All numbers of one module. `update` and W finite, float32 or float64; what needs W is computed in W's type.

    Raises ValueError when W hasn't the update's shape, and for DoRA without W, which has no ΔW.
    """
    if w_MN is not None and tuple(w_MN.shape) != update.shape:
        raise ValueError(f"update of shape {update.shape}, weight of shape {tuple(w_MN.shape)}")
    if w_MN is not None:
        plain = as_plain(update, w_MN)
    elif isinstance(update, DoRA):
        raise ValueError("DoRA's update depends on the weight: give W")
    else:
        plain = update
    u_MK, sigma_K, vt_KN = plain.svd()
    sigma_K = torch.where(sigma_K > tolerance(sigma_K, *update.shape), sigma_K, 0)
    effective = float(effective_rank(sigma_K))
    return Measures(
        shape=update.shape,
        rank=plain.rank,
        parameters=update.parameters,
        spectrum=sigma_K[:SPECTRUM].tolist(),
        frobenius=float(sigma_K.norm()),
        two=float(sigma_K[0]),
        numerical_rank=int((sigma_K > 0).sum()),
        effective_rank=effective,
        stable_rank=float(stable_rank(sigma_K)),
        energy_rank=int(energy_rank(sigma_K, ENERGY)),
        used=effective / plain.rank,
        base=None if w_MN is None else _against(plain, (u_MK, sigma_K, vt_KN), w_MN),
    )


def summarise(measures: Mapping[str, Measures]) -> dict[str, Any]:
    """Over the model: totals, then `median`, `largest` and `smallest` {module, value} of each of its `quantities`.

    Norms add up as √Σ‖·‖²_F, shares by their entries, so the totals are those of one large block-diagonal matrix.
    `zero` lists the modules whose update is nought. What needs W is absent without it. ValueError for no modules.
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
        summary |= {
            "relative": _ratio(_root_sum(updates), _root_sum(base.frobenius for base in bases)),
            "intruders": sum(base.intruders for base in bases),
            "intruders_of": sum(base.intruders_of for base in bases),
            "intruders_exact": all(base.intruders_exact for base in bases),
            "merge_changed": changed / sum(entries),
            "merge_error": _ratio(lost, _root_sum(updates)),
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


@dataclass(frozen=True, eq=False)
class _Directions:
    """X's singular directions: the first P of both sides, σ, and whichever of the left ones X's entries resolve."""

    x_MN: Tensor
    u_MP: Tensor
    sigma_K: Tensor
    v_NP: Tensor
    smaller: Tensor  # the smaller side's vectors: all that are resolved
    exact: bool

    def cosines(self, u_MJ: Tensor) -> Tensor:
        """[J]: the largest |cosine| of each column with a left vector of X."""
        m, n = self.x_MN.shape
        if m <= n or not self.exact:
            found = u_MJ.T @ self.smaller
        else:  # u_i = X v_i / σ_i, without forming all of them
            found = (u_MJ.T @ self.x_MN) @ self.smaller / self.sigma_K[: self.smaller.shape[1]]
        return found.abs().amax(1) if found.shape[1] else found.new_zeros(len(found))


def _directions(x_MN: Tensor, p: int, sketch: int) -> _Directions:
    """The first p of both sides; beyond `EXACT` directions the first `sketch` are all that is known."""
    m, n = x_MN.shape
    if min(m, n) > EXACT:
        seeded = torch.Generator(x_MN.device).manual_seed(0)
        top = randomised_svd(x_MN, min(m, n, sketch), generator=seeded)
        return _Directions(x_MN, top.u_MK[:, :p], top.s_K, top.vt_KN[:p].T, top.u_MK, False)
    wide = x_MN if m <= n else x_MN.T
    energy_K, vectors = (part.flip(-1) for part in torch.linalg.eigh(wide @ wide.T))
    resolved = int((energy_K > torch.finfo(x_MN.dtype).eps * len(energy_K) * energy_K[0]).sum())
    near = vectors[:, :p]
    far = torch.linalg.qr(wide.T @ near).Q
    u_MP, v_NP = (near, far) if m <= n else (far, near)
    return _Directions(x_MN, u_MP, energy_K.clamp(min=0).sqrt(), v_NP, vectors[:, :resolved], True)


def _against(update: Plain, usv: tuple[Tensor, Tensor, Tensor], w_MN: Tensor) -> BaseMeasures:
    m, n = w_MN.shape
    u_MK, sigma_K, vt_KN = (part.to(w_MN) for part in usv)
    used, most = int((sigma_K > 0).sum()), int(energy_rank(sigma_K, ENERGY))
    p = min(TOP, max(1, min(m, n) // 10))
    w = _directions(w_MN, p, max(SKETCH, used))
    delta_MN = update.dense().to(w_MN)
    tuned_MN = w_MN + delta_MN
    cosines = _intruder_cosines(w, tuned_MN)
    size, base_size = float(sigma_K.norm()), _frobenius(w_MN)
    magnitude, direction = _row_changes(w_MN, delta_MN)
    changed, error = _merge(w_MN, tuned_MN, delta_MN)
    across_KK = u_MK[:, :used].T @ w_MN @ vt_KN[:used].T
    return BaseMeasures(
        frobenius=base_size,
        relative=_ratio(size, base_size),
        amplification=_amplification(used, sigma_K, across_KK, w.sigma_K, base_size / (m * n) ** 0.5),
        amplification_top=_amplification(most, sigma_K, across_KK, w.sigma_K, base_size / (m * n) ** 0.5),
        top_directions=p,
        reads=_share(sigma_K, vt_KN @ w.v_NP),
        reads_random=p / n,
        writes=_share(sigma_K, u_MK.T @ w.u_MP),
        writes_random=p / m,
        intruders=int((cosines < INTRUDER_EPSILON).sum()),
        intruders_of=len(cosines),
        intruders_exact=w.exact,
        cosines=cosines.tolist(),
        magnitude_change=magnitude,
        direction_change=direction,
        merge_changed=changed,
        merge_error=error,
    )


def _amplification(k: int, sigma_K: Tensor, across_KK: Tensor, base_K: Tensor, entry: float) -> Amplification:
    """`across_KK` is UᵀW V of ΔW's directions, `base_K` W's singular values, `entry` the root mean square of W's."""
    update, on_update = float(sigma_K[:k].norm()), float(across_KK[:k, :k].norm())
    factor = update / on_update if on_update else None
    return Amplification(k, update, on_update, float(base_K[:k].norm()), k * entry, factor if update else 0.0)


def _share(sigma_K: Tensor, across_KP: Tensor) -> float:
    """Of the energy Σσ² in W's directions, `across_KP` the products of ΔW's with them; at most 1 but for rounding."""
    part, whole = (across_KP * sigma_K[:, None]).norm(), sigma_K.norm()
    return min(1.0, _ratio(float(part), float(whole)) ** 2)


def _intruder_cosines(w: _Directions, tuned_MN: Tensor) -> Tensor:
    """[J] for the first left vectors of W': 10, or as many as W' has."""
    k = min(INTRUDER_K, *tuned_MN.shape)
    tuned = _directions(tuned_MN, k, 2 * k)
    cosines_J = w.cosines(tuned.u_MP[:, : tuned.smaller.shape[1]])
    settled = len(cosines_J) == k and bool((cosines_J >= INTRUDER_EPSILON).all())
    if w.exact and tuned_MN.dtype == torch.float32 and not settled:
        return _intruder_cosines(_directions(w.x_MN.double(), 1, 1), tuned_MN.double())
    return cosines_J.clamp(max=1)


def _row_changes(w_MN: Tensor, delta_MN: Tensor) -> tuple[float, float]:
    """(mean |‖w'‖ − ‖w‖| / ‖w‖, mean 1 − cos(w', w)) over rows.

    Neither is taken as a difference of nearly equal numbers: with δ = w' − w, ‖w'‖ − ‖w‖ = (2 w·δ + δ·δ) / (‖w'‖ + ‖w‖)
    and 1 − cos = (δ·δ − (‖w'‖ − ‖w‖)²) / (2 ‖w‖ ‖w'‖).
    """
    moved_M = delta_MN.square().sum(1)
    grown_M = 2 * (w_MN * delta_MN).sum(1) + moved_M
    norms_M, tuned_M = w_MN.norm(dim=1), (w_MN + delta_MN).norm(dim=1)
    rows = (norms_M > 0) & (tuned_M > 0)
    if not rows.any():
        return 0.0, 0.0
    moved_M, grown_M, norms_M, tuned_M = (x[rows] for x in (moved_M, grown_M, norms_M, tuned_M))
    longer_M = grown_M / (tuned_M + norms_M)
    turned_M = (moved_M - longer_M.square()).clamp(min=0) / (2 * norms_M * tuned_M)
    return float((longer_M.abs() / norms_M).mean()), float(turned_M.mean())


def _merge(w_MN: Tensor, tuned_MN: Tensor, delta_MN: Tensor) -> tuple[float, float]:
    """(share of the entries that bfloat16 sees move, relative error of what it sees)."""
    before, after = w_MN.bfloat16(), tuned_MN.bfloat16()
    error = _frobenius(after.to(w_MN) - before.to(w_MN) - delta_MN)
    return float((before != after).double().mean()), _ratio(error, _frobenius(delta_MN))


def _frobenius(x_MN: Tensor) -> float:
    """By rows: float32 loses 4e-5 of the norm of a million numbers when it takes them at once."""
    return float(x_MN.norm(dim=1).norm())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _root_sum(values: Iterable[float]) -> float:
    return sum(value**2 for value in values) ** 0.5
