"""What fine-tuning did to the weights, module by module: from the update ΔW and, where it is given, the base weight W.

From ΔW alone, by its singular values σ₁ ≥ σ₂ ≥ …, which come from the factors (linalg/svd.py); those that can't be
told from zero (linalg/rank.py) count as 0, so the same ΔW measures the same as factors and as a matrix:

    numerical, effective, stable rank, energy rank at 90 %     linalg/rank.py
    used                effective rank / R, R the rank available

With W, whose singular vectors are u_i, v_i, and W' = W + ΔW:

    relative            ‖ΔW‖_F / ‖W‖_F
    amplification       ‖UᵀΔW V‖_F / ‖UᵀW V‖_F with the first k directions U, V of ΔW      (LoRA §7.3, table 7)
                        for k = numerical rank, where the numerator is ‖ΔW‖_F as in the paper, and for the k that
                        carry 90 % of the energy. Beside ‖UᵀW V‖_F stand its value for W's own first k directions,
                        √(σ₁² + … + σ_k²) of W, its median over random ones (chance), and the percentile: the share of
                        the random ones in which W has less
    reads, writes       ‖ΔW V_p‖²_F / ‖ΔW‖²_F and ‖U_pᵀ ΔW‖²_F / ‖ΔW‖²_F with W's first p directions, p a tenth of
                        them and at most 64; random directions have p / N and p / M
    intruders           of the first 10 left vectors u'_j of W', those with max_i |u'_jᵀ u_i| < 0.5
                        (Shuttleworth et al. 2024, algorithm 1)
    outside             of the intruders, those with less than half of their energy in W's first 20 left directions;
                        the others are rotations among directions of W of nearly equal σ, which no u_i needs to match
    magnitude_change    mean over rows (outputs) of | ‖w'_i‖ − ‖w_i‖ | / ‖w_i‖             (DoRA §3.2, but relative)
    direction_change    mean over rows of 1 − cos(w'_i, w_i)
    merge_changed, merge_kept, merge_error
                        what bfloat16 weights see of ΔW: the share of the entries that change, what arrives along ΔW,
                        and the relative error, mostly noise in all directions alike (`Survival`, linalg/rounding.py)

A large amplification by itself says that ΔW is strong, not that W is weak there: random directions give about the same.
Only the percentile tells ΔW's directions from any others. Chance is not a root mean square, k ‖W‖_F / √(M N): for k = 1
the median is 0.67 of that (of a normal variable; of a W with few strong directions, less). It is drawn `CHANCE` times
(linalg/subspace.py). Of more than `CHANCE_RANK` directions it hardly scatters: there the root mean square is chance,
and there is no percentile.

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
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.errors import InputError
from deltaw.kernels.weight import DenseWeight, Weight
from deltaw.linalg.rank import effective_rank, energy_rank, stable_rank, tolerance
from deltaw.linalg.rounding import survival
from deltaw.linalg.subspace import random_overlap
from deltaw.linalg.svd import randomised_svd
from deltaw.linalg.threads import one_thread
from deltaw.replaced import Rows
from deltaw.show.progress import Progress, unseen
from deltaw.updates import Plain, Update

SPECTRUM = 256  # singular values kept
ENERGY = 0.9
TOP = 64  # at most, of W's directions, a tenth of which are its top
INTRUDER_K, INTRUDER_EPSILON = 10, 0.5  # Shuttleworth et al.'s
NEAR, MOSTLY = 20, 0.5  # of W's directions; a share of an intruder's energy in them
EXACT, SKETCH = 2048, 256  # all directions up to the one, else the first of them
CHANCE, CHANCE_RANK = 64, 64  # draws of random directions, of at most so many
WORKERS = 4  # modules at once, each with some copies of its W in memory


@dataclass(frozen=True)
class Amplification:
    """A column of LoRA's table 7, for the first `directions` of ΔW. `factor` is None where W has nothing there."""

    directions: int
    update: float  # ‖UᵀΔW V‖_F
    on_update: float  # ‖UᵀW V‖_F, U and V of ΔW
    on_base: float  # … of W
    on_random: float  # … random, the median
    percentile: float | None  # share of the random ones in which W has less than in ΔW's
    factor: float | None  # update / on_update

    @property
    def chance(self) -> float | None:
        """What `factor` would be in random directions."""
        return self.update / self.on_random if self.on_random else None


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
    outside: int
    intruders_of: int  # how many left vectors of W' were looked at
    intruders_exact: bool
    cosines: list[float]  # each one's largest |cosine| with a left vector of W
    magnitude_change: float
    direction_change: float
    merge_changed: float
    merge_kept: float
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


def in_order(paths: Iterable[str]) -> list[str]:
    """Layer 2 before layer 10; alphabetical within a layer."""
    return sorted(paths, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)])


def measure_adapter(
    adapter: Adapter, weights: Mapping[str, Weight] | None, *, progress: Progress = unseen
) -> dict[str, Measures]:
    """By module path, layer by layer. `weights[path]` gives W, read at its turn; None: ΔW alone.

    `progress` gets the number of modules done. Raises InputError for a weight of another shape than its update, and for
    DoRA without weights.
    """

    def of(path: str) -> Measures:
        update, w_MN = adapter.factors[path], None if weights is None else weights[path].dense()
        if w_MN is not None and isinstance(update, Rows):  # tokens that were added have no row of W
            more = update.height(len(w_MN)) - len(w_MN)
            w_MN = torch.nn.functional.pad(w_MN, (0, 0, 0, more))
        elif w_MN is not None and tuple(w_MN.shape) != update.shape:
            raise InputError(
                f"{path}: the update has shape {update.shape}, the base's weight {tuple(w_MN.shape)}",
                fix="measure the adapter against the base that it was trained on",
            )
        return measure(update, w_MN, crc32(path.encode()))

    paths, measures = in_order(adapter.factors), {}
    workers = min(torch.get_num_threads(), WORKERS)
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for path, measured in zip(paths, pool.map(of, paths), strict=True):
            measures[path] = measured
            progress(len(measures))
    return measures


def measure(update: Update, w_MN: Tensor | None = None, seed: int = 0) -> Measures:
    """All numbers of one module. `update` and W finite, float32 or float64; what needs W is computed in W's type.
    `seed` draws the random directions: modules with a seed each have chances that don't err together.

    Raises ValueError when W hasn't the update's shape, InputError for DoRA without W, which has no ΔW.
    """
    plain = update.plain() if w_MN is None else update.relative_to(DenseWeight(w_MN))
    if w_MN is not None and tuple(w_MN.shape) != plain.shape:
        raise ValueError(f"update of shape {plain.shape}, weight of shape {tuple(w_MN.shape)}")
    u_MK, sigma_K, vt_KN = plain.svd()
    sigma_K = torch.where(sigma_K > tolerance(sigma_K, *plain.shape), sigma_K, 0)
    effective = float(effective_rank(sigma_K))
    return Measures(
        shape=plain.shape,
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
        base=None if w_MN is None else _against(plain, (u_MK, sigma_K, vt_KN), w_MN, seed),
    )


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
            cosines_LJ = u_MJ.T @ self.smaller
        else:  # u_i = X v_i / σ_i, without forming all of them
            cosines_LJ = (u_MJ.T @ self.x_MN) @ self.smaller / self.sigma_K[: self.smaller.shape[1]]
        return cosines_LJ.abs().amax(1) if cosines_LJ.shape[1] else cosines_LJ.new_zeros(len(cosines_LJ))


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


def _against(update: Plain, usv: tuple[Tensor, Tensor, Tensor], w_MN: Tensor, seed: int) -> BaseMeasures:
    m, n = w_MN.shape
    u_MK, sigma_K, vt_KN = (part.to(w_MN) for part in usv)
    used, most = int((sigma_K > 0).sum()), int(energy_rank(sigma_K, ENERGY))
    p = min(TOP, max(1, min(m, n) // 10))
    w = _directions(w_MN, max(p, NEAR), max(SKETCH, used))
    delta_MN = update.dense().to(w_MN)
    tuned_MN = w_MN + delta_MN
    cosines, within = _intruder_cosines(w, tuned_MN, w.u_MP[:, : min(NEAR, w.smaller.shape[1])])
    size, base_size = float(sigma_K.norm()), _frobenius(w_MN)
    magnitude, direction = _row_changes(w_MN, delta_MN)
    merged = survival(w_MN, delta_MN, lambda x_MN: x_MN.bfloat16().to(x_MN))
    across_KK = u_MK[:, :used].T @ w_MN @ vt_KN[:used].T
    chance = random_overlap(w.sigma_K, (m, n), base_size, min(used, CHANCE_RANK), CHANCE, seed)

    def amplification(k: int) -> Amplification:
        """In the first k of ΔW's directions."""
        size, on_update = float(sigma_K[:k].norm()), float(across_KK[:k, :k].norm())
        on_random, percentile = k * base_size / (m * n) ** 0.5, None
        if 0 < k <= CHANCE_RANK:
            drawn = chance[:, k - 1]
            on_random = float(drawn.median())
            percentile = float((drawn < on_update).double().mean() + (drawn == on_update).double().mean() / 2)
        factor = (size / on_update if on_update else None) if size else 0.0
        return Amplification(k, size, on_update, float(w.sigma_K[:k].norm()), on_random, percentile, factor)

    return BaseMeasures(
        frobenius=base_size,
        relative=ratio(size, base_size),
        amplification=amplification(used),
        amplification_top=amplification(most),
        top_directions=p,
        reads=_share(sigma_K, vt_KN @ w.v_NP[:, :p]),
        reads_random=p / n,
        writes=_share(sigma_K, u_MK.T @ w.u_MP[:, :p]),
        writes_random=p / m,
        intruders=int((cosines < INTRUDER_EPSILON).sum()),
        outside=int(((cosines < INTRUDER_EPSILON) & (within < MOSTLY)).sum()),
        intruders_of=len(cosines),
        intruders_exact=w.exact,
        cosines=cosines.tolist(),
        magnitude_change=magnitude,
        direction_change=direction,
        merge_changed=merged.share,
        merge_kept=merged.kept,
        merge_error=merged.error,
    )


def _share(sigma_K: Tensor, across_KP: Tensor) -> float:
    """Of the energy Σσ² in W's directions, `across_KP` the products of ΔW's with them; at most 1 but for rounding."""
    part, whole = (across_KP * sigma_K[:, None]).norm(), sigma_K.norm()
    return min(1.0, ratio(float(part), float(whole)) ** 2)


def _intruder_cosines(w: _Directions, tuned_MN: Tensor, near_MP: Tensor) -> tuple[Tensor, Tensor]:
    """[J] for the first left vectors of W', 10 or as many as W' has: the largest |cosine| with one of W's, the share of
    energy in W's first ones, `near_MP`."""
    k = min(INTRUDER_K, *tuned_MN.shape)
    tuned = _directions(tuned_MN, k, 2 * k)
    u_MJ = tuned.u_MP[:, : tuned.smaller.shape[1]]
    cosines_J = w.cosines(u_MJ)
    settled = len(cosines_J) == k and bool((cosines_J >= INTRUDER_EPSILON).all())
    if w.exact and tuned_MN.dtype == torch.float32 and not settled:
        return _intruder_cosines(_directions(w.x_MN.double(), 1, 1), tuned_MN.double(), near_MP.double())
    return cosines_J.clamp(max=1), (near_MP.T @ u_MJ).square().sum(0)


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


def _frobenius(x_MN: Tensor) -> float:
    """By rows: float32 loses 4e-5 of the norm of a million numbers when it takes them at once."""
    return float(x_MN.norm(dim=1).norm())


def ratio(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0
