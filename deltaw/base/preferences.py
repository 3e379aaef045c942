"""Objectives of preferences: DPO, IPO, ORPO, SimPO (pairs of answers) and KTO (single answers that were judged).

With s = Σ_t logp_t of an answer's labels, n how many there are, s⁰ the same under the reference, Δ = s − s⁰, and c, r
for the chosen and the rejected answer to one prompt:

    dpo     −log σ(β (Δ_c − Δ_r))                                    Rafailov et al. 2023, eq. 7
    ipo     (Δ_c / n_c − Δ_r / n_r − 1 / 2β)²                        Azar et al. 2023, eq. 17, by token
    simpo   −log σ(β (s_c / n_c − s_r / n_r) − γ)                    Meng et al. 2024, eq. 6
    orpo    −s_c / n_c − β log σ(odds(s_c / n_c) − odds(s_r / n_r))  Hong et al. 2024, eq. 6; odds(x) = x − log(1 − eˣ)
    kto     w (1 − σ(β (Δ − z)))   of a desirable answer             Ethayarajh et al. 2024, eq. 7
            w (1 − σ(β (z − Δ)))   of an undesirable one;            z = max(0, mean of Δ over mismatched answers)

summed over pairs (answers, for kto). ipo's authors confirmed the division by n, and so do others. `sft_weight` α adds
α (−s_c / n_c) to dpo, ipo and simpo: it holds the likelihood of the chosen answer up, which these only weigh against
the rejected one's (Pang et al. 2024). kto also takes pairs, each as a desirable and an undesirable answer.

z takes no gradient and is the same for a whole step (training/step.py): `with_anchor` sets it.

What a step reports, beside the loss. reward: β Δ (dpo, kto), β Δ / n (ipo), β s / n (orpo, simpo). margin: the mean of
reward_c − reward_r; accuracy: how often it is above 0 (kto: how often a desirable answer's Δ is above z, and an
undesirable one's below); likelier: how often s_c / n_c > s_r / n_r, whatever the reference says; logp_…: the mean of s.
Where the reference is known, chosen_change is the mean of Δ_c, and kl the mean over answers of e^δ − 1 − δ with
δ = Δ / n: never negative, in nats per token. It is an estimate, of answers that were drawn from neither model, and a
low one: the same of each token (Schulman's k3) is at least as large, since that function is convex.

Letters: D documents, P pairs, A answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.base.objective import Objective, sft
from deltaw.base.parts import CHOSEN, DESIRABLE, REJECTED, UNDESIRABLE
from deltaw.base.rewarded import Grpo
from deltaw.config import ObjectiveConfig
from deltaw.kernels.logprobs import Logprobs

GOOD, BAD = (CHOSEN, DESIRABLE), (REJECTED, UNDESIRABLE)


@dataclass(frozen=True)
class Answers:
    """The answers of one kind in a batch: s, n and s⁰ of each (zeros where the reference isn't known)."""

    sum_A: Tensor
    count_A: Tensor
    reference_A: Tensor

    @property
    def mean_A(self) -> Tensor:
        """Log-probability per token."""
        return self.sum_A / self.count_A

    @property
    def change_A(self) -> Tensor:
        """Δ: how much likelier than under the reference."""
        return self.sum_A - self.reference_A

    @property
    def mean_change_A(self) -> Tensor:
        return self.change_A / self.count_A


def answers_of(logprobs: Logprobs, batch: Batch, kinds: tuple[int, ...]) -> Answers:
    """Those documents of a batch that are of one of these kinds, in order."""
    sum_D, count_D = batch.by_document(logprobs.logp_K), batch.by_document(torch.ones_like(logprobs.logp_K))
    chosen = [d for d, part in enumerate(batch.parts) if part in kinds]
    index_A = torch.tensor(chosen, dtype=torch.int64, device=sum_D.device)
    reference_A = sum_D.new_tensor([batch.references[d] for d in chosen] if batch.references else [0.0] * len(chosen))
    return Answers(sum_D[index_A], count_D[index_A], reference_A)


def _kl(answers: Answers) -> Tensor:
    """Σ over answers of e^δ − 1 − δ."""
    delta_A = answers.mean_change_A
    return (torch.expm1(delta_A) - delta_A).sum()


@dataclass(frozen=True)
class _OfPairs(Objective):
    """A loss of the two answers to each prompt."""

    beta: float
    counts: ClassVar[str] = "pair"
    sums: ClassVar[tuple[str, ...]] = ("pairs", "margin", "accuracy", "likelier", "logp_chosen", "logp_rejected")

    def count(self, batch: Batch) -> int:
        return batch.parts.count(CHOSEN)

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        return self.losses(*self._both(logprobs, batch)).sum()

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """[P]"""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> Tensor:
        """[A]"""
        raise NotImplementedError

    def figures(self, logprobs: Logprobs, batch: Batch) -> dict[str, float]:
        chosen, rejected = self._both(logprobs, batch)
        margin_P = self.rewards(chosen) - self.rewards(rejected)
        likelier_P = chosen.mean_A > rejected.mean_A
        values = [margin_P.sum(), (margin_P > 0).sum(), likelier_P.sum(), chosen.sum_A.sum(), rejected.sum_A.sum()]
        if self.references:
            values += [chosen.change_A.sum(), (_kl(chosen) + _kl(rejected)) / 2]
        numbers = torch.stack([value.double() for value in values]).tolist()
        return dict(zip(self.sums, [float(len(margin_P)), *numbers], strict=True))

    def right(self, logprobs: Logprobs, batch: Batch) -> list[bool]:
        chosen, rejected = self._both(logprobs, batch)
        return (self.rewards(chosen) > self.rewards(rejected)).tolist()

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        pairs = sums.get("pairs", 0.0)
        return {name: sums[name] / pairs for name in self.sums if name != "pairs"} if pairs else {}

    def _both(self, logprobs: Logprobs, batch: Batch) -> tuple[Answers, Answers]:
        return answers_of(logprobs, batch, (CHOSEN,)), answers_of(logprobs, batch, (REJECTED,))


@dataclass(frozen=True)
class _AgainstReference(_OfPairs):
    sft_weight: float = 0.0
    references: ClassVar[bool] = True
    sums: ClassVar[tuple[str, ...]] = (*_OfPairs.sums, "chosen_change", "kl")


@dataclass(frozen=True)
class Dpo(_AgainstReference):
    """−log σ(β (Δ_c − Δ_r))"""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        loss_P = -F.logsigmoid(self.beta * (chosen.change_A - rejected.change_A))
        return loss_P - self.sft_weight * chosen.mean_A if self.sft_weight else loss_P

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.change_A


@dataclass(frozen=True)
class Ipo(_AgainstReference):
    """(Δ_c / n_c − Δ_r / n_r − 1 / 2β)²"""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        loss_P = (chosen.mean_change_A - rejected.mean_change_A - 1 / (2 * self.beta)) ** 2
        return loss_P - self.sft_weight * chosen.mean_A if self.sft_weight else loss_P

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean_change_A


@dataclass(frozen=True)
class SimPo(_OfPairs):
    """−log σ(β (s_c / n_c − s_r / n_r) − γ)"""

    gamma: float
    sft_weight: float = 0.0

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        loss_P = -F.logsigmoid(self.beta * (chosen.mean_A - rejected.mean_A) - self.gamma)
        return loss_P - self.sft_weight * chosen.mean_A if self.sft_weight else loss_P

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean_A


@dataclass(frozen=True)
class Orpo(_OfPairs):
    """−s_c / n_c − β log σ(odds_c − odds_r)"""

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -chosen.mean_A - self.beta * F.logsigmoid(log_odds(chosen.mean_A) - log_odds(rejected.mean_A))

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean_A


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) of a log-probability. At p = 1, where it has no value, that of the nearest number below 0."""
    below = logp.clamp_max(-torch.finfo(logp.dtype).eps)
    # log(1 − eˣ) keeps its digits as log(−expm1(x)) where x is near 0, and as log1p(−eˣ) where it is far from it
    near = below > -0.693
    return below - torch.where(near, (-torch.expm1(below)).log(), torch.log1p(-below.where(~near, -1.0).exp()))


@dataclass(frozen=True)
class Kto(Objective):
    """w (1 − σ(±β (Δ − z))) of each answer. `anchor`: z, of the step."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    anchor: float = 0.0
    counts: ClassVar[str] = "answer"
    references: ClassVar[bool] = True
    anchored: ClassVar[bool] = True
    sums: ClassVar[tuple[str, ...]] = (
        *("desirable", "undesirable", "right", "reward_desirable", "reward_undesirable"),
        *("logp_desirable", "logp_undesirable", "desirable_change", "kl", "anchor"),
    )

    def count(self, batch: Batch) -> int:
        return sum(part in (*GOOD, *BAD) for part in batch.parts)

    def with_anchor(self, anchor: float) -> "Kto":
        return replace(self, anchor=max(0.0, anchor))

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        good, bad = self._both(logprobs, batch)
        loss_good = (1 - torch.sigmoid(self.beta * (good.change_A - self.anchor))).sum()
        loss_bad = (1 - torch.sigmoid(self.beta * (self.anchor - bad.change_A))).sum()
        return self.desirable_weight * loss_good + self.undesirable_weight * loss_bad

    def figures(self, logprobs: Logprobs, batch: Batch) -> dict[str, float]:
        good, bad = self._both(logprobs, batch)
        values = [
            (good.change_A > self.anchor).sum() + (bad.change_A < self.anchor).sum(),
            *(self.beta * part.change_A.sum() for part in (good, bad)),
            *(part.sum_A.sum() for part in (good, bad)),
            good.change_A.sum(),
            _kl(good) + _kl(bad),
        ]
        counts = [float(len(part.sum_A)) for part in (good, bad)]
        numbers = torch.stack([value.double() for value in values]).tolist()
        return dict(zip(self.sums, [*counts, *numbers, self.anchor * sum(counts)], strict=True))

    def right(self, logprobs: Logprobs, batch: Batch) -> list[bool]:
        good, bad = self._both(logprobs, batch)
        return [*(good.change_A > self.anchor).tolist(), *(bad.change_A < self.anchor).tolist()]

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        good, bad = sums.get("desirable", 0.0), sums.get("undesirable", 0.0)
        if not good + bad:
            return {}
        means = {"accuracy": sums["right"] / (good + bad)}
        if good and bad:
            means["margin"] = sums["reward_desirable"] / good - sums["reward_undesirable"] / bad
        if good:
            means |= {"logp_chosen": sums["logp_desirable"] / good, "chosen_change": sums["desirable_change"] / good}
        if bad:
            means["logp_rejected"] = sums["logp_undesirable"] / bad
        return {**means, "kl": sums["kl"] / (good + bad), "anchor": sums["anchor"] / (good + bad)}

    def _both(self, logprobs: Logprobs, batch: Batch) -> tuple[Answers, Answers]:
        return answers_of(logprobs, batch, GOOD), answers_of(logprobs, batch, BAD)


def objective_of(config: ObjectiveConfig) -> Objective:
    """What a run file asks for."""
    if config.is_rewarded:
        return Grpo(**{name: config.options[name] for name in ("epsilon_low", "epsilon_high", "beta")})
    kinds = {"dpo": Dpo, "ipo": Ipo, "orpo": Orpo, "kto": Kto, "simpo": SimPo}
    return kinds[config.kind](**config.options) if config.is_preference else sft
