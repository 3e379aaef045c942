"""fullrank: what full fine-tuning learns is not low-rank.

How many directions a ΔW needs is its energy rank at 90 % (linalg/rank.py), as in the paper. It is counted for full
fine-tuning after a quarter, a half and all of the task's steps (three trainings, each with its own schedule, at one
learning rate) and for LoRA at ten times the rate. The paper's "10 to 100 times" is against the ranks that people give
to LoRA; against what LoRA uses of its rank the bar is lower, so both are given.

The squares σ² are the eigenvalues of the smaller Gram matrix in float64: for a float32 matrix they are as good as an
SVD's, in less than half the time.

Letters: M outputs, N inputs, K = min(M, N).
"""

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.measure import ENERGY, in_order
from deltaw.analysis.page import Picture, Table
from deltaw.analysis.words import place
from deltaw.linalg.rank import energy_rank
from deltaw.linalg.threads import one_thread
from deltaw.studies.lab import Lab
from deltaw.studies.study import Claim, Judgement, Outcome, majority
from deltaw.updates import Update

RATE, LORA_RATE, RANK = 3e-4, 3e-3, 16
MORE = 10  # times LoRA's energy rank
PARTS = (4, 2, 1)  # of the task's steps
KINDS = ("q_proj", "down_proj")  # whose spectra are drawn
POINTS = tuple(2**power for power in range(12))  # of a spectrum, in its table

CLAIM = Claim(
    name="fullrank",
    title="Is the update of full fine-tuning low-rank?",
    claim="Full fine-tuning's ΔW is not low-rank: 90 % of its energy takes 10 to 100 times the ranks that LoRA is "
    "given, and more the longer it is trained; the MLP needs more than attention.",
    source="LoRA Learns Less and Forgets Less (Biderman et al. 2024), §4: SVD of ΔW over the checkpoints of a "
    "continued pretraining of Llama-2-7B",
    method=f"full fine-tuning at the learning rate {RATE:g} for a quarter, a half and all of the steps, LoRA at rank "
    f"{RANK}, alpha 32, rate {LORA_RATE:g} for all of them; in every module the number of singular values that hold "
    "90 % of ‖ΔW‖²",
    rule=f"held, if the median over modules of full fine-tuning's rank at 90 % is more than {MORE} times that of "
    "LoRA, and in more modules it grows from the shortest to the longest training than not; too noisy, if it grows in "
    "about half of them, within what coins do (√n of n modules); MLP and attention are reported beside it",
)


def verdict(lora: Sequence[int], shortest: Sequence[int], longest: Sequence[int]) -> Judgement:
    """Ranks at 90 %, module by module; the last two are full fine-tuning's."""
    if median(longest) <= MORE * median(lora):
        return "did not hold"
    grows = sum(after > before for before, after in zip(shortest, longest, strict=True))
    more = majority(grows, len(longest))
    return "too noisy" if more is None else "held" if more else "did not hold"


def run(lab: Lab) -> Outcome:
    total = lab.task["train"]["steps"]
    names = {steps: f"full, {steps} steps" for part in PARTS if (steps := max(1, total // part))}
    lora = f"LoRA rank {RANK}"
    low_rank = lab.train(lora, adapter={"rank": RANK, "alpha": 32}, lr=LORA_RATE)
    spectra = {lora: spectra_of(lab, lora, low_rank.adapter())}
    for steps, name in names.items():
        trial = lab.train(name, adapter="full", lr=RATE, steps=steps)
        spectra[name] = spectra_of(lab, name, trial.adapter())
    ranks = {
        name: {p: int(energy_rank(s_K, ENERGY)) for p, s_K in by_path.items()} for name, by_path in spectra.items()
    }
    paths = list(ranks[lora])
    shortest, longest = (ranks[names[end]] for end in (min(names), max(names)))
    middle = {name: median(by_path.values()) for name, by_path in ranks.items()}
    last = names[max(names)]
    grows = sum(longest[path] > shortest[path] for path in paths)
    by_part = {
        part: (
            median(longest[p] for p in paths if part_of(p) == part),
            median(longest[p] / len(spectra[last][p]) for p in paths if part_of(p) == part),
        )
        for part in dict.fromkeys(map(part_of, paths))
    }
    because = (
        f"90 % of full fine-tuning's update takes {middle[last]:g} directions after {max(names)} steps (median of "
        f"{len(paths)} modules), {middle[last] / max(1, middle[lora]):.1f} times the {middle[lora]:g} that LoRA uses "
        f"and {middle[last] / RANK:.1f} times the {RANK} it was given; after {min(names)} steps it took "
        f"{middle[names[min(names)]]:g}, and it grew in {grows} modules. "
        + "; ".join(f"{part}: {rank:g}, {share:.0%} of all directions" for part, (rank, share) in by_part.items())
        + "."
    )
    chosen = verdict([ranks[lora][p] for p in paths], [shortest[p] for p in paths], [longest[p] for p in paths])
    figures = {
        "medians": middle,
        "grows": grows,
        "modules": len(paths),
        "parts": {part: {"rank": rank, "share": share} for part, (rank, share) in by_part.items()},
        "by_kind": {name: by_kind(by_path) for name, by_path in ranks.items()},
    }
    return Outcome(chosen, because, [bars(ranks), *pictures_of(spectra)], figures)


def spectra_of(lab: Lab, name: str, adapter: Adapter) -> dict[str, Tensor]:
    """Singular values by module path, float64 [K] (LoRA: [R]), descending."""
    sigmas = {}
    with lab.display.task(f"spectra of {name}", len(adapter.factors)) as progress, one_thread():
        for path in in_order(adapter.factors):
            sigmas[path] = singular_values(adapter.factors[path])
            progress(len(sigmas))
    return sigmas


def singular_values(update: Update) -> Tensor:
    """σ of ΔW, float64, descending; of a full rank from the smaller Gram matrix, which is faster."""
    plain = update.plain()
    if plain.rank < min(plain.shape):
        return plain.svd()[1].double()
    x_MN = plain.dense().double()
    wide = x_MN if x_MN.shape[0] <= x_MN.shape[1] else x_MN.T
    return torch.linalg.eigvalsh(wide @ wide.T).flip(-1).clamp(min=0).sqrt()


def part_of(path: str) -> str:
    """The block that a module is part of: mlp, self_attn."""
    return path.split(".")[-2] if "." in path else path


def by_kind(ranks: Mapping[str, int]) -> dict[str, float]:
    kinds = dict.fromkeys(place(path)[1] for path in ranks)
    return {kind: median(rank for path, rank in ranks.items() if place(path)[1] == kind) for kind in kinds}


def bars(ranks: Mapping[str, Mapping[str, int]]) -> Picture:
    by_kinds = {name: by_kind(each) for name, each in ranks.items()}
    kinds = list(next(iter(by_kinds.values())))
    return Picture(
        pictures.bars(
            kinds,
            {name: [each[kind] for kind in kinds] for name, each in by_kinds.items()},
            y_label="directions that hold 90 %",
            log_y=True,
        ),
        "Rank at 90 % of the energy, median over the modules of a kind.",
        "A bar for each kind and training",
        Table(
            ["", *by_kinds], [[kind, *(each[kind] for each in by_kinds.values())] for kind in kinds], "Ranks at 90 %"
        ),
    )


def pictures_of(spectra: Mapping[str, Mapping[str, Tensor]]) -> list[Picture]:
    """The mean of σ / σ₁ over a kind's modules."""
    drawn = []
    for kind in KINDS:
        curves: dict[str, list[float]] = {}
        for name, sigmas in spectra.items():
            mine = [s_K / s_K[0] for path, s_K in sigmas.items() if place(path)[1] == kind and s_K[0] > 0]
            if mine:
                curves[name] = torch.stack(mine).mean(0).tolist()
        if not curves:
            continue
        points = [at for at in POINTS if at <= max(map(len, curves.values()))]
        rows = [[at, *(c[at - 1] if at <= len(c) else None for c in curves.values())] for at in points]
        caption = f"{kind}: singular values relative to the largest, averaged over the modules."
        numbered = {name: (range(1, len(sigma_K) + 1), sigma_K) for name, sigma_K in curves.items()}
        svg = pictures.lines(numbered, x_label="index", y_label="σ / σ₁", log_x=True, log_y=True)
        drawn.append(Picture(svg, caption, "A curve for each training", Table(["index", *curves], rows, caption)))
    return drawn
