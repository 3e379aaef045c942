"""phi: two ranks learn the same top direction, and the rest differs.

LoRA §7.2 compares adapters of rank 8 and 64 by φ(i, j), the share of the first i directions of one that lies in the
first j of the other (linalg/subspace.py). Here they are the right singular vectors of ΔW, what it reads. The paper's
are those of A alone, most of whose directions are where training started; they are shown beside ours. Random directions
in N dimensions have φ = max(i, j) / N, a tenth at 64 in a small model, so that is subtracted.

Two ranks are trained on the same rows in the same order. The pair with other seeds, whose order and start
differ, shows whether they agree because of that.

Letters: N inputs of a module, R the lower rank, i and j numbers of directions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch

from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.compare import Comparison, ModuleComparison, Side, compare
from deltaw.analysis.page import Block, Cell, Picture, Table
from deltaw.factors import LowRank
from deltaw.linalg.threads import one_thread
from deltaw.studies.lab import Lab
from deltaw.studies.study import Claim, Judgement, Outcome, majority
from deltaw.updates import Update

LOWER, MIDDLE, HIGH = 4, 16, 64
RATE = 3e-3  # of all of them
SHARED = 0.5  # φ above it counts as shared
POINTS = (1, 2, 4, 8, 16, 32, 64)  # of the grid that are shown
KINDS = ("q_proj", "v_proj", "down_proj")  # the paper's, and one of the MLP

CLAIM = Claim(
    name="phi",
    title="Do two ranks learn the same directions?",
    claim="Adapters of a low and a high rank share their top direction, and hardly anything else.",
    source="LoRA (Hu et al. 2021), §7.2, figures 3 and 4: between rank 8 and 64, φ > 0.5 for one direction in W_q and "
    "W_v of GPT-3's layer 48, the other directions do not overlap; two seeds of rank 64 share more, two random "
    "matrices nothing",
    method=f"ranks {LOWER}, {MIDDLE} and {HIGH}, alpha 32, all linear layers, at the learning rate {RATE:g}, and rank "
    f"{HIGH} with another seed; φ of the right singular vectors of ΔW in every module, less what random directions "
    "have (the excess)",
    rule=f"held, if between ranks {MIDDLE} and {HIGH} the median over modules of φ(1, 1) is above {SHARED:g}, and the "
    f"median excess at ({MIDDLE}, {MIDDLE}) is less than half of that at (1, 1); too noisy, if the modules above "
    f"{SHARED:g} are about half of them, within what coins do (√n of n modules)",
)

Pairs = list[tuple[Adapter, Adapter]]


def verdict(tops: Sequence[float], top_excess: float, rest_excess: float) -> Judgement:
    """`tops`: φ(1, 1) of each module; the two excesses are medians over modules, at (1, 1) and at (R, R)."""
    shared = majority(sum(phi > SHARED for phi in tops), len(tops))
    if shared is None:
        return "too noisy"
    return "held" if shared and rest_excess < top_excess / 2 else "did not hold"


def run(lab: Lab) -> Outcome:
    seeds = lab.seeds if len(lab.seeds) > 1 else (lab.seeds[0], lab.seeds[0] + 1)
    lower, middle, high = (
        {seed: adapter_of(lab, rank, seed) for seed in (seeds if rank == HIGH else lab.seeds)}
        for rank in (LOWER, MIDDLE, HIGH)
    )
    same: Pairs = [(middle[seed], high[seed]) for seed in lab.seeds]
    ranks, random = f"ranks {MIDDLE} and {HIGH}", "random matrices"
    pairs: dict[str, Pairs] = {
        ranks: same,
        f"ranks {LOWER} and {HIGH}": [(lower[seed], high[seed]) for seed in lab.seeds],
        f"{ranks}, other seeds": [(middle[a], high[b]) for a in lab.seeds for b in seeds if a != b],
        f"rank {HIGH}, two seeds": [(high[a], high[b]) for a, b in combinations(seeds, 2)],
        f"{ranks}, of A alone": [(changed(a, of_a), changed(b, of_a)) for a, b in same],
        random: [(changed(a, gaussian(0)), changed(b, gaussian(1))) for a, b in same[:1]],
    }
    comparisons = {name: compared(lab, name, each) for name, each in pairs.items()}
    tops = [float(m.right.phi_IJ[0, 0]) for m in comparisons[ranks].modules.values() if m.right.phi_IJ.numel()]
    medians = {name: comparison.medians for name, comparison in comparisons.items()}
    ours = medians[ranks]
    top, rest = ours["right_excess_1"] or 0.0, ours["right_excess_last"] or 0.0
    seeds_top = medians[f"rank {HIGH}, two seeds"]["right_phi_1"] or 0.0
    because = (
        f"Between ranks {MIDDLE} and {HIGH} φ(1, 1) is {ours['right_phi_1']:.2f} (median of {len(tops)} modules, above "
        f"{SHARED:g} in {sum(phi > SHARED for phi in tops)}), {top:.2f} more than random directions have; at "
        f"({MIDDLE}, {MIDDLE}) the excess is {rest:.2f}. Two seeds of rank {HIGH} have a φ(1, 1) of {seeds_top:.2f}."
    )
    blocks: list[Block] = [*pictures_of(comparisons, (ranks, f"rank {HIGH}, two seeds", random)), table_of(medians)]
    figures = {
        "medians": medians,
        "above": sum(phi > SHARED for phi in tops),
        "modules": len(tops),
        "grids": {name: {kind: grid(s["right"])[2] for kind, s in c.kinds.items()} for name, c in comparisons.items()},
    }
    return Outcome(verdict(tops, top, rest), because, blocks, figures)


def adapter_of(lab: Lab, rank: int, seed: int) -> Adapter:
    adapter = {"rank": rank, "alpha": 32}
    return lab.train(f"rank {rank}, lr {RATE:g}, seed {seed}", seed=seed, adapter=adapter, lr=RATE).adapter()


def compared(lab: Lab, name: str, pairs: Pairs) -> Comparison:
    """The comparison of all pairs, with their modules put together."""
    modules: dict[str, ModuleComparison] = {}
    total = sum(len(first.factors) for first, _ in pairs)
    with lab.display.task(f"comparing {name}", total) as progress, one_thread():
        for number, (first, second) in enumerate(pairs):
            compared_modules = compare(first, second).modules
            modules |= {f"{number}.{path}": module for path, module in compared_modules.items()}
            progress(len(modules))
    return Comparison(modules, ([], []))


def changed(adapter: Adapter, how: Callable[[Update], LowRank]) -> Adapter:
    return dataclasses.replace(adapter, factors={path: how(update) for path, update in adapter.factors.items()})


def of_a(update: Update) -> LowRank:
    """A with an identity for B: the right singular vectors are A's, and the left ones mean nothing."""
    low = update.low_rank()
    return LowRank(low.a_RN, torch.eye(*low.b_MR.shape))


def gaussian(seed: int) -> Callable[[Update], LowRank]:
    """Another random update of the same shapes for each module asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(update: Update) -> LowRank:
        m, n = update.shape
        a_RN, b_MR = (torch.randn(shape, generator=generator) for shape in ((update.rank, n), (m, update.rank)))
        return LowRank(a_RN, b_MR)

    return draw


def grid(side: Side) -> tuple[list[int], list[int], list[list[float]]]:
    """i, j and the excess at the points of the grid that are shown."""
    rows, columns = ([at for at in POINTS if at <= size] for size in side.excess_IJ.shape)
    return rows, columns, [[float(side.excess_IJ[i - 1, j - 1]) for j in columns] for i in rows]


def pictures_of(comparisons: Mapping[str, Comparison], names: Sequence[str]) -> list[Picture]:
    """φ(1, 1) by kind, then a heat map for some kinds in each of the comparisons named."""
    kinds = list(comparisons[names[0]].kinds)
    tops = {name: [float(comparisons[name].kinds[kind]["right"].phi_IJ[0, 0]) for kind in kinds] for name in names}
    rows: list[list[Cell]] = [[kind, *(tops[name][at] for name in names)] for at, kind in enumerate(kinds)]
    bars = Picture(
        pictures.bars(kinds, tops, y_label="φ(1, 1)", baseline=(f"φ = {SHARED:g}", SHARED)),
        "How much the two top directions have in common, averaged over the modules of a kind.",
        "A bar for each kind and comparison",
        Table(["", *names], rows, "φ(1, 1)"),
    )
    return [
        bars,
        *(heat_map(name, k, comparisons[name]) for name in names for k in KINDS if k in comparisons[name].kinds),
    ]


def heat_map(name: str, kind: str, comparison: Comparison) -> Picture:
    rows, columns, values = grid(comparison.kinds[kind]["right"])
    labels = [f"i = {i}" for i in rows], [f"j = {j}" for j in columns]
    caption = f"{kind}, {name}: φ(i, j) less that of random directions, mean over the modules."
    svg = pictures.heatmap(
        [[round(100 * value) for value in row] for row in values],
        row_labels=labels[0],
        column_labels=labels[1],
        value_label=f"{kind}, {name}, in %",
        diverging=True,
    )
    table = Table(["", *labels[1]], [[label, *row] for label, row in zip(labels[0], values, strict=True)], caption)
    return Picture(svg, caption, f"{len(rows)} by {len(columns)} cells, the excess of φ", table)


def table_of(medians: Mapping[str, Mapping[str, float | None]]) -> Table:
    columns = {
        "φ(1, 1)": "right_phi_1",
        "excess": "right_excess_1",
        "φ(R, R)": "right_phi_last",
        "its excess": "right_excess_last",
        "left: φ(1, 1)": "left_phi_1",
        "left: excess at (R, R)": "left_excess_last",
    }
    caption = "Medians over the modules, R the lower rank; right: what an update reads, left: what it writes"
    rows: list[list[Cell]] = [
        [name, *(None if "A alone" in name and key.startswith("left") else row.get(key) for key in columns.values())]
        for name, row in medians.items()
    ]
    return Table(["", *columns], rows, caption)
