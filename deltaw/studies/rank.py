"""rank: once the learning rate is right, the rank hardly matters until capacity runs out; too low a rate hides that."""

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.lab import RANKS, RATES, Lab, best
from deltaw.studies.study import Claim, Outcome

WORSE = 1.1  # a rank whose best loss is within this of the best of all has hardly mattered

CLAIM = Claim(
    name="rank",
    title="Does the rank matter?",
    claim="Once the learning rate is right, rank 4 does as well as rank 64; even rank 1 comes close.",
    source="LoRA (Hu et al. 2021), table 6: WikiSQL with r = 1, 2, 4, 8, 64 gives 73.4, 73.3, 73.7, 73.8, 73.5",
    method=f"ranks {', '.join(map(str, RANKS))}, alpha 32, each at learning rates "
    f"{', '.join(f'{r:g}' for r in RATES)}, and full fine-tuning at a tenth of these; held-out loss at "
    "each one's best rate",
    rule=f"held, if at their best rates rank 4's loss is at most {WORSE} times the least of all ranks, or within "
    f"what seeds do; rank 1 and full fine-tuning are reported beside it",
)


def run(lab: Lab) -> Outcome:
    sweeps = lab.sweeps()
    tops = {name: best(trials) for name, trials in sweeps.items()}
    losses = {name: trial.loss for name, (_, trial) in tops.items()}
    least = min(loss for name, loss in losses.items() if name != "full")
    holds = losses["rank 4"] <= WORSE * least or lab.tie(losses["rank 4"], least)
    spread = {rate: max(v) - min(v) for rate in RATES if (v := [sweeps[f"rank {r}"][rate].loss for r in RANKS])}
    because = (
        f"At its best rate rank 4 ends at {losses['rank 4']:.3f} nats, the best rank at {least:.3f} "
        f"({losses['rank 4'] / least - 1:+.1%}); rank 1 at {losses['rank 1']:.3f}, full fine-tuning at "
        f"{losses['full']:.3f}. "
        f"Seeds alone move it by {lab.noise:.3f}. At the lowest rate the ranks lie {spread[RATES[0]]:.3f} apart, "
        f"at the highest {spread[RATES[-1]]:.3f}."
    )
    curves = {name: (list(trials), [trial.loss for trial in trials.values()]) for name, trials in sweeps.items()}
    head = ["", *(f"lr {rate:g}" for rate in RATES), "best", "at"]
    rows: list[list[Cell]] = [
        [name, *(trial.loss for trial in trials.values()), tops[name][1].loss, f"{tops[name][0]:g}"]
        for name, trials in sweeps.items()
    ]
    picture = Picture(
        pictures.lines(
            curves, x_label="learning rate", y_label="held-out loss, nats per token", log_x=True, log_y=True
        ),
        "Held-out loss against the learning rate. Full fine-tuning's rates are a tenth of LoRA's.",
        "One curve per rank, and one for full fine-tuning",
        Table(head, rows, "Held-out loss; full fine-tuning at a tenth of the rates"),
    )
    figures = {
        "losses": {name: {f"{rate:g}": t.loss for rate, t in trials.items()} for name, trials in sweeps.items()},
        "noise": lab.noise,
    }
    return Outcome("held" if holds else "did not hold", because, [picture], figures)
