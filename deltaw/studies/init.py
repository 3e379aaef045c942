"""init: what PiSSA gains over LoRA's own start is an early gain.

PiSSA begins at W's leading singular vectors and is reported far ahead of LoRA, with one learning rate for both. Here
each start gets its own. The gap G(k) = loss(LoRA) − loss(PiSSA) is read off the training losses of five steps around
step k: trainings with the same seed see the same rows there, so what these rows are like cancels. Three more starts are
reported beside it.
"""

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.bench import Arm, Trained, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import band, cells, mean_of
from deltaw.studies.statistics import Criterion, Estimate, Paired, Tuned, differences
from deltaw.studies.study import Outcome, Rule, nothing_learnt

STARTS = ("lora", "pissa", "olora", "eva", "lora-ga")
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
RANK, EARLY, LATE, PART, AROUND = 16, 20, 150, 3, 2
SHOWN = (5, 10, 20, 40, 80, LATE - AROUND)
GAINS, FADES, STAYS = f"G({EARLY})", f"G({LATE}) − G({EARLY})/{PART}", f"G({LATE}) + G({EARLY})/{PART}"

RULE = Rule(
    name="init",
    title="Does a better start last?",
    claim="PiSSA's gain over LoRA is mostly in the first hundred steps: with each at its best learning rate it fades.",
    source="PiSSA (Meng et al. 2024): GSM8K 53.2 against LoRA's 42.9 at one learning rate for both; its loss curves "
    "part in the first 100 steps",
    definition=f"Starts {', '.join(STARTS)} at rank {RANK}, alpha 32, on a task that the base can't do, each at its "
    "best learning rate. G(k) is LoRA's training loss less PiSSA's, the mean of the five steps around step k (at "
    f"{LATE} of the last five), with the same seed and so on the same rows",
    criteria=(
        Criterion(GAINS, above=0.0),
        Criterion(FADES, below=0.0),
        Criterion(STAYS, above=0.0),
    ),
    void="a loss is above half of the base's: then too little was learnt to compare",
    change="a base whose weights have a steeper spectrum (a longer pretraining), another rank, longer trainings",
    design={"starts": STARTS, "rates": RATES, "rank": RANK, "alpha": 32, "early": EARLY, "late": LATE, "around": AROUND,
            "steps": Arm().steps, "tokens": Arm().tokens},
)  # fmt: skip


def arm_of(start: str) -> Arm:
    return Arm(lora(RANK) if start == "lora" else lora(RANK, init=start))


def around(trained: Trained, step: int) -> float:
    """The training loss around a step, counted from 1."""
    end = min(len(trained.curve), step + AROUND)
    some = trained.curve[max(0, end - 2 * AROUND - 1) : end]
    return sum(some) / len(some)


def run(lab: Lab) -> Outcome:
    tuned: dict[str, Tuned] = {start: lab.bench.tuned(arm_of(start), RATES) for start in STARTS}
    trained = {start: lab.bench.by_seed(arm_of(start).at(tuned[start].rate), RULE.seeds) for start in STARTS}

    def gain(start: str, step: int) -> Paired:
        one, other = ({s: around(t, step) for s, t in trained[name].items()} for name in ("lora", start))
        return differences(one, other)

    early, late = gain("pissa", EARLY).values, gain("pissa", LATE).values
    estimates: dict[str, Estimate] = {
        GAINS: Paired(early),
        FADES: Paired(tuple(b - a / PART for a, b in zip(early, late, strict=True))),
        STAYS: Paired(tuple(b + a / PART for a, b in zip(early, late, strict=True))),
        f"G({LATE})": Paired(late),
    }
    held_out = {start: {seed: one.loss for seed, one in by_seed.items()} for start, by_seed in trained.items()}
    for start in STARTS[1:]:
        if start != "pissa":
            estimates[f"LoRA − {start} at step {EARLY}"] = gain(start, EARLY)
        estimates[f"LoRA − {start}, held-out loss at the end"] = differences(held_out["lora"], held_out[start])
    worst = max(loss for by_seed in held_out.values() for loss in by_seed.values())
    steps = [step for step in SHOWN if step <= LATE]
    curves = {start: (steps, [gain(start, step).value for step in steps]) for start in STARTS[1:]}
    bands = {"pissa": band(steps, [gain("pissa", step) for step in steps])}
    rows: list[list[Cell]] = []
    for start, by_seed in held_out.items():
        gains = [gain(start, step).value for step in steps]
        rows.append([start, f"{tuned[start].rate:g}", *cells(mean_of(by_seed)), *gains])
    picture = Picture(
        pictures.lines(
            curves,
            x_label="step",
            y_label="LoRA's training loss less this start's",
            log_x=True,
            bands=bands,
            baseline=("no gain", 0.0),
        ),
        "What each start gains over LoRA's own, each at its best learning rate; above zero it is ahead. The band is "
        "the interval for PiSSA.",
        "A curve for each start",
        Table(
            ["start", "learning rate", "held-out loss", "from", "to", *(f"gain at {step}" for step in steps)],
            rows,
            "Means over the seeds; the interval is the held-out loss's",
        ),
    )
    void = nothing_learnt(worst, trained["lora"][RULE.seeds[0]].before)
    return Outcome(estimates, [picture], {"held_out": held_out, "early": early, "late": late}, tuned, void)
