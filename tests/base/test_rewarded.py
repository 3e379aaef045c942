"""Rewards: the objective is its formula, in value and gradient, however its answers are laid out; and TRL's on the same
model and rollouts."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.base.batch import Batch, Rewarded
from deltaw.base.forward import plan_forward
from deltaw.base.rewarded import Grpo, advantages
from deltaw.config import RunConfig
from deltaw.generate.rollout import Sampled
from deltaw.kernels.logprobs import Logprobs
from deltaw.rewards.scored import Scored
from deltaw.training.groups import Group, laid
from tests.base.test_objective import adapted, assert_close

LENGTHS = (3, 5, 1, 4)  # tokens of the answers to one prompt


def groups(spread: float, *, prompt: int = 20) -> list[Group]:
    """Two prompts with four answers each, one of which was cut off; their log-probabilities at sampling are off by
    `spread` from some number."""
    draw = np.random.RandomState(3)
    made = []
    for number in range(2):
        answers = [
            Sampled(draw.randint(3, 90, n).tolist(), (-4.5 + spread * draw.randn(n)).tolist(), n == 5) for n in LENGTHS
        ]
        worth = [Scored(float(value)) for value in draw.rand(4)]
        made.append(Group(tuple(draw.randint(3, 90, prompt + number).tolist()), f"row {number}", answers, worth))
    return made


def config(**objective: Any) -> RunConfig:
    asked = {"kind": "grpo", "reward": "exact_match", "samples": 4, "prompts": 2, "max_new_tokens": 5, **objective}
    train = {"tokens_per_batch": 64}
    return RunConfig(base="base", data={"train": "rows.jsonl"}, objective=asked, train=train, output="run")  # type: ignore[arg-type]


def truth(objective: Grpo, logp: Tensor, sampled: Tensor, gain: Tensor, reference: Tensor | None) -> Tensor:
    """The formula, a token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for at in range(len(logp)):
        ratio = torch.exp(logp[at] - sampled[at])
        low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
        value = ratio.detach().item()
        held = ratio if low <= value <= high else torch.tensor(min(max(value, low), high), dtype=torch.float64)
        total = total - (ratio * gain[at] if ratio * gain[at] <= held * gain[at] else held * gain[at])
        if reference is not None:
            delta = reference[at] - logp[at]
            total = total + objective.beta * (torch.exp(delta) - delta - 1)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_value_and_gradient_are_the_formula(beta: float) -> None:
    draw, objective = torch.Generator().manual_seed(5), Grpo(0.2, 0.28, beta)
    logp, sampled, gain, reference = (torch.randn(40, generator=draw, dtype=torch.float64) for _ in range(4))
    logp, sampled = (-3 + 0.3 * logp).requires_grad_(), -3 + 0.3 * sampled
    reference = -3 + 0.3 * reference
    batch = Batch.of(torch.arange(41), [0, 41], torch.arange(1, 42).clamp_max(40))
    batch = replace(batch, rewarded=Rewarded(sampled, gain, 57, reference if beta else None))
    given = Logprobs(logp, -logp.sum())
    loss, wanted = objective(given, batch), truth(objective, logp, sampled, gain, reference if beta else None)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    gradient, exact = (torch.autograd.grad(value, logp)[0] for value in (loss, wanted))
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)
    clipped = gradient == 0 if not beta else torch.tensor([])
    assert objective.count(batch) == 57
    figures = objective.means(objective.figures(given, batch))
    assert figures["logp_difference"] == pytest.approx(float((logp - sampled).abs().max()))
    assert 0 < figures["clipped"] < 1
    if not beta:
        assert figures["clipped"] == pytest.approx(float(clipped.double().mean()))
    else:
        assert figures["kl"] > 0


def test_where_sampling_and_training_agree_it_is_the_policys_own_gradient() -> None:
    gain = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    batch = replace(
        Batch.of(torch.arange(4), [0, 4], torch.tensor([1, 2, 3, -100])), rewarded=Rewarded(logp.detach(), gain, 3)
    )
    (gradient,) = torch.autograd.grad(Grpo()(Logprobs(logp, -logp.sum()), batch), logp)
    torch.testing.assert_close(gradient, -gain)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=16), st.floats(0.01, 100), st.floats(-100, 100))
def test_advantages_sum_to_zero_and_know_neither_shift_nor_scale(
    rewards: list[float], scale: float, shift: float
) -> None:
    plain = advantages(rewards, scaled=True)
    assert sum(plain) == pytest.approx(0, abs=1e-6)
    if np.ptp(rewards) > 1 and np.ptp(rewards) * scale > 1:
        moved = advantages([scale * one + shift for one in rewards], scaled=True)
        assert moved == pytest.approx(plain, rel=0.02, abs=1e-3)  # but for the small number beside the spread
        order = np.argsort(rewards, kind="stable")
        assert (np.diff(np.array(plain)[order]) >= -1e-12).all()
    assert advantages([rewards[0]] * 3, scaled=False) == [0.0] * 3


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("masked", [True, False])
def test_shared_prompts_and_small_batches_change_nothing(beta: float, masked: bool) -> None:
    attached = adapted("llama")
    forward, made = plan_forward(attached.model), groups(0.3)
    made[1] = replace(made[1], scored=[Scored(0.5)] * 4)  # nothing to learn from, but its tokens count
    settings, objective = config(beta=beta, mask_truncated=masked), Grpo(0.2, 0.28, beta)
    losses, gradients = [], []
    for shares, capacity in ((True, 4096), (False, 4096), (True, 24), (False, 24)):
        sized = settings.model_copy(update={"train": settings.train.model_copy(update={"tokens_per_batch": capacity})})
        batches = laid(made, sized, shares=shares)
        if beta:
            known = [torch.full_like(one.rewarded.sampled_K, -5.0) for one in batches if one.rewarded]
            batches = [
                replace(one, rewarded=replace(one.rewarded, reference_K=k))
                for one, k in zip(batches, known, strict=True)  # type: ignore[type-var]
            ]
        assert len(batches) > 1 or capacity == 4096
        assert any(one.documents.tree is not None for one in batches) or not shares or capacity == 24
        count = sum(objective.count(one) for one in batches)
        assert count == 2 * (sum(LENGTHS) - 5 * masked)
        loss = sum(forward.loss(one, objective)[0] for one in batches) / count
        losses.append(float(loss))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, attached.parameters)]))
    for one, gradient in zip(losses, gradients, strict=True):
        assert one == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_step_that_teaches_nothing_says_why() -> None:
    flat = [replace(group, scored=[Scored(0.25)] * 4) for group in groups(0.0)]
    cut = [replace(group, answers=[replace_truncated(one) for one in group.answers]) for group in groups(0.0)]
    for made, word in ((flat, "0.25"), (cut, "cut off")):
        batches = laid(made, config(), shares=True)
        assert all(one.rewarded and word in one.rewarded.why and one.rewarded.fix for one in batches)
    assert all(one.rewarded and not one.rewarded.why for one in laid(groups(0.0), config(), shares=True))


def replace_truncated(answer: Sampled) -> Sampled:
    return Sampled(answer.tokens, answer.logprobs, truncated=True)


# TRL's own function, on the same model and the same answers. Its trainer is given what it reads of itself.


def trls(model: Any, made: list[Group], beta: float, reference: Tensor | None) -> Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    answers = [(group, answer) for group in made for answer in group.answers]
    longest, begin = max(len(answer.tokens) for _, answer in answers), max(len(group.prompt) for group in made)
    prompts = torch.zeros(len(answers), begin, dtype=torch.int64)
    completions = torch.zeros(len(answers), longest, dtype=torch.int64)
    old, prompt_mask, mask = (
        torch.zeros(len(answers), longest),
        torch.zeros_like(prompts),
        torch.zeros_like(completions),
    )
    for row, (group, answer) in enumerate(answers):
        prompts[row, begin - len(group.prompt) :] = torch.tensor(group.prompt)
        prompt_mask[row, begin - len(group.prompt) :] = 1
        completions[row, : len(answer.tokens)] = torch.tensor(answer.tokens)
        mask[row, : len(answer.tokens)] = int(not answer.truncated)
        old[row, : len(answer.tokens)] = torch.tensor(answer.logprobs)

    def logps(model: Any, ids: Tensor, attention: Tensor, keep: int, **_: Any) -> tuple[Tensor, Tensor, None]:
        positions = (attention.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits
        logp = logits[:, -keep - 1 : -1].log_softmax(-1).gather(2, ids[:, -keep:, None]).squeeze(2)
        return logp, torch.zeros_like(logp).detach(), None

    rewards = torch.tensor([group.rewards for group in made])
    gains = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    fake = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        loss_type="dapo",
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=logps,
    )
    inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completions, "completion_mask": mask}
    inputs |= {"advantages": gains.flatten(), "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    if reference is not None:
        inputs["ref_per_token_logps"] = reference
    # truncated answers are hidden from attention there, too, so their rows see what they see
    return GRPOTrainer._compute_loss(fake, model, inputs)  # type: ignore[no-any-return]


@pytest.mark.slow  # importing TRL takes some seconds
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradients_are_trls(beta: float) -> None:
    pytest.importorskip("trl")
    attached = adapted("llama")
    attached.model.float()
    made, objective = groups(0.3), Grpo(0.2, 0.28, beta)
    batches = laid(made, config(beta=beta), shares=True)
    if beta:
        batches = [
            replace(b, rewarded=replace(b.rewarded, reference_K=torch.full_like(b.rewarded.sampled_K, -5.0)))
            for b in batches
        ]  # type: ignore[type-var, union-attr]
    forward = plan_forward(attached.model)
    loss = sum(forward.loss(one, objective)[0] for one in batches) / sum(objective.count(one) for one in batches)
    theirs = trls(attached.model, made, beta, torch.full((8, 5), -5.0) if beta else None)
    assert math.isfinite(float(theirs)) and abs(float(theirs)) > 1e-3
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    # Of float32 sums in another order: 1.1e-5 of the largest was seen.
    assert_close(*(list(torch.autograd.grad(value, attached.parameters)) for value in (loss, theirs)), 3e-5)
