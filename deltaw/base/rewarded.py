"""The objective of rewards: GRPO with the defaults that the field settled on (Shao et al. 2024; DAPO, Yu et al. 2025).

To each prompt the model samples a group of G answers, of which a reward says how good each is. An answer's advantage
is what its reward is above the mean of its group, in units of the group's spread (or as it is, `scale: none`; Dr. GRPO,
Liu et al. 2025):

    A_i = (r_i − mean_g r) / (std_g r + ε)          std over G − 1, ε = 1e-4

and what is minimised, with ρ = exp(logp − logp at sampling) of each token t of answer i,

    L = − (1 / N) Σ_i Σ_t [ min(ρ A_i, clip(ρ, 1 − ε_low, 1 + ε_high) A_i) − β (e^δ − 1 − δ) ],    δ = logp_ref − logp

N counts the tokens of the whole step, so each token weighs the same in a short answer and in a long one (DAPO; dividing
each answer by its own length rewards long wrong ones). ε_high above ε_low lets unlikely tokens become likelier. Without
β no reference is asked: a policy that is held by its own samples needs no second tether, and few use one any more.

    ∂L/∂logp_t = − (1 / N) [ ρ A_i  where the min takes it (ρ A_i ≤ clip(ρ) A_i), else 0;  − β (1 − e^δ) ]

One engine samples and trains, and a rollout serves one update: then ρ is 1 but for rounding, nothing is clipped, and
the gradient is that of the policy itself. ρ, and the largest |logp − logp at sampling| of a step, are there to show it.

An answer whose advantage is 0 (all of its group have one reward) has no gradient without β. It counts in N, and isn't
passed at all (training/rollouts.py).

Letters: K labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deltaw.base.batch import Batch, Rewarded
from deltaw.base.objective import Objective
from deltaw.kernels.logprobs import Logprobs

SMALL = 1e-4  # beside a group's spread
ALIKE = 1e-8  # of rewards that are equal


def advantages(rewards_G: Sequence[float], *, scaled: bool) -> list[float]:
    """Of the answers of one group; zeros where all have the same reward."""
    array = np.asarray(rewards_G, np.float64)
    if np.ptp(array) <= ALIKE:
        return [0.0] * len(array)
    above: np.ndarray = array - array.mean()
    return (above / (array.std(ddof=1) + SMALL) if scaled else above).tolist()


@dataclass(frozen=True)
class Grpo(Objective):
    """−min(ρ A, clip(ρ) A) + β KL, by token."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    beta: float = 0.0
    sums: ClassVar[tuple[str, ...]] = ("passed", "clipped", "divergence")
    has_loss: ClassVar[bool] = False
    largest: ClassVar[tuple[str, ...]] = ("logp_difference",)

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        known, ratio_K = self._ratio(logprobs, batch)
        clipped_K = ratio_K.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        gain_K = torch.minimum(ratio_K * known.advantage_K, clipped_K * known.advantage_K)
        loss = -gain_K.sum()
        return loss + self.beta * self._divergence(logprobs, known).sum() if self.beta else loss

    def count(self, batch: Batch) -> int:
        assert batch.rewarded is not None
        return batch.rewarded.count

    def figures(self, logprobs: Logprobs, batch: Batch) -> dict[str, float]:
        known, ratio_K = self._ratio(logprobs, batch)
        above_K = (ratio_K > 1 + self.epsilon_high) & (known.advantage_K > 0)
        below_K = (ratio_K < 1 - self.epsilon_low) & (known.advantage_K < 0)
        difference_K = (logprobs.logp_K.detach() - known.sampled_K).abs()
        clipped = (above_K | below_K).sum().double()
        drift = self._divergence(logprobs, known).double().sum() if self.beta else torch.zeros_like(clipped)
        largest = difference_K.max().double() if len(difference_K) else torch.zeros_like(clipped)
        numbers = torch.stack([clipped, drift, largest]).tolist()  # at once: on a GPU each question waits for it
        return dict(
            zip(("passed", "clipped", "divergence", "logp_difference"), [float(len(ratio_K)), *numbers], strict=True)
        )

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        passed = sums.get("passed", 0.0)
        if not passed:
            return {}
        drift = {"kl": sums["divergence"] / passed} if self.beta else {}
        return {"clipped": sums["clipped"] / passed, **drift, "logp_difference": sums["logp_difference"]}

    def _ratio(self, logprobs: Logprobs, batch: Batch) -> tuple[Rewarded, Tensor]:
        known = batch.rewarded
        assert known is not None, "answers that nobody sampled have no advantage"
        return known, (logprobs.logp_K - known.sampled_K).exp()

    def _divergence(self, logprobs: Logprobs, known: Rewarded) -> Tensor:
        assert known.reference_K is not None, "beta wants what the reference says"
        delta_K = known.reference_K - logprobs.logp_K
        return torch.expm1(delta_K) - delta_K
