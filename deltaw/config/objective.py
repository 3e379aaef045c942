"""`objective:` of a run file: what a run minimises, and the numbers that it has.

Each kind has options of its own, with the defaults of its paper or of what is commonly run (beta: 0.1 is DPO's, IPO's
and KTO's; ORPO's λ is called beta, too; SimPO's are 2 and a margin of half of that). An option that a kind doesn't have
is refused by name. They are filled in when the section is read, so a run's config.yaml has the numbers that it used.

Preferences want a lower rate than supervised rows: they go on until the margin is as large as the adapter can make it,
and what they lose on the way is the likelihood of every answer. `train.lr`, where it isn't set, is `RATE` then: papers
have 5e-7 to 5e-6 for all of a model's weights, and LoRA wants some ten times that.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from deltaw.config.strict import PositiveFloat, Strict

Kind = Literal["sft", "dpo", "ipo", "orpo", "kto", "simpo"]
# What a row gives: an answer, two of which one is chosen, one with a label; any: two where there are, else one.
Shape = Literal["one", "pairs", "judged", "any"]
RATE = 5e-5
DEFAULTS: dict[str, dict[str, float]] = {
    "sft": {},
    "dpo": {"beta": 0.1, "sft_weight": 0.0},
    "ipo": {"beta": 0.1, "sft_weight": 0.0},
    "orpo": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0, "sft_weight": 0.0},
}
OPTIONS = tuple(dict.fromkeys(name for options in DEFAULTS.values() for name in options))
Weight = float | None


class ObjectiveConfig(Strict):
    """What is minimised: the loss of the rows (sft), or a loss of preferences, and its numbers."""

    section: ClassVar[str] = "objective"
    kind: Kind = Field("sft", description="sft, or of rows with a chosen and a rejected answer: dpo, ipo, orpo, simpo")
    beta: PositiveFloat | None = Field(None, le=1e3, description="how hard a preference pulls (ORPO's λ)")
    gamma: Weight = Field(None, ge=0, le=1e3, allow_inf_nan=False, description="simpo: the margin that is aimed at")
    sft_weight: Weight = Field(
        None, ge=0, le=1e3, allow_inf_nan=False, description="dpo, ipo, simpo: adds the loss of the chosen answers"
    )
    desirable_weight: Weight = Field(None, gt=0, le=1e3, allow_inf_nan=False, description="kto: of desirable answers")
    undesirable_weight: Weight = Field(None, gt=0, le=1e3, allow_inf_nan=False, description="kto: of the others")

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
        return self

    @property
    def options(self) -> dict[str, float]:
        """Those that the kind has."""
        return {name: getattr(self, name) for name in DEFAULTS[self.kind]}

    @property
    def is_preference(self) -> bool:
        return self.kind != "sft"

    @property
    def shape(self) -> Shape:
        """What the rows are to give."""
        return "one" if self.kind == "sft" else "judged" if self.kind == "kto" else "pairs"

    @property
    def lr(self) -> float | None:
        """Of a run whose `train.lr` isn't set; None leaves the usual one."""
        return RATE if self.is_preference else None

    def words(self) -> str:
        """A line for people."""
        numbers = ", ".join(f"{name} {value:g}" for name, value in self.options.items() if value or name == "beta")
        return f"{self.kind}, {numbers}" if numbers else self.kind
