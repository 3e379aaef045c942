"""phi: two ranks learn the same top direction, and the rest differs.

LoRA §7.2 compares adapters of rank 8 and 64 by φ(i, j), the share of the first i directions of one that lies in the
first j of the other (linalg/subspace.py). Here they are the right singular vectors of ΔW, what it reads. Random
directions in N dimensions have φ = max(i, j) / N; the *excess* is φ less that, so that the sizes compare.

"The rest" is (R, R), all R directions of the lower rank. Whether it is less shared than the first is a difference,
and modules of one training aren't independent: the mean over modules is one number per seed.

Trainings with one seed share rows and order, so pairs with other seeds are asked for, too: the lower rank's seed s
with the higher one's next seed, each adapter in one pair.
"""

from collections.abc import Mapping

from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.compare import Side, compare
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.linalg.threads import one_thread
from deltaw.studies.bench import LORA_RATES, Arm, Trained, lora
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Estimate, Paired
from deltaw.studies.study import Outcome, Rule, nothing_learnt

LOWER, MIDDLE, HIGH = 4, 16, 64
SHARED, LESS = 0.5, 0.5
PAIRS = (
    f"{MIDDLE} and {HIGH}, one seed",
    f"{MIDDLE} and {HIGH}, two seeds",
    f"{LOWER} and {HIGH}, one seed",
)
TOP, REST = "φ(1, 1) of ranks {}", "excess at (R, R) less half of that at (1, 1), ranks {}"

RULE = Rule(
    name="phi",
    title="Do two ranks learn the same directions?",
    claim="Adapters of a low and a high rank share their top direction, and hardly anything else.",
    source="LoRA (Hu et al. 2021), §7.2, figures 3 and 4: between rank 8 and 64, φ > 0.5 for one direction in W_q and "
    "W_v of GPT-3's layer 48, the other directions do not overlap; two seeds of rank 64 share more, two random "
    "matrices nothing",
    definition=f"Ranks {LOWER}, {MIDDLE} and {HIGH}, alpha 32, all linear layers, each at its best learning rate; φ of "
    "the right singular vectors of ΔW, by seed the mean over modules; the excess is φ less what random directions have",
    criteria=tuple(
        criterion
        for pair in PAIRS
        for criterion in (Criterion(TOP.format(pair), above=SHARED), Criterion(REST.format(pair), below=0.0))
    ),
    void="any of the trainings ends above half of the base's loss",
    change="wider layers, where directions have more room to differ; fewer steps, where the first direction dominates",
    design={"ranks": [LOWER, MIDDLE, HIGH], "rates": LORA_RATES, "shared": SHARED, "less": LESS, "steps": Arm().steps},
)


def run(lab: Lab) -> Outcome:
    tuned = {f"rank {rank}": lab.bench.tuned(Arm(lora(rank)), LORA_RATES) for rank in (LOWER, MIDDLE, HIGH)}
    trained = {
        rank: lab.bench.by_seed(Arm(lora(rank), tuned[f"rank {rank}"].rate), RULE.seeds)
        for rank in (LOWER, MIDDLE, HIGH)
    }
    turned = list(zip(RULE.seeds, RULE.seeds[1:] + RULE.seeds[:1], strict=True))
    pairs = {
        PAIRS[0]: [(trained[MIDDLE][s], trained[HIGH][s]) for s in RULE.seeds],
        PAIRS[1]: [(trained[MIDDLE][s], trained[HIGH][t]) for s, t in turned],
        PAIRS[2]: [(trained[LOWER][s], trained[HIGH][s]) for s in RULE.seeds],
        f"{HIGH} and {HIGH}, two seeds": [(trained[HIGH][s], trained[HIGH][t]) for s, t in turned],
    }
    estimates: dict[str, Estimate] = {}
    rows: list[list[Cell]] = []
    with lab.display.task("comparing", len(pairs)) as progress:
        for done, (name, each) in enumerate(pairs.items(), 1):
            values = [sides(one, other) for one, other in each]
            columns = {of: Paired(tuple(value[of] for value in values)) for of in values[0]}
            estimates[TOP.format(name)] = columns["right, φ(1, 1)"]
            estimates[REST.format(name)] = columns["right, rest"]
            rows.append([name, *(column.value for column in columns.values())])
            for of in ("left, φ(1, 1)", "left, excess (R, R)"):
                estimates[f"{of}, ranks {name}"] = columns[of]
            progress(done)
    worst = max(one.loss for by_seed in trained.values() for one in by_seed.values())
    picture = Picture(
        pictures.bars(
            list(pairs),
            {
                "first direction, φ(1, 1)": [estimates[TOP.format(name)].value for name in pairs],
                "all, excess at (R, R)": [float(row[3]) for row in rows],  # type: ignore[arg-type]
            },
            y_label="what two trainings read in common",
            errors={"first direction, φ(1, 1)": [_half(estimates[TOP.format(name)]) for name in pairs]},
            baseline=(f"φ = {SHARED:g}", SHARED),
        ),
        "How much the first direction, and all of them, have in common. Means over modules and seeds.",
        "A group of bars for each pair of trainings",
        Table(
            ["ranks", *columns], rows, "Means over modules and seeds; right: what an update reads, left: what it writes"
        ),
    )
    void = nothing_learnt(worst, trained[LOWER][RULE.seeds[0]].before)
    return Outcome(estimates, [picture], {"rows": rows}, tuned, void)


def sides(one: Trained, other: Trained) -> dict[str, float]:
    """Means over the modules of two trainings."""
    return of_adapters(one.adapter(), other.adapter())


def of_adapters(one: Adapter, other: Adapter) -> dict[str, float]:
    with one_thread():
        modules = compare(one, other).modules.values()
    means: dict[str, float] = {}
    for side in ("right", "left"):
        parts = [_parts(getattr(module, side)) for module in modules if getattr(module, side).phi_IJ.numel()]
        for of in ("φ(1, 1)", "excess (1, 1)", "excess (R, R)"):
            means[f"{side}, {of}"] = sum(part[of] for part in parts) / len(parts)
        means[f"{side}, rest"] = means[f"{side}, excess (R, R)"] - LESS * means[f"{side}, excess (1, 1)"]
    return means


def _parts(side: Side) -> Mapping[str, float]:
    pairs = side.pairs
    return {
        "φ(1, 1)": pairs["1"]["phi"],
        "excess (1, 1)": pairs["1"]["excess"],
        "excess (R, R)": pairs["last"]["excess"],
    }


def _half(estimate: Estimate) -> float:
    return estimate.bounds()[1] - estimate.value
