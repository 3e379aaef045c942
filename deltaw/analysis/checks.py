"""Checks that cost nothing and are always on: does a finished run look like what it was meant to be?

Each is a rule over figures that are there anyway, and says what was found, why it matters and what to do:

    learnt nothing    modules whose ΔW is exactly 0: their gradient was 0 in every step
    got worse         held-out loss above the base's
    capacity          nats of the first epoch's labels, in bits, against 2 bits a trained parameter: beyond that, LoRA
                      falls behind full fine-tuning ("LoRA Without Regret", Schulman et al. 2025)
    idle ranks        a few of the rank's directions hold 90 % of ΔW: a lower rank would have given the same
    low rate          a learning rate below LoRA's usual range, where all ranks give the same
    large batch       more than 64 documents a step, which LoRA tolerates worse than full fine-tuning
    forgetting        general text got much worse, or the model's beliefs moved far from the base's
    merging           the share of ΔW that a merge into bfloat16 weights loses

No check stops anything: what must stop a run is found while it runs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaw.analysis.measure import Measures, summarise
from deltaw.analysis.page import Finding, Level
from deltaw.config import RunConfig

BITS_A_PARAMETER = 2.0
LOW_RATE, FULL_SHARE = 1e-4, 0.1  # LoRA's range begins there; full fine-tuning's at a tenth
DOCUMENTS = (64, 128)  # a step: worth a note, worth a warning
FORGOT, MOVED = 0.25, 0.5  # nats a token: rise of general text's loss, KL from the base
IDLE = 0.5  # share of the rank that holds 90 % of the energy
LOST = 0.1  # of ‖ΔW‖ in a merge

Metrics = Sequence[Mapping[str, Any]]


def check_adapter(measures: Mapping[str, Measures]) -> list[Finding]:
    """What can be told from the update alone, and from W where it was measured against it."""
    return [*_zero(measures), *_idle(measures), *_merging(measures)]


def check_run(config: RunConfig, result: Mapping[str, Any], metrics: Metrics) -> list[Finding]:
    """What can be told from a run's figures."""
    return [
        *_held_out(result, metrics),
        *_capacity(config, result, metrics),
        *_rate(config),
        *_batch(config, result),
        *_forgetting(result.get("forgetting")),
    ]


def _zero(measures: Mapping[str, Measures]) -> Iterator[Finding]:
    zero = [path for path, m in measures.items() if m.numerical_rank == 0]
    if len(zero) == len(measures):
        yield Finding("problem", "the update is zero in every module: nothing was learnt, the base answers")
    elif zero:
        shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        yield Finding(
            "problem",
            f"{len(zero)} of {len(measures)} modules learnt nothing, their update is exactly zero: {shown}; "
            "no gradient reaches them",
        )
    else:
        yield Finding("ok", f"all {len(measures)} modules learnt something")


def _idle(measures: Mapping[str, Measures]) -> Iterator[Finding]:
    kept = sorted(m.energy_rank for m in measures.values() if m.numerical_rank)
    ranks = {m.rank for m in measures.values()}
    if not kept or len(ranks) > 1 or (rank := ranks.pop()) < 8:
        return
    nine_tenths = kept[min(len(kept) - 1, math.ceil(0.9 * len(kept)))]
    if nine_tenths <= IDLE * rank:
        yield Finding(
            "note",
            f"in nine modules of ten, {nine_tenths} of {rank} directions hold 90 % of the update: a lower rank "
            f"might do; "
            f"`deltaw resize` to rank {nine_tenths} shows what it loses",
        )


def _merging(measures: Mapping[str, Measures]) -> Iterator[Finding]:
    if not any(m.base for m in measures.values()):
        return
    lost = summarise(measures)["merge_error"]
    if lost > LOST:
        yield Finding(
            "warning",
            f"merged into bfloat16 weights, {lost:.0%} of the update would be lost to rounding: serve it as an "
            f"adapter, or "
            "merge into float32",
        )
    else:
        yield Finding("ok", f"merging into bfloat16 weights would lose {lost:.1%} of the update to rounding")


def _held_out(result: Mapping[str, Any], metrics: Metrics) -> Iterator[Finding]:
    before, after = (result["eval"].get(side) for side in ("before", "after"))
    if not before or not after:
        yield Finding("note", "no held-out rows: whether it learnt what was meant can't be told; set data.eval")
        return
    change = after["loss"] - before["loss"]
    if change >= 0:
        yield Finding(
            "problem",
            f"held-out loss rose from {before['loss']:.3f} to {after['loss']:.3f}: lower train.lr, or check the data",
        )
    else:
        yield Finding("ok", f"held-out loss fell from {before['loss']:.3f} to {after['loss']:.3f} nats a token")
    if result["best_step"] < result["steps"]:
        yield Finding(
            "note",
            f"the held-out loss was best at step {result['best_step']} of {result['steps']}; that adapter was saved",
        )


def _capacity(config: RunConfig, result: Mapping[str, Any], metrics: Metrics) -> Iterator[Finding]:
    lines = [line for line in metrics if "loss" in line]
    if not lines:
        return
    epoch = math.ceil(len(lines) / max(1.0, config.train.epochs)) if config.train.steps is None else len(lines)
    counts = [0, *(line["supervised_tokens"] for line in lines)]
    steps = zip(lines[:epoch], counts, counts[1:], strict=False)
    nats = sum(line["loss"] * (after - before) for line, before, after in steps)
    bits, room = nats / math.log(2), BITS_A_PARAMETER * result["trained_parameters"]
    said = f"the data held {bits:,.0f} bits in its first epoch, the adapter has room for about {room:,.0f}"
    if bits <= room:
        yield Finding("ok", said)
    elif result.get("form") == "text":
        yield Finding(
            "warning", f"{said}: this is continued pretraining, where LoRA falls behind; raise rank, or train full"
        )
    else:
        yield Finding("warning", f"{said}: raise adapter.rank")


def _rate(config: RunConfig) -> Iterator[Finding]:
    low = LOW_RATE * (FULL_SHARE if config.adapter.full else 1.0)
    if config.train.lr < low:
        yield Finding(
            "note",
            f"train.lr {config.train.lr:g} is below the usual range, which begins at {low:g}: so low, every rank "
            f"learns the "
            "same and little; try ten times as much",
        )


def _batch(config: RunConfig, result: Mapping[str, Any]) -> Iterator[Finding]:
    rows = result["train_rows"] * config.train.epochs if config.train.steps is None else None
    documents = rows / result["steps"] if rows and result["steps"] else 0.0
    if documents > DOCUMENTS[0]:
        level: Level = "warning" if documents > DOCUMENTS[1] else "note"
        yield Finding(
            level, f"{documents:.0f} documents a step: LoRA tolerates large batches badly; lower train.tokens_per_step"
        )


def _forgetting(lost: Mapping[str, Any] | None) -> Iterator[Finding]:
    if not lost:
        return
    rise, kl = lost["loss_after"] - lost["loss_before"], lost["kl"]
    losses = f"general text: loss {lost['loss_before']:.3f} → {lost['loss_after']:.3f}"
    said = f"{losses}, KL from the base {kl:.3f} nats a token"
    if rise > FORGOT or kl > MOVED:
        yield Finding(
            "warning", f"{said}: it forgot a good deal; a lower train.lr, or deltaw scale, trades task for memory"
        )
    else:
        yield Finding("ok", said)
