"""Groups of sampled answers, as the batches of a step.

    G answers to a prompt     their rewards, and advantages among themselves (base/rewarded.py)
    passed                    those that have something to teach: an advantage (or a β), and not cut off where these are
                              masked; N, by which the step divides, counts the tokens of all that aren't masked
    documents                 prompt without its last token | last token and answer | last token and answer | …
                              the last token's row is each answer's own, since its label is the answer's first token

Where the model can't share, or it doesn't pay (data/sharing.py), each answer is a document with its prompt. Groups
share shorter prompts than rows that merely begin alike do, since there are more that share them. Measured (CPU time of
one thread, SmolLM2-135M, forward and backward of 8 prompts with 8 answers each):

    tokens of prompt and answer      8 + 8     14 + 8    24 + 20
    computed of all                  68 %      52 %      55 %
    times as fast                    1.32      1.68      1.69
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev

import numpy as np
import torch

from deltaw.adapter.attach import Attached
from deltaw.base.batch import Batch, Rewarded
from deltaw.base.forward import Forward
from deltaw.base.rewarded import ALIKE, advantages
from deltaw.config import RunConfig
from deltaw.data.example import Example
from deltaw.data.sharing import WORTH, Node, Shared
from deltaw.generate.rollout import Sampled
from deltaw.rewards.scored import Scored

PART = "reward_"  # before the name of a part of the reward, in a record
SHORTEST = 4  # tokens of a prompt from which on its answers share it


@dataclass(frozen=True)
class Group:
    """A prompt and the answers to it, with what each is worth."""

    prompt: tuple[int, ...]
    origin: str
    answers: list[Sampled]
    scored: list[Scored] = field(default_factory=list)

    @property
    def rewards(self) -> list[float]:
        return [one.total for one in self.scored]

    @property
    def is_flat(self) -> bool:
        """Whether all answers have the same reward."""
        return max(self.rewards) - min(self.rewards) <= ALIKE


@dataclass(frozen=True)
class Taken:
    """An answer that a step passes: its example, its log-probabilities at sampling, its advantage."""

    example: Example
    logprobs: list[float]
    advantage: float


def figures(groups: Sequence[Group]) -> dict[str, float]:
    """What a record says of a step's answers. `entropy`: the mean of −logp over all tokens that were sampled, which
    estimates that of the sampling distribution, per token."""
    answers = [answer for group in groups for answer in group.answers]
    scored = [one for group in groups for one in group.scored]
    rewards = [one.total for one in scored]
    parts = dict.fromkeys(name for one in scored for name in one.parts)
    logprobs = [logp for answer in answers for logp in answer.logprobs]
    several = (
        {} if len(parts) < 2 else {PART + name: fmean(one.parts.get(name, 0.0) for one in scored) for name in parts}
    )
    return {
        "reward": fmean(rewards),
        "reward_spread": pstdev(rewards),
        **several,
        "flat_groups": fmean(group.is_flat for group in groups),
        "entropy": -fmean(logprobs),
        "answer_tokens": fmean(len(answer.tokens) for answer in answers),
        "truncated": fmean(answer.truncated for answer in answers),
    }


def laid(groups: Sequence[Group], config: RunConfig, *, shares: bool, ranks: int = 1) -> list[Batch]:
    """The batches of a step's answers, with all that their objective wants but the reference. Where nothing can be
    learnt from them they say why."""
    taken, counted = taken_of(groups, config)
    why, fix = _why_not(groups, taken, config)
    if why:  # the watchdog names the rows; nothing is passed
        taken = [[Taken(_example(group, one), one.logprobs, 0.0) for one in group.answers[:1]] for group in groups]
        counted = 0
    every = [one for group in taken for one in group]
    parts = cut(taken, config.train.batch_tokens, shares=shares, ranks=ranks)
    known = [_known([every[number] for number in part.numbers], why, fix) for part in parts]
    others = counted - sum(one.count for one in known)  # tokens of answers that count, but aren't passed
    known[0] = replace(known[0], count=known[0].count + max(0, others))
    return [replace(part.pack(), rewarded=one) for part, one in zip(parts, known, strict=True)]


def taken_of(groups: Sequence[Group], config: RunConfig) -> tuple[list[list[Taken]], int]:
    """By group the answers that are passed, and how many tokens count."""
    objective, counted, taken = config.objective, 0, list[list[Taken]]()
    for group in groups:
        of_group = advantages(group.rewards, scaled=objective.scale == "group")
        pairs = zip(group.answers, of_group, strict=True)
        counting = [(one, a) for one, a in pairs if not (objective.mask_truncated and one.truncated)]
        counted += sum(len(answer.tokens) for answer, _ in counting)
        passed = [(one, a) for one, a in counting if a or objective.beta]
        taken.append([Taken(_example(group, one), one.logprobs, a) for one, a in passed])
    return taken, counted


def cut(taken: Sequence[Sequence[Taken]], capacity: int, *, shares: bool, ranks: int = 1) -> list[Shared]:
    """The answers, numbered through, as batches of up to `capacity` tokens. A group's prompt without its last token is
    a document that its answers continue, where that saves enough."""
    examples = [one.example for group in taken for one in group]
    nodes = [Node(_prompt_of(group[0]) - 1) if len(group) > 1 else Node(0) for group in taken]
    chains: list[tuple[Node, ...]]
    chains = [
        (node,) if node.depth >= SHORTEST else () for node, group in zip(nodes, taken, strict=True) for _ in group
    ]
    numbers, begins = list(range(len(examples))), [True] * len(examples)
    shared = Shared(examples, chains, numbers, begins)
    whole = sum(len(example.tokens) for example in examples)
    if not shares or whole - sum(shared.costs()) < WORTH * whole:
        shared = Shared(examples, [()] * len(examples), numbers, begins)
    return shared.batches(capacity, ranks)


def _why_not(groups: Sequence[Group], taken: Sequence[Sequence[Taken]], config: RunConfig) -> tuple[str, str]:
    """Why nothing can be learnt from a step, and what to do; empty where something can."""
    if any(one.advantage for group in taken for one in group):
        return "", ""
    _, samples, longest = config.objective.group
    if all(answer.truncated for group in groups for answer in group.answers) and config.objective.mask_truncated:
        why = f"every answer was cut off at {longest:,} tokens, and those teach nothing (objective.mask_truncated)"
        return (
            why,
            "set objective.max_new_tokens higher, or begin with an adapter that has learnt to end (adapter.from)",
        )
    rewards = sorted({round(group.rewards[0], 4) for group in groups if group.is_flat})
    some = ", ".join(f"{reward:g}" for reward in rewards[:3]) + (", …" if len(rewards) > 3 else "")
    why = f"all {samples} answers to each prompt have the same reward ({some}), so none is better than another"
    fix = "take harder or easier prompts, reward parts of an answer, or train on examples first (adapter.from)"
    return why, fix


def _example(group: Group, answer: Sampled) -> Example:
    tokens = np.array([*group.prompt, *answer.tokens], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(group.prompt), group.origin)


def _prompt_of(one: Taken) -> int:
    """The tokens of the prompt."""
    return len(one.example.tokens) - len(one.logprobs)


def _known(taken: Sequence[Taken], why: str, fix: str) -> Rewarded:
    logprobs = torch.tensor([logp for one in taken for logp in one.logprobs])
    advantage = torch.tensor([one.advantage for one in taken for _ in one.logprobs])
    return Rewarded(logprobs, advantage, len(logprobs), why=why, fix=fix)


@torch.no_grad()
def with_reference(batch: Batch, forward: Forward, attached: Attached | None) -> Batch:
    """The batch with what the base, with the adapter off, says of its labels."""
    assert batch.rewarded is not None
    device = next(forward.model.parameters()).device
    with nullcontext() if attached is None else attached.disabled():
        logp_K = forward.logprobs(batch.to(device)).cpu()
    return replace(batch, rewarded=replace(batch.rewarded, reference_K=logp_K))
