"""`objective:` of a run file: what a run minimises, and the numbers that it has.

Each kind has options of its own, with the defaults of its paper or of what is commonly run (beta: 0.1 is DPO's, IPO's
and KTO's; ORPO's λ is called beta, too; SimPO's are 2 and a margin of half of that). An option that a kind doesn't have
is refused by name. They are filled in when the section is read, so a run's config.yaml has the numbers that it used.

Preferences want a lower rate than supervised rows: they go on until the margin is as large as the adapter can make it,
and what they lose on the way is the likelihood of every answer. `train.lr`, where it isn't set, is `RATE` then: papers
have 5e-7 to 5e-6 for all of a model's weights, and LoRA wants some ten times that. So do rewards.

Rewards (grpo) have no step of so many tokens, but of so many prompts, each with a group of sampled answers: what these
may cost is `prompts · samples · max_new_tokens` tokens. The other numbers are what the field has settled on
(base/rewarded.py). Rejected: several updates per rollout (the second one is off the policy that sampled, and a run that
stops between them would have to keep the rollout), top-p and top-k while sampling (the log-probabilities that are
trained would be of another distribution than the one that was sampled from), a reward model (a function may ask one).
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from deltaw.config.reward import Rewards
from deltaw.config.strict import Count, PositiveFloat, Strict

Kind = Literal["sft", "dpo", "ipo", "orpo", "kto", "simpo", "grpo"]
# What a row gives: an answer, two of which one is chosen, one with a label; any: two where there are, else one; a
# prompt, whatever it has as its answer.
Shape = Literal["one", "pairs", "judged", "any", "prompts"]
RATE = 5e-5
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"beta": 0.1, "sft_weight": 0.0},
    "ipo": {"beta": 0.1, "sft_weight": 0.0},
    "orpo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0, "sft_weight": 0.0},
    "grpo": {
        "reward": None,
        "samples": 8,
        "prompts": 16,
        "max_new_tokens": 128,
        "temperature": 1.0,
        "scale": "group",
        "mask_truncated": True,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
    },
}
OPTIONS = tuple(dict.fromkeys(name for options in DEFAULTS.values() for name in options))
Weight = float | None


class ObjectiveConfig(Strict):
    """What is minimised: the loss of the rows (sft), a loss of preferences, or minus a reward; and its numbers."""

    section: ClassVar[str] = "objective"
    kind: Kind = Field(
        "sft", description="sft; of rows with a chosen and a rejected answer: dpo, ipo, orpo, simpo; of a reward: grpo"
    )
    beta: Weight = Field(
        None,
        ge=0,
        le=1e3,
        allow_inf_nan=False,
        description="how hard a preference pulls (ORPO's λ); grpo: of the KL from the reference",
    )
    gamma: Weight = Field(None, ge=0, le=1e3, allow_inf_nan=False, description="simpo: the margin that is aimed at")
    sft_weight: Weight = Field(
        None, ge=0, le=1e3, allow_inf_nan=False, description="dpo, ipo, simpo: adds the loss of the chosen answers"
    )
    desirable_weight: Weight = Field(None, gt=0, le=1e3, allow_inf_nan=False, description="kto: of desirable answers")
    undesirable_weight: Weight = Field(None, gt=0, le=1e3, allow_inf_nan=False, description="kto: of the others")
    reward: Rewards | None = Field(
        None, description="grpo: what says how good an answer is: file.py:function, or a verifier"
    )
    samples: int | None = Field(None, ge=2, le=4096, description="grpo: answers that are sampled to each prompt")
    prompts: Count | None = Field(None, description="grpo: prompts per step")
    max_new_tokens: Count | None = Field(None, description="grpo: the most tokens of an answer")
    temperature: PositiveFloat | None = Field(None, le=100, description="grpo: of the sampling")
    scale: Literal["group", "none"] | None = Field(
        None, description="grpo: whether advantages are divided by the spread of their group"
    )
    mask_truncated: bool | None = Field(None, description="grpo: whether answers that were cut off teach nothing")
    epsilon_low: Weight = Field(
        None, gt=0, lt=1, description="grpo: a token's probability ratio is clipped at 1 − this"
    )
    epsilon_high: Weight = Field(None, gt=0, le=1e3, allow_inf_nan=False, description="grpo: and at 1 + this")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, value: Any) -> Any:
        """With the kind's own defaults; a word alone is a kind."""
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        kind = value.get("kind", "sft")
        own = DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
        return {**value, **{name: number for name, number in own.items() if value.get(name) is None}}

    @model_validator(mode="after")
    def _has_its_own(self) -> Self:
        own = DEFAULTS[self.kind]
        if wrong := [name for name in OPTIONS if name not in own and getattr(self, name) is not None]:
            whose = {name: [kind for kind, options in DEFAULTS.items() if name in options] for name in wrong}
            words = "; ".join(f"{name} is an option of {', '.join(kinds)}" for name, kinds in whose.items())
            has = f"has {', '.join(own)}" if own else "has none"
            raise ValueError(f"{words}, and {self.kind} {has}: leave it out")
        if self.is_preference and not self.beta:
            raise ValueError(f"beta is 0, and {self.kind} needs one above it: {DEFAULTS[self.kind]['beta']} is usual")
        if self.is_rewarded and self.reward is None:
            raise ValueError("grpo wants a reward: a function (reward: judge.py:score), or a verifier by its name")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Those that the kind has."""
        return {name: getattr(self, name) for name in DEFAULTS[self.kind]}

    def located(self, folder: Path) -> Self:
        """With whole paths of the files that its rewards name: in `folder`, else where deltaw was started."""
        if self.reward is None:
            return self
        return self.model_copy(update={"reward": tuple(one.located(folder) for one in self.reward)})

    @property
    def is_preference(self) -> bool:
        return self.kind not in ("sft", "grpo")

    @property
    def is_rewarded(self) -> bool:
        return self.kind == "grpo"

    @property
    def shape(self) -> Shape:
        """What the rows are to give."""
        shapes: dict[str, Shape] = {"sft": "one", "kto": "judged", "grpo": "prompts"}
        return shapes.get(self.kind, "pairs")

    @property
    def lr(self) -> float | None:
        """Of a run whose `train.lr` isn't set; None leaves the usual one."""
        return None if self.kind == "sft" else RATE

    @property
    def group(self) -> tuple[int, int, int]:
        """grpo: prompts per step, answers to each, and the most tokens of one."""
        assert self.prompts and self.samples and self.max_new_tokens, "only rewards have groups"
        return self.prompts, self.samples, self.max_new_tokens

    def words(self) -> str:
        """A line for people."""
        if self.is_rewarded:
            prompts, samples, tokens = self.group
            tether = f", beta {self.beta:g}" if self.beta else ""
            return f"{self.kind}, {prompts:,} prompts x {samples} answers of up to {tokens:,} tokens per step{tether}"
        numbers = ", ".join(f"{name} {value:g}" for name, value in self.options.items() if value or name == "beta")
        return f"{self.kind}, {numbers}" if numbers else self.kind
