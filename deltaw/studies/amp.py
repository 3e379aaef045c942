"""amp: ΔW amplifies directions that W has but does not stress.

LoRA §7.3 looks at W in the directions of ΔW, U and V: ‖UᵀW V‖_F lies above what W has in random directions and below
what it has in as many of its own strongest. Two parts of the claim can't fail, so nothing is concluded from them: the
strongest directions have the most by definition, and ‖ΔW‖_F over ‖UᵀW V‖_F falls with the rank by counting, since more
directions hold more of any W. What can fail is "more than random", and how far towards its own:

    percentile    the share of random U, V (64 draws per module, analysis/measure.py) in which W has less
    share         log(‖UᵀW V‖ / chance) / log(own / chance): 0 of random directions, 1 of W's own, whatever the size of
                  W. In the paper's W_q, r = 4, it is log(0.32 / 0.02) / log(21.67 / 0.02) = 0.40

Both are means over the modules, one number per seed.
"""

import math

from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.measure import CHANCE, measure_adapter
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.analysis.words import place
from deltaw.studies.bench import LORA_RATES, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Estimate, Paired
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANK, BESIDE = 4, (16,)
LEAST, MOST = 0.2, 0.8
PERCENTILE, SHARE = "percentile of W in ΔW's directions, rank {}", "share of the way from chance to W's own, rank {}"

RULE = Rule(
    name="amp",
    title="Does ΔW amplify what W has but does not stress?",
    claim="In the directions of ΔW, W has more than in random directions and far less than in its own strongest ones.",
    source="LoRA (Hu et al. 2021), §7.3, table 7: in GPT-3's layer 48, at r = 4, W_q has 0.32 in ΔW's directions, "
    "21.67 in its own, 0.02 in random ones (a share of 0.40); one module of one training, one random draw",
    definition=f"Rank {RANK}, alpha 32, all linear layers, at its best learning rate; in every module the norm of W in "
    f"ΔW's directions, against {CHANCE} random draws and against as many of W's own; by seed the mean over modules of "
    "the percentile and of the share. The claim's share is taken to be between half of the paper's and twice it",
    criteria=(
        Criterion(PERCENTILE.format(RANK), above=0.5),
        Criterion(SHARE.format(RANK), above=LEAST, below=MOST),
    ),
    void="any of the trainings ends above half of the base's loss",
    change="a larger base: GPT-3's W may have few strong directions where a small one has many",
    design={"rank": RANK, "draws": CHANCE, "rates": LORA_RATES, "steps": Arm().steps},
)


def run(lab: Lab) -> Outcome:
    estimates: dict[str, Estimate] = {}
    tuned, kinds, void = {}, dict[str, dict[int, list[float]]](), None
    for rank in (RANK, *BESIDE):
        tuned[f"rank {rank}"] = lab.bench.tuned(Arm(lora(rank)), LORA_RATES)
        trained = lab.bench.by_seed(Arm(lora(rank), tuned[f"rank {rank}"].rate), RULE.seeds)
        void = void or nothing_learnt(max(one.loss for one in trained.values()), trained[RULE.seeds[0]].before)
        percentiles, shares = [], []
        with lab.display.task(f"measuring rank {rank}", len(trained)) as progress:
            for done, one in enumerate(trained.values(), 1):
                modules = against_chance(lab, one.adapter())
                percentiles.append(sum(p for p, _ in modules.values()) / len(modules))
                shares.append(sum(share for _, share in modules.values()) / len(modules))
                for path, (p, _) in modules.items():
                    kinds.setdefault(place(path)[1], {}).setdefault(rank, []).append(p)
                progress(done)
        estimates[PERCENTILE.format(rank)] = Paired(tuple(percentiles))
        estimates[SHARE.format(rank)] = Paired(tuple(shares))
    rows: list[list[Cell]] = [
        [kind, *(sum(values) / len(values) for values in by_rank.values())] for kind, by_rank in kinds.items()
    ]
    ranks = [f"rank {rank}" for rank in (RANK, *BESIDE)]
    picture = Picture(
        pictures.bars(
            [str(row[0]) for row in rows],
            {name: [float(row[at]) for row in rows] for at, name in enumerate(ranks, 1)},  # type: ignore[arg-type]
            y_label="share of random directions in which W has less",
            baseline=("chance", 0.5),
        ),
        "Where W's norm in ΔW's directions lies among random ones, by kind of module.",
        "A group of bars for each kind, a bar for each rank",
        Table(["", *ranks], rows, "Mean percentiles over layers and seeds; chance is 0.5"),
    )
    main = {f"rank {RANK}": tuned[f"rank {RANK}"]}
    return Outcome(estimates, [picture], {"kinds": rows}, main, void)


def against_chance(lab: Lab, adapter: Adapter) -> dict[str, tuple[float, float]]:
    """(percentile, share) by module path, without modules whose update is zero."""
    found = {}
    for path, measures in measure_adapter(adapter, lab.bench.weights).items():
        if measures.base and (a := measures.base.amplification).percentile is not None and a.on_update:
            whole = math.log(a.on_base / a.on_random)
            found[path] = (a.percentile, math.log(a.on_update / a.on_random) / whole)
    return found
