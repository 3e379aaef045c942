"""Whether two sides answer alike: what was measured, what is allowed, and why they don't, if they don't.

The tolerance has three parts, each measured on the positions that are compared:

    rounding    two correct sides differ by rounding; noise.py measures by how much, in a few draws. Allowed are
                KL_FACTOR times their mean KL and FACTOR times their largest difference. On SmolLM2 with a rank-16
                adapter, llama.cpp was 1.1 times the mean draw away, a wrong permutation 90 times, a single dropped
                module of the last layer 14 times (docs/log.md)
    effect      rounding may be so coarse that everything passes. So the difference may be at most SHARE of what
                the adapter itself changes, KL(adapted ‖ base) on the same positions
    strength    t, how far the other side has moved back to the base along what the adapter changes: 0 for a correct
                side, 1 for one without the adapter. It is the least squares of log B − log A on log base − log A, both
                centred, each token weighted by the mean of A's and the base's probability. Rounding has no direction,
                so |t| stays small under any type; a lost scale moves it to 0.2 and more. STRENGTH is allowed

If neither side runs here, nothing can be measured, and the tolerance is ASSUMED from the formats alone: 16 times what
was measured on SmolLM2, where KL is 30 ε² for errors of relative size ε. The verdict then says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from deltaw.shipping.verify.alike import Distance, Parting, distance, odds_moved
from deltaw.shipping.verify.sides.formats import described, exact, rms
from deltaw.shipping.verify.sides.side import Logs, Numbers
from deltaw.show.text import percent

KL_FACTOR, FACTOR = 6.0, 2.5
SHARE, STRENGTH = 0.25, 0.15
NO_EFFECT = 1e-6  # nats: an adapter that changes less changes nothing here
FLOOR = (1e-6, 1e-3)  # KL and single differences that a server's float32 log-probabilities leave
ASSUMED = (400.0, 700.0, 360.0)  # allowed KL / ε², largest / ε, gap / ε


@dataclass(frozen=True)
class Tolerance:
    """What is allowed: KL in nats per position, the largest difference of a log-probability, the gap of a near tie.
    `draws`: the KL of each draw of rounding, empty if it was assumed."""

    kl: float
    largest: float
    gap: float
    draws: tuple[float, ...]
    why: str

    @property
    def measured(self) -> bool:
        return bool(self.draws)


@dataclass(frozen=True)
class Effect:
    """What the adapter changes: KL(adapted ‖ base), the difference's share of it, and t (top of this file)."""

    kl: float
    share: float
    strength: float


@dataclass(frozen=True)
class Compared:
    """One prompt: what was asked, what each side answered, where their prompts and answers part. `near_tie`: whether
    rounding explains it."""

    origin: str
    prompt: str
    a: str
    b: str
    same_prompt: bool | None
    prompt_parting: str = ""
    parting: Parting | None = None
    near_tie: bool = False
    parting_words: str = ""

    @property
    def differs(self) -> bool:
        return self.parting is not None and not self.near_tie


@dataclass(frozen=True)
class Verification:
    """The verdict on two sides, and what it rests on. `kl` and `largest` are None without log-probabilities."""

    a: str
    b: str
    numbers: tuple[Numbers, Numbers]
    rows: list[Compared]
    positions: int
    kl: float | None
    largest: float | None
    tolerance: Tolerance
    effect: Effect | None
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agree(self) -> bool:
        return not self.reasons

    def count(self, what: str) -> int:
        """How many rows have "same", "near tie" or "different" answers, or, for "prompt", prompts that differ."""
        kinds = {
            "same": lambda row: row.parting is None,
            "near tie": lambda row: row.parting is not None and row.near_tie,
            "different": lambda row: row.differs,
            "prompt": lambda row: row.same_prompt is False,
        }
        return sum(map(kinds[what], self.rows))

    def to_json(self) -> dict[str, Any]:
        """The whole verification as plain values."""
        return {
            "agree": self.agree,
            "a": self.a,
            "b": self.b,
            "reasons": self.reasons,
            "notes": self.notes,
            "prompts": len(self.rows),
            "prompts_different": self.count("prompt"),
            "prompts_unknown": sum(row.same_prompt is None for row in self.rows),
            "answers_same": self.count("same"),
            "answers_near_tie": self.count("near tie"),
            "answers_different": self.count("different"),
            "positions": self.positions,
            "kl": self.kl,
            "largest_difference": self.largest,
            "tolerance": {**asdict(self.tolerance), "measured": self.tolerance.measured},
            "adapter_effect": asdict(self.effect) if self.effect else None,
            "numbers": [asdict(numbers) for numbers in self.numbers],
            "rows": [asdict(row) for row in self.rows],
        }

    def text(self) -> str:
        """The verdict and its reasons, in a few lines."""
        total = len(self.rows)
        lines = [f"{'AGREE' if self.agree else 'DIFFERENT'}: {self.a}  and  {self.b}"]
        lines += [f"  {'because' if n == 0 else '    and'} {reason}" for n, reason in enumerate(self.reasons)]
        unknown = sum(row.same_prompt is None for row in self.rows)
        prompts = f"{total - self.count('prompt') - unknown} of {total} with the same token ids"
        lines.append(f"prompts    {prompts}" + (f", for {unknown} one side gives no ids" if unknown else ""))
        ties = self.count("near tie")
        lines.append(
            f"answers    {self.count('same')} of {total} the same"
            + (f", {ties} part at a near tie, which rounding decides" if ties else "")
            + (f", {self.count('different')} different" if self.count("different") else "")
        )
        if self.kl is not None and self.largest is not None:
            allowed = self.tolerance
            lines.append(
                f"numbers    KL {self.kl:.2g} nats per token at {self.positions} positions, allowed {allowed.kl:.2g}; "
                f"largest difference of a log-probability {self.largest:.2g}, allowed {allowed.largest:.2g}"
            )
        if self.effect and self.kl is not None:
            lines.append(
                f"adapter    it changes {self.effect.kl:.2g} nats per token; the difference is "
                f"{_percent(self.effect.share)} of that, and {percent(1 - self.effect.strength)} of it is carried over"
            )
        lines.append(f"tolerance  {self.tolerance.why}")
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join(lines)


def measured(
    sides: Sequence[Numbers], clean: Sequence[Logs], draws: Sequence[Sequence[Logs]], ids: Sequence[torch.Tensor | None]
) -> Tolerance:
    """The tolerance from draws of rounding errors on the same rows, over the tokens `ids` that are compared."""
    apart = [
        Distance.joined([distance(a, b, chosen) for a, b, chosen in zip(clean, draw, ids, strict=True)])
        for draw in draws
    ]
    moved = max(float(odds_moved(a, b).max()) for draw in draws for a, b in zip(clean, draw, strict=True))
    kls = tuple(one.kl for one in apart)
    why = (
        f"rounding errors of {_formats(sides)} put into the model {len(draws)} times moved it by KL {min(kls):.2g} to "
        f"{max(kls):.2g}; allowed: {KL_FACTOR:g} times their mean, and {FACTOR:g} times the largest single difference"
    )
    kl, largest, gap = KL_FACTOR * sum(kls) / len(kls), FACTOR * max(one.largest for one in apart), FACTOR * moved
    if any(chosen is not None for chosen in ids):
        kl, largest, gap = max(kl, FLOOR[0]), max(largest, FLOOR[1]), max(gap, FLOOR[1])
    return Tolerance(kl, largest, gap, kls, why)


def assumed(sides: Sequence[Numbers]) -> Tolerance:
    """The tolerance where no side's model runs here."""
    names = [name for side in sides for name in (side.weights, *side.activations)]
    size = sum(rms(name) ** 2 for name in names) ** 0.5
    kl = max(ASSUMED[0] * size**2, FLOOR[0])
    largest, gap = (max(factor * size, FLOOR[1]) for factor in ASSUMED[1:])
    what = _formats(sides)
    return Tolerance(kl, largest, gap, (), f"neither side runs here, so the effect of rounding is assumed for {what}")


def effect_of(a: Sequence[Logs], b: Sequence[Logs], base: Sequence[Logs], kl: float) -> Effect:
    """`a` with the adapter, `base` without, `b` the other side."""
    own = Distance.joined([distance(x, y) for x, y in zip(a, base, strict=True)]).kl
    return Effect(own, kl / own if own > 0 else 0.0, strength(a, b, base))


def strength(a: Sequence[Logs], b: Sequence[Logs], base: Sequence[Logs]) -> float:
    """t (top of this file)."""
    above, below = 0.0, 0.0
    for logs_a, logs_b, logs_base in zip(a, b, base, strict=True):
        ids_PK = logs_b.ids_PK
        if ids_PK is None:
            shared = min(logs.values_PK.shape[1] for logs in (logs_a, logs_b, logs_base))
            x_PK, y_PK, z_PK = (logs.values_PK[:, :shared].double() for logs in (logs_a, logs_b, logs_base))
        else:
            x_PK, y_PK, z_PK = (logs.of(ids_PK).double() for logs in (logs_a, logs_b, logs_base))
        weight_PK = (x_PK.exp() + z_PK.exp()) / 2
        weight_PK = torch.where(torch.isfinite(x_PK + y_PK + z_PK), weight_PK, 0.0)
        total_P1 = weight_PK.sum(1, keepdim=True).clamp_min(1e-12)
        apart = []
        for other_PK in (y_PK, z_PK):
            moved_PK = torch.where(weight_PK > 0, other_PK - x_PK, 0.0)
            apart.append(moved_PK - (weight_PK * moved_PK).sum(1, keepdim=True) / total_P1)
        above += float((weight_PK * apart[0] * apart[1]).sum())
        below += float((weight_PK * apart[1].square()).sum())
    return above / below if below > 0 else 0.0


def reasons_of(
    rows: Sequence[Compared],
    kl: float | None,
    largest: float | None,
    allowed: Tolerance,
    effect: Effect | None,
    stops: str = "",
) -> list[str]:
    """Why two sides don't answer alike, the likeliest cause first; empty if they do. `stops`: how their stop tokens
    differ, which few short answers show."""
    reasons = []
    if wrong := [row for row in rows if row.same_prompt is False]:
        reasons.append(
            f"{len(wrong)} of {len(rows)} prompts are encoded differently (a changed template or tokenizer): "
            f"{wrong[0].prompt_parting}"
        )
    if stops:
        reasons.append(f"answers end at different tokens: {stops}")
    acting = effect is not None and effect.kl > NO_EFFECT
    if kl is not None and effect is not None and acting:
        if kl > allowed.kl and effect.strength > 0.9:
            reasons.append("the other side answers like the base without the adapter: it isn't applied there")
        elif abs(effect.strength) > STRENGTH:
            way = (
                ("has a scale been lost, or have modules been left out?")
                if effect.strength > 0
                else "is its scale too large?"
            )
            reasons.append(f"the other side carries {percent(1 - effect.strength)} of what the adapter changes: {way}")
    if kl is not None and kl > allowed.kl:
        cause = "" if reasons else ": are rows in the wrong order, modules left out, or is it another base?"
        reasons.append(f"KL {kl:.2g} nats per token is more than rounding explains ({allowed.kl:.2g}){cause}")
    elif kl is not None and effect is not None and acting and effect.share > SHARE:
        reasons.append(
            f"rounding explains the difference, but that is {_percent(effect.share)} of what the adapter changes: the "
            "type is too coarse for this adapter, or the adapter does too little on these prompts"
        )
    if largest is not None and largest > allowed.largest:
        reasons.append(
            f"a log-probability differs by {largest:.2g}, but rounding explains only up to {allowed.largest:.2g}"
        )
    if other := [row for row in rows if row.differs and row.same_prompt is not False]:
        reasons.append(f"{len(other)} of {len(rows)} answers differ, and not at a near tie: {other[0].parting_words}")
    return reasons


def _formats(sides: Sequence[Numbers]) -> str:
    """The formats that round, in words; exact ones only if there are no others."""
    names = dict.fromkeys(name for side in sides for name in (side.weights, *side.activations))
    return " and ".join(described(name) for name in [name for name in names if not exact(name)] or names)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.995 else f"{100 * share:.2g} %"
