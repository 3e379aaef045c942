"""amp: ΔW amplifies directions that W has but does not stress.

LoRA §7.3 looks at W in the directions of ΔW, U and V: ‖UᵀW V‖_F lies far below what W has in its own strongest
directions and above what it has in random ones, and ‖ΔW‖_F over it, the amplification, falls with the rank.

The last part is weaker than it looks. More directions hold more of any W: random ones about k ‖W‖_F / √(M N), so
‖ΔW‖_F over *that* falls like 1 / k whatever was learnt. It is shown beside the amplification, as is the amplification
of the few directions that carry 90 % of the energy, whose number hardly grows with the rank.

Random directions are drawn, once per module: their root mean square (analysis/measure.py) lies above two thirds of the
draws at k = 1, so ΔW would seem to avoid W when it only ignores it.

Letters: M outputs, N inputs, k directions of ΔW: all that can be told from zero.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.measure import BaseMeasures
from deltaw.analysis.page import Block, Cell, Picture, Table, Text
from deltaw.analysis.words import place
from deltaw.linalg.threads import one_thread
from deltaw.studies.lab import RANKS, Lab, best
from deltaw.studies.study import Claim, Judgement, Outcome, majority

CLAIM = Claim(
    name="amp",
    title="Does ΔW amplify what W has but does not stress?",
    claim="In the directions of ΔW, W has more than in random directions and far less than in its own strongest ones; "
    "ΔW amplifies it, the more the lower the rank.",
    source="LoRA (Hu et al. 2021), §7.3, table 7: in GPT-3's layer 48, at r = 4, W_q has 0.32 in ΔW's directions, "
    "21.67 in its own, 0.02 in random ones, an amplification of 21.5; at r = 64 1.90, 37.71, 0.33 and about 2",
    method=f"ranks {', '.join(map(str, RANKS))}, alpha 32, all linear layers, each at its best learning rate of the "
    "study rank; in every module the Frobenius norm of W in as many directions of ΔW, of its own and of chance",
    rule="held, if in more modules than not (1) the amplification is smaller at the highest rank than at the lowest, "
    "and at each rank W's norm in ΔW's directions is (2) larger than in random ones and (3) smaller than in its own; "
    "did not hold, if in fewer; too noisy, if one of these counts is about half, within what coins do (√n of n "
    "modules), and none is fewer",
)


class Row(NamedTuple):
    """A column of table 7: of a module, or medians over modules."""

    update: float  # ‖ΔW‖_F
    on_update: float  # ‖UᵀW V‖_F in ΔW's directions
    on_base: float  # … in W's first k
    on_random: float  # … in k random ones
    factor: float  # the amplification: update / on_update
    random_factor: float  # update / on_random
    top_directions: float  # how many carry 90 % of the energy
    top_factor: float  # their amplification


Rows = Mapping[tuple[int, str], Row]  # by seed and path


def verdict(by_rank: Sequence[Rows]) -> Judgement:
    """`by_rank`: the modules at each rank, the lowest first."""
    clear = [majority(*falls(by_rank))]
    for rows in by_rank:
        clear.append(majority(sum(row.on_update > row.on_random for row in rows.values()), len(rows)))
        clear.append(majority(sum(row.on_update < row.on_base for row in rows.values()), len(rows)))
    return "did not hold" if False in clear else "too noisy" if None in clear else "held"


def falls(by_rank: Sequence[Rows]) -> tuple[int, int]:
    """In how many modules the amplification falls from the first to the last rank, of how many."""
    low, high = by_rank[0], by_rank[-1]
    both = low.keys() & high.keys()
    return sum(low[key].factor > high[key].factor for key in both), len(both)


def run(lab: Lab) -> Outcome:
    rates: dict[int, float] = {}
    modules: dict[int, Rows] = {}
    for rank in RANKS:
        adapter = {"rank": rank, "alpha": 32}
        rates[rank] = best(lab.sweep(adapter))[0]
        of_rank: dict[tuple[int, str], Row] = {}
        for seed in lab.seeds:
            name = f"rank {rank}, seed {seed}"
            trial = lab.train(name, seed=seed, adapter=adapter, lr=rates[rank])
            of_rank |= {(seed, path): row for path, row in rows_of(lab, name, trial.adapter()).items()}
        modules[rank] = of_rank
    middle = {rank: medians(rows) for rank, rows in modules.items()}
    low, high = middle[RANKS[0]], middle[RANKS[-1]]
    fell, of = falls(list(modules.values()))
    beside = "; ".join(
        f"{row.on_update / row.on_random:.2f} and {row.on_update / row.on_base:.1%} at rank {rank}"
        for rank, row in middle.items()
    )
    because = (
        f"The amplification is {low.factor:.3g} at rank {RANKS[0]} and {high.factor:.3g} at rank {RANKS[-1]} "
        f"(medians), and falls in {fell} of {of} modules; over random directions it would have gone from "
        f"{low.random_factor:.3g} to {high.random_factor:.3g}. What W has in ΔW's directions is a multiple of what it "
        f"has in random ones, and a share of what it has in its own: {beside}."
    )
    figures = {
        "rows": {str(rank): {"lr": rates[rank], **row._asdict()} for rank, row in middle.items()},
        "above_random": {str(k): sum(r.on_update > r.on_random for r in rows.values()) for k, rows in modules.items()},
        "below_own": {str(k): sum(r.on_update < r.on_base for r in rows.values()) for k, rows in modules.items()},
        "falls": fell,
        "modules": of,
    }
    return Outcome(verdict(list(modules.values())), because, blocks(middle, rates, modules), figures)


def rows_of(lab: Lab, name: str, adapter: Adapter) -> dict[str, Row]:
    """By module path, without zero updates: they amplify nothing."""
    rows, generator = {}, torch.Generator().manual_seed(0)
    measures = lab.measured(name, adapter)
    with one_thread():
        for path, m in measures.items():
            if m.base and m.base.amplification.factor:
                chance = on_random(lab.weights[path].dense(), m.base.amplification.directions, generator)
                rows[path] = row_of(m.base, chance)
    return rows


def row_of(base: BaseMeasures, chance: float) -> Row:
    a, top = base.amplification, base.amplification_top
    return Row(
        update=a.update,
        on_update=a.on_update,
        on_base=a.on_base,
        on_random=chance,
        factor=a.factor or 0.0,
        random_factor=a.update / chance,
        top_directions=top.directions,
        top_factor=top.factor or 0.0,
    )


def on_random(w_MN: Tensor, k: int, generator: torch.Generator) -> float:
    """‖UᵀW V‖_F with k random directions of each side."""
    u_MK, v_NK = (torch.linalg.qr(torch.randn(d, k, generator=generator)).Q for d in w_MN.shape)
    return float((u_MK.T @ w_MN @ v_NK).norm())


def medians(rows: Rows) -> Row:
    return Row(*map(median, zip(*rows.values(), strict=True)))


def blocks(middle: Mapping[int, Row], rates: Mapping[int, float], modules: Mapping[int, Rows]) -> list[Block]:
    head = ["rank", "lr", "‖ΔW‖", "W in ΔW's", "W in its own", "W in random", "amplification", "over random"]
    table = Table(
        [*head, "directions of 90 %", "their amplification"],
        [[rank, rates[rank], *row] for rank, row in middle.items()],
        "Medians over the modules; LoRA's table 7. The last two are of the directions that carry 90 % of the energy.",
    )
    norms = {"‖ΔW‖": 0, "W in ΔW's directions": 1, "W in its own": 2, "W in random ones": 3}
    factors = {"all directions": 4, "those with 90 % of the energy": 7, "if they were random": 5}
    curves = [
        {name: (list(middle), [row[at] for row in middle.values()]) for name, at in each.items()}
        for each in (norms, factors)
    ]
    return [
        Picture(
            pictures.lines(curves[0], x_label="rank", y_label="Frobenius norm", log_x=True, log_y=True),
            "The size of ΔW, and of W in three sets of equally many directions.",
            "Four curves over the rank",
            table,
        ),
        Picture(
            pictures.lines(curves[1], x_label="rank", y_label="amplification", log_x=True, log_y=True),
            "ΔW in its own directions, as a multiple of what W has there.",
            "Three curves over the rank",
            table,
        ),
        Text(
            "More directions hold more of any matrix, so part of the fall is mere counting: the curve of random "
            "directions falls as well."
        ),
        table,
        by_kind(modules),
    ]


def by_kind(modules: Mapping[int, Rows]) -> Table:
    rows: list[list[Cell]] = []
    for kind in dict.fromkeys(place(path)[1] for rows in modules.values() for _, path in rows):
        mine = [{at: row for at, row in rows.items() if place(at[1])[1] == kind} for rows in modules.values()]
        rows.append([kind, *(medians(rows).factor if rows else None for rows in mine)])
    return Table(["", *(f"rank {rank}" for rank in modules)], rows, "Median amplification by kind of module")
