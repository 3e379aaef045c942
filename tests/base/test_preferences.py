"""Preferences: each objective is its paper's formula, in value and gradient, and TRL's on the same model and rows."""

import math
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.objective import Objective
from deltaw.base.parts import CHOSEN, DESIRABLE, PLAIN, REJECTED, UNDESIRABLE
from deltaw.base.preferences import Dpo, Ipo, Kto, Orpo, SimPo, log_odds, objective_of
from deltaw.config import ObjectiveConfig
from deltaw.kernels.logprobs import IGNORE, Logprobs
from tests.base.test_objective import adapted, assert_close

LENGTHS = (
    7,
    5,
    7,
    9,
    7,
    4,
)  # chosen, rejected, chosen, …: chosen ones alike, since TRL's ORPO averages over all tokens
PAIRS = (CHOSEN, REJECTED) * 3
JUDGED = (DESIRABLE, UNDESIRABLE, UNDESIRABLE, DESIRABLE, DESIRABLE, UNDESIRABLE)
REFERENCES = (-19.0, -16.5, -22.0, -31.0, -20.0, -14.0)
KINDS: dict[str, Objective] = {
    "dpo": Dpo(0.1),
    "ipo": Ipo(0.1),
    "orpo": Orpo(0.1),
    "simpo": SimPo(2.0, 1.0),
    "kto": Kto(0.1, 1.0, 0.7, anchor=0.4),
}


def batch(parts: tuple[int, ...], references: tuple[float, ...] = REFERENCES) -> Batch:
    """Documents of one token of prompt, all of whose other tokens are the answer."""
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
    tokens_T = torch.randint(3, 90, (starts[-1],), generator=torch.Generator().manual_seed(1))
    labels_T = tokens_T.roll(-1)
    labels_T[torch.tensor(starts[1:]) - 1] = IGNORE
    return Batch.of(tokens_T, starts, labels_T, parts=parts, references=references)


def of(kind: str) -> Batch:
    return batch(JUDGED if kind == "kto" else PAIRS)


def plain(kind: str, sums: list[Tensor], counts: list[int]) -> Tensor:
    """The papers' formulas, one answer at a time."""
    change = [s - r for s, r in zip(sums, REFERENCES, strict=True)]
    mean = [s / n for s, n in zip(sums, counts, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for c, r in ((0, 1), (2, 3), (4, 5)) if kind != "kto" else ():
        odds = [torch.exp(mean[a]) / (1 - torch.exp(mean[a])) for a in (c, r)]
        total = (
            total
            + {
                "dpo": lambda c=c, r=r: -torch.log(1 / (1 + torch.exp(-0.1 * (change[c] - change[r])))),
                "ipo": lambda c=c, r=r: (change[c] / counts[c] - change[r] / counts[r] - 5.0) ** 2,
                "simpo": lambda c=c, r=r: -torch.log(torch.sigmoid(2 * (mean[c] - mean[r]) - 1)),
                "orpo": lambda c=c, odds=odds: -mean[c] - 0.1 * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1]))),
            }[kind]()
        )
    for answer, part in enumerate(JUDGED if kind == "kto" else ()):
        sign, weight = (1, 1.0) if part == DESIRABLE else (-1, 0.7)
        total = total + weight * (1 - torch.sigmoid(sign * 0.1 * (change[answer] - 0.4)))
    return total


def leaf(seed: int = 2) -> Tensor:
    drawn = torch.rand(sum(LENGTHS) - len(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (-4 * drawn - 0.05).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_papers(kind: str) -> None:
    given, objective, logp_K = of(kind), KINDS[kind], leaf()
    loss = objective(Logprobs(logp_K, -logp_K.sum()), given)
    counts = [n - 1 for n in LENGTHS]
    truth = plain(kind, [part.sum() for part in logp_K.split(counts)], counts)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    gradient, wanted = (torch.autograd.grad(value, logp_K)[0] for value in (loss, truth))
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    step = 1e-6
    for k in (0, 8, 20, 32):  # and by finite differences
        moved = [logp_K.detach() + step * sign * (torch.arange(len(logp_K)) == k) for sign in (1, -1)]
        up, down = (float(objective(Logprobs(one, -one.sum()), given)) for one in moved)
        assert (up - down) / (2 * step) == pytest.approx(float(gradient[k]), rel=1e-5, abs=1e-8)
    assert objective.count(given) == (6 if kind == "kto" else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_other_learners_documents_and_two_batches_change_nothing(kind: str) -> None:
    given, objective, logp_K = of(kind), KINDS[kind], leaf()
    whole = objective(Logprobs(logp_K, -logp_K.sum()), given)
    mixed = Batch.of(
        torch.cat([given.tokens_T, torch.arange(3, 9)]),
        [*given.starts, given.starts[-1] + 6],
        torch.cat([given.labels_T, torch.arange(4, 10)]),
        parts=(*given.parts, CHOSEN),
        references=(*given.references, 3.0),
        updates=(2,) * 6 + (5,),
        origins=tuple("abcdefg"),
    ).labelled_for(2)
    assert mixed.parts == (*given.parts, PLAIN)
    assert objective.count(mixed) == objective.count(given)
    torch.testing.assert_close(objective(Logprobs(logp_K, -logp_K.sum()), mixed), whole)
    sums = objective.figures(Logprobs(logp_K, -logp_K.sum()), mixed)
    assert set(sums) == set(objective.sums) and all(map(math.isfinite, objective.means(sums).values()))
    assert sum(objective.right(Logprobs(logp_K, -logp_K.sum()), mixed)) == round(
        objective.means(sums)["accuracy"] * objective.count(mixed)
    )


@given(st.floats(-1e4, 0.0))
def test_log_odds_are_finite_and_rise(logp: float) -> None:
    value = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    odds = log_odds(value)
    odds.backward()
    assert odds.isfinite() and value.grad is not None and value.grad.isfinite() and value.grad >= 0
    if -30 < logp < -1e-6:
        assert float(odds.detach()) == pytest.approx(logp - math.log(-math.expm1(logp)), rel=1e-9, abs=1e-9)


def test_extremes_stay_finite() -> None:
    for kind, objective in KINDS.items():
        for size in (-1e4, -1e-7):
            logp_K = torch.full((sum(LENGTHS) - 6,), size, requires_grad=True)
            loss = objective(Logprobs(logp_K, -logp_K.sum()), of(kind))
            loss.backward()
            assert loss.isfinite() and logp_K.grad is not None and logp_K.grad.isfinite().all()


def test_kto_is_anchored_at_zero_or_above() -> None:
    objective = objective_of(ObjectiveConfig(kind="kto"))
    assert objective.anchored and isinstance(objective, Kto)
    assert objective.with_anchor(-3.0) == Kto(0.1) and objective.with_anchor(2.5) == Kto(0.1, anchor=2.5)


# TRL's own functions, on the same model. Its trainers are given what they read of themselves and nothing else.


class Logits:
    """A model as TRL calls it: padded rows in, log-probabilities (and what it logs beside them) out."""

    training = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        wanted = labels[:, 1:]
        logp = logits[:, :-1].log_softmax(-1).gather(2, wanted.clamp_min(0)[..., None]).squeeze(2)
        logp = logp.masked_fill(wanted == IGNORE, 0.0)
        nothing = torch.zeros_like(logp).detach()
        return SimpleNamespace(
            log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), logits=logits
        )


def padded(given: Batch, order: list[int]) -> dict[str, Tensor]:
    rows = [given.tokens_T[a:b] for a, b in pairwise(given.starts)]
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(rows[d], (0, longest - len(rows[d]))) for d in order])
    mask = torch.stack([(torch.arange(longest) < len(rows[d])).long() for d in order])
    answer = mask.clone()
    answer[:, 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answer}


def trls(kind: str, model: Any, given: Batch) -> Tensor:
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    fake: dict[str, Any] = {
        "model": SimpleNamespace(training=True),
        "accelerator": same,
        "aux_loss_enabled": False,
        "beta": 0.1,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": True,
    }
    references = torch.tensor(given.references)
    if kind in ("dpo", "ipo"):
        from trl.trainer.dpo_trainer import DPOTrainer

        fake |= {"ld_alpha": None, "f_divergence_type": "reverse_kl", "loss_weights": [1.0], "use_weighting": False}
        fake["loss_types"] = ["sigmoid" if kind == "dpo" else "ipo"]
        inputs = padded(given, [0, 2, 4, 1, 3, 5])
        inputs |= {"ref_chosen_logps": references[0::2], "ref_rejected_logps": references[1::2]}
        return DPOTrainer._compute_loss(SimpleNamespace(**fake), Logits(model), inputs, return_outputs=False)
    if kind == "kto":
        from trl.trainer.kto_trainer import KTOTrainer

        fake |= {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 0.7, "calculate_KL": True}
        fake["_compute_kl_logps"] = lambda model, batch: torch.full((6,), 0.4)  # what gives the anchor of 0.4
        inputs = padded(given, list(range(6)))
        inputs |= {"label": torch.tensor([part == DESIRABLE for part in JUDGED]), "ref_logps": references}
        inputs["ref_KL_logps"] = torch.zeros(6)
        return KTOTrainer._compute_loss(SimpleNamespace(**fake), Logits(model), inputs, return_outputs=False)
    inputs = padded(given, [0, 2, 4, 1, 3, 5])
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
    logits = Logits(model)(inputs["input_ids"], inputs["attention_mask"], labels).logits
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = ORPOTrainer if kind == "orpo" else CPOTrainer
    logp = trainer.get_batch_logps(logits, labels, average_log_prob=True)
    nll = F.cross_entropy(logits[:3, :-1].flatten(0, 1), labels[:3, 1:].flatten())
    passed = logp[:3], logp[3:], logits[:3], logits[3:], nll
    fake["concatenated_forward"] = lambda model, batch: passed
    if kind == "orpo":
        fake["odds_ratio_loss"] = lambda *logps: ORPOTrainer.odds_ratio_loss(SimpleNamespace(**fake), *logps)
        return ORPOTrainer.get_batch_loss_metrics(SimpleNamespace(**fake), None, {}, "train")[0]
    fake |= {"beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo", "label_smoothing": 0.0, "cpo_alpha": 0.0}
    fake["alpha"] = 0.0
    fake["cpo_loss"] = lambda *logps: CPOTrainer.cpo_loss(SimpleNamespace(**fake), *logps)
    return CPOTrainer.get_batch_loss_metrics(SimpleNamespace(**fake), None, {}, "train")[0]


@pytest.mark.slow  # importing TRL takes some seconds
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_trls(kind: str) -> None:
    pytest.importorskip("trl")
    attached = adapted("llama")
    attached.model.float()
    given, objective = of(kind), KINDS[kind]
    loss, count = plan_forward(attached.model).loss(given, objective)
    theirs = trls(kind, attached.model, given)
    torch.testing.assert_close(loss / count, theirs, rtol=1e-5, atol=1e-5)
    assert_close(*(list(torch.autograd.grad(value, attached.parameters)) for value in (loss / count, theirs)), 1e-5)
