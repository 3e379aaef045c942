"""bf16: factors kept in bfloat16 stand still at a small learning rate, float32 masters move.

bfloat16 keeps 8 binary digits, so next to x its numbers lie between |x| / 256 and |x| / 128 apart, and adding less
than half of that gives x again. Adam's steps are about as long as the learning rate η, whatever the gradient, so an
entry can move only if

    |x| ≲ 256 η … 512 η

A begins uniform in ±1/√N. At η = 1e-5 and N = 576 only the entries below about 0.004 of 0.042 can move, a tenth; at
1e-4 most can. That is why the rule asks for four fifths to stand still and not for all. B begins at zero, where numbers
are dense enough: it moves until it reaches some hundred η. So such an adapter does learn, through B and up to a point,
and a falling loss doesn't show that all is well.

The loop is as plain as possible (torch's AdamW, one rate, no warm-up), since its arithmetic is what is measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor

from deltaw.adapter.attach import attach, detach
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import open_base
from deltaw.config import RunConfig, parse_config
from deltaw.data.dataset import Dataset
from deltaw.data.loader import Loader
from deltaw.data.opening import open_dataset
from deltaw.evaluation.held_out import held_out_loss
from deltaw.studies.lab import Lab
from deltaw.studies.study import Claim, Judgement, Outcome

RATES = (1e-5, 1e-4)
STEPS, FULL_STEPS, TOKENS = 20, 200, 256
STILL, MOVED = 0.2, 0.95  # shares of A's entries that changed: less than the one, more than the other

CLAIM = Claim(
    name="bf16",
    title="Do adapters in bfloat16 move?",
    claim="Kept in bfloat16 and trained with Adam at a small learning rate, A stands still; float32 masters move.",
    source="a public run of 84 000 steps whose lora_A was the one it began with",
    method=f"the lab's adapter, {STEPS} steps of {TOKENS} tokens ({FULL_STEPS} in the full grid) with AdamW at "
    f"{RATES[0]:g} and {RATES[1]:g}, from one start, its factors and moments once in float32 and once in bfloat16; "
    "counted are the entries that changed",
    rule=f"held, if at {RATES[0]:g} fewer than {STILL:.0%} of A's entries changed in bfloat16 and more than "
    f"{MOVED:.0%} in float32; B and the loss are reported beside it",
)


@dataclass(frozen=True)
class Moved:
    """What training changed: shares of the entries, ‖A − A₀‖ / ‖A₀‖, ‖B‖, and the held-out loss in nats per token."""

    a_changed: float
    b_changed: float
    a_relative: float
    b_norm: float
    loss: float


def run(lab: Lab) -> Outcome:
    config = parse_config({**lab.task, "output": "-"})
    source, _, dataset = open_dataset(config, lab.display)
    base = open_base(source, dtype=config.train.dtype, device=config.train.device, display=lab.display)
    forward = plan_forward(base.model)
    before, _ = held_out_loss(forward, dataset.eval)
    moved = {}
    for rate in RATES:
        for dtype in (torch.float32, torch.bfloat16):
            lab.display.say(f"training {_name(dtype)}, lr {rate:g}")
            moved[rate, _name(dtype)] = train(forward, config, dataset, rate, dtype, FULL_STEPS if lab.full else STEPS)
    narrow, wide = moved[RATES[0], "bfloat16"], moved[RATES[0], "float32"]
    because = (
        f"At {RATES[0]:g} {narrow.a_changed:.1%} of A's entries changed in bfloat16, {wide.a_changed:.1%} in float32 "
        f"(of B's, which begins at zero, {narrow.b_changed:.1%} and {wide.b_changed:.1%}); at {RATES[1]:g} "
        f"{moved[RATES[1], 'bfloat16'].a_changed:.1%} of A's in bfloat16. The loss went from {before:.3f} nats to "
        f"{narrow.loss:.3f} in bfloat16, {wide.loss:.3f} in float32, both at {RATES[0]:g}."
    )
    rows: list[list[Cell]] = [
        [f"{dtype}, lr {rate:g}", m.a_changed, m.b_changed, m.a_relative, m.b_norm, m.loss]
        for (rate, dtype), m in moved.items()
    ]
    head = ["", "A's entries changed", "B's entries changed", "‖A − A₀‖ / ‖A₀‖", "‖B‖", "held-out loss"]
    picture = Picture(
        pictures.bars(
            [f"lr {rate:g}" for rate in RATES],
            {
                f"{side}, {dtype}": [getattr(moved[rate, dtype], f"{side.lower()}_changed") for rate in RATES]
                for side in "AB"
                for dtype in ("float32", "bfloat16")
            },
            y_label="share of the entries that changed",
        ),
        "The share of A's and B's entries that training changed at all.",
        "A group of bars for each learning rate; in each, A and B in float32 and in bfloat16",
        Table(
            head, rows, f"After training; the loss before it is {before:.3f} nats per token. Shares are fractions of 1"
        ),
    )
    figures = {"before": before, "moved": {f"{d}, {rate:g}": asdict(m) for (rate, d), m in moved.items()}}
    return Outcome(
        verdict({d: m.a_changed for (r, d), m in moved.items() if r == RATES[0]}), because, [picture], figures
    )


def verdict(changed: Mapping[str, float]) -> Judgement:
    """`changed`: the share of A's entries that changed at the lower rate, by dtype."""
    return "held" if changed["bfloat16"] < STILL and changed["float32"] > MOVED else "did not hold"


def train(forward: Forward, config: RunConfig, dataset: Dataset, rate: float, dtype: torch.dtype, steps: int) -> Moved:
    """Attach a fresh adapter with factors of `dtype`, train it, measure it and detach it again."""
    attached = attach(forward.model, config.adapter, generator=torch.Generator().manual_seed(config.train.seed))
    for parameter in attached.parameters:
        parameter.data = parameter.data.to(dtype)
    device = attached.parameters[0].device
    before = [layer.trained()["a"].detach().clone() for layer in attached.layers.values()]
    optimizer = torch.optim.AdamW(attached.parameters, lr=rate, weight_decay=0.0)
    for batches, _ in islice(Loader(dataset.train, TOKENS, TOKENS, config.train.seed), steps):
        for batch in (batch.to(device) for batch in batches):
            loss, count = forward.loss(batch)
            (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    a = [layer.trained()["a"].detach() for layer in attached.layers.values()]
    b = [layer.trained()["b"].detach() for layer in attached.layers.values()]
    loss_after, _ = held_out_loss(forward, dataset.eval)
    moved = Moved(
        a_changed=_share([x != old for x, old in zip(a, before, strict=True)]),
        b_changed=_share([x != 0 for x in b]),
        a_relative=_norm([x.float() - old.float() for x, old in zip(a, before, strict=True)]) / _norm(before),
        b_norm=_norm(b),
        loss=loss_after,
    )
    detach(attached)
    return moved


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _share(masks: list[Tensor]) -> float:
    """The share of all entries."""
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _norm(parts: list[Tensor]) -> float:
    return sum(float(part.float().norm()) ** 2 for part in parts) ** 0.5
