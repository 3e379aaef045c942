"""Checks that cost nothing and always run: does a finished run look as it should?

Each is a rule over figures that were measured anyway. It says what they show, why that matters and what to do:

    learnt nothing    modules whose ΔW is exactly 0: their gradient was 0 in every step
    got worse         held-out loss above the base's, or above that of the adapter that it started from
    preferences       chosen answers that became less likely than under the reference
    began and ended   which adapter it started from; that it was extended, or stopped early
    gaps              figures of the run that can't be read; nothing else here uses them
    capacity          nats of the first epoch's labels, in bits, against 2 bits per trained parameter: beyond that, LoRA
                      falls behind full fine-tuning ("LoRA Without Regret", Schulman et al. 2025)
    idle ranks        a few of the rank's directions hold 90 % of ΔW's energy: a lower rank might do
    low rate          a learning rate below LoRA's usual range, where all ranks learn the same. Adam moves every entry
                      of B by about the rate, LoRA+ by `lr_ratio_b` times it, so ΔW = s B A moves by rate · s · r: the
                      check judges the rate that would move ΔW as far at the default's s · r = 32. (Initialisers that
                      move the base begin with factors of other sizes; there the rate alone is judged)
    large batch       more than 64 documents per step, which LoRA tolerates worse than full fine-tuning
    forgetting        general text got much worse, or the model's predictions moved far from the base's; a warning if
                      the whole interval says so, a note if only the figure itself does
    merging           how much of ΔW survives a merge into bfloat16 weights. The noise that rounding adds is stated, not
                      judged: it points everywhere, as the rounding of W itself does

No check stops anything: what must stop a run is caught while it runs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaw.adapter.history import History
from deltaw.analysis.measure import Measures
from deltaw.analysis.page import Finding, Level
from deltaw.analysis.summary import noise_of, summarise
from deltaw.analysis.training import Training
from deltaw.config import RunConfig
from deltaw.errors import InputError
from deltaw.show.text import percent

BITS_PER_PARAMETER = 2.0
LOW_RATE, FULL_SHARE = 1e-4, 0.1  # LoRA's range begins there; full fine-tuning's at a tenth
DOCUMENTS = (64, 128)  # a step: worth a note, worth a warning
FORGOT, MOVED = 0.25, 0.5  # nats per token: rise of general text's loss, KL from the base
IDLE = 0.5  # share of the rank that holds 90 % of the energy
FELL = 0.05  # share of its log-probability by which a chosen answer may become less likely (training/watch.py)
KEPT = 0.9  # of ΔW, along itself, in a merge
USUAL = 32.0  # s r of the default, rank 16 at alpha 32


def check_adapter(measures: Mapping[str, Measures]) -> list[Finding]:
    """What the update alone tells, and W if it was measured against W."""
    return [*_zero(measures), *_idle(measures), *_merging(measures)]


def check_run(training: Training) -> list[Finding]:
    """What a run's figures tell, as far as they are available."""
    return [
        *(Finding("warning", f"read in part: {fault}") for fault in training.faults),
        *_held_out(training.result, "" if training.config.objective.is_preference else " nats per token"),
        *_preferences(training.result),
        *_lineage(training),
        *(() if training.config.objective.is_preference else (*_capacity(training), *_rate(training.config))),
        *_batch(training),
        *_forgetting(training.result.get("forgetting")),
    ]


def _zero(measures: Mapping[str, Measures]) -> Iterator[Finding]:
    zero = [path for path, m in measures.items() if m.numerical_rank == 0]
    if len(zero) == len(measures):
        yield Finding("problem", "the update is zero in every module: nothing was learnt, and the base answers")
    elif zero:
        shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        what = f"{len(zero)} of {len(measures)} modules learnt nothing (their update is exactly zero): {shown}"
        yield Finding("problem", f"{what}; no gradient reaches them")
    else:
        yield Finding("ok", f"all {len(measures)} modules learnt something")


def _idle(measures: Mapping[str, Measures]) -> Iterator[Finding]:
    in_use = sorted(m.energy_rank for m in measures.values() if m.numerical_rank)
    ranks = {m.rank for m in measures.values()}
    if not in_use or len(ranks) > 1 or (rank := ranks.pop()) < 8:
        return
    nine_tenths = in_use[min(len(in_use) - 1, math.ceil(0.9 * len(in_use)))]
    if nine_tenths <= IDLE * rank:
        what = f"in nine modules of ten, {nine_tenths} of {rank} directions hold 90 % of the update's energy"
        how = "Energy doesn't say what the others do; `deltaw resize --max-loss-increase` measures that"
        yield Finding("note", f"{what}: a lower rank might do. {how}")


def _merging(measures: Mapping[str, Measures]) -> Iterator[Finding]:
    if not any(m.base for m in measures.values()):
        return
    summary = summarise(measures)
    kept, noise = summary["merge_kept"], noise_of(summary["merge_kept"], summary["merge_error"])
    what = f"merged into bfloat16 weights, {percent(kept)} of the update is kept along its own direction"
    what += f"; rounding adds noise of {percent(noise)} of its size"
    if kept < KEPT:
        yield Finding("warning", f"{what}: serve it as an adapter, or merge into float32")
    else:
        yield Finding("ok", what)


def _preferences(result: Mapping[str, Any]) -> Iterator[Finding]:
    after = result.get("eval", {}).get("after", {})
    change, logp = after.get("chosen_change"), after.get("logp_chosen")
    if change is None or logp is None:
        return
    if change < -max(1.0, FELL * abs(logp)):
        what = f"held-out chosen answers are less likely than under the reference, by {-change:.1f} nats each"
        yield Finding("warning", f"{what}: lower train.lr, raise objective.beta, or set objective.sft_weight")
    else:
        yield Finding("ok", f"held-out chosen answers changed by {change:+.1f} nats each against the reference")


def _held_out(result: Mapping[str, Any], unit: str) -> Iterator[Finding]:
    sides = [result.get("eval", {}).get(side) for side in ("before", "after")]
    if sides == [{}, {}]:
        yield Finding("note", "no held-out rows, so nothing shows whether it learnt what it should; set data.eval")
    if all(side and "reward" in side for side in sides):
        yield from _reward(result, *(side["reward"] for side in sides))
    if not all(side and "loss" in side for side in sides):
        return
    before, after = (side["loss"] for side in sides)
    if after >= before:
        what = f"the held-out loss rose from {before:.3f} to {after:.3f}{unit}"
        yield Finding("problem", f"{what}: lower train.lr, or check the data")
    else:
        yield Finding("ok", f"the held-out loss fell from {before:.3f} to {after:.3f}{unit}")
    start = result.get("eval", {}).get("start", {}).get("loss")
    if start is not None and after >= start:
        what = f"the held-out loss rose from {start:.3f}, which the adapter that it started from had, to {after:.3f}"
        yield Finding("problem", f"{what}: lower train.lr, or keep the earlier adapter")
    best, steps = result.get("best_step"), result.get("steps")
    if best is not None and steps is not None and best < steps:
        yield Finding("note", f"the held-out loss was best at step {best:g} of {steps:g}; that adapter was saved")


def _reward(result: Mapping[str, Any], base: float, after: float) -> Iterator[Finding]:
    """Of the greedy answers to held-out prompts."""
    start = result.get("eval", {}).get("start", {}).get("reward")
    before, whose = (base, "the base") if start is None else (start, "the adapter that it started from")
    rose = f"from {before:.3f}, which {whose} had, to {after:.3f}"
    if after > before:
        yield Finding("ok", f"the reward of held-out prompts rose {rose}")
    else:
        yield Finding(
            "problem", f"the reward of held-out prompts didn't rise: {rose}; look at the share of flat groups"
        )
    best, steps = result.get("best_step"), result.get("steps")
    if best is not None and steps is not None and best < steps:
        yield Finding("note", f"the reward was best at step {best:g} of {steps:g}; that adapter was saved")


def _lineage(training: Training) -> Iterator[Finding]:
    steps, planned = (training.result.get(name) for name in ("steps", "planned_steps"))
    if steps is not None and planned is not None and steps < planned:
        what = f"it stopped early, after step {steps:,.0f} of {planned:,.0f}"
        yield Finding("note", f"{what}: the held-out loss had stopped falling (train.patience)")
    try:
        own, *earlier = History.of(training.raw.get("history", {}), "result.json").line
    except InputError as error:
        yield Finding("warning", f"read in part: {error.what}")
        return
    if own.extension:
        yield Finding("note", f"it was {own.extension}")
    if earlier:
        yield Finding("note", f"it started from {', which started from '.join(one.words() for one in earlier)}")


def _capacity(training: Training) -> Iterator[Finding]:
    """The bits of the first epoch's labels; if a run ended within it, of those that it saw."""
    parameters, epochs = training.result.get("trained_parameters"), training.epochs
    lines = [line for line in training.metrics if math.isfinite(line.get("loss", math.nan))]
    lines = [line for line in lines if "supervised_tokens" in line]
    if not lines or parameters is None or epochs is None:
        return
    first = lines[: math.ceil(len(lines) / max(1.0, epochs))]
    counts = [0, *(line["supervised_tokens"] for line in lines)]
    nats = sum(line["loss"] * (after - before) for line, before, after in zip(first, counts, counts[1:], strict=False))
    bits, room = nats / math.log(2), BITS_PER_PARAMETER * parameters
    seen = "the first epoch's labels hold" if epochs >= 1 else f"the labels seen ({percent(epochs)} of the data) hold"
    what = f"{seen} {bits:,.0f} bits, and the adapter has room for about {room:,.0f}"
    if bits <= room:
        yield Finding("ok", f"{what}: the rank shouldn't limit what it learns")
    elif training.result.get("form") == "text":
        why = "this is continued pretraining, where LoRA falls behind"
        yield Finding("warning", f"{what}: {why}; raise adapter.rank, or train all weights (adapter: full)")
    else:
        yield Finding("warning", f"{what}: raise adapter.rank")


def _rate(config: RunConfig) -> Iterator[Finding]:
    spec, lr = config.adapter, config.train.lr
    low = LOW_RATE * (FULL_SHARE if spec.full else 1.0)
    reach = 1.0 if spec.full or spec.moves_base else config.train.lr_ratio_b * spec.scale("") * spec.rank / USUAL
    if lr * reach >= low:
        return
    what = f"train.lr {lr:g}"
    if not math.isclose(reach, 1):
        what += f" moves the update as {lr * reach:.2g} would at s · r = {USUAL:g}, which"
    what += f" is below the usual range, which begins at {low:g}"
    yield Finding("note", f"{what}: at so low a rate every rank learns the same, and little; try ten times as much")


def _batch(training: Training) -> Iterator[Finding]:
    rows, steps, epochs = training.result.get("train_rows"), training.result.get("steps"), training.epochs
    documents = rows * epochs / steps if rows and steps and epochs else 0.0
    if documents > DOCUMENTS[0]:
        level: Level = "warning" if documents > DOCUMENTS[1] else "note"
        what = f"{documents:.0f} documents per step: LoRA tolerates large batches badly"
        yield Finding(level, f"{what}; lower train.tokens_per_step")


def _forgetting(lost: Mapping[str, Any] | None) -> Iterator[Finding]:
    if not lost or not all(name in lost for name in ("loss_before", "loss_after", "kl")):
        return
    rise, kl = lost["loss_after"] - lost["loss_before"], lost["kl"]
    rises, kls = lost.get("rise_interval") or (rise, rise), lost.get("kl_interval") or (kl, kl)
    what = f"general text: loss {lost['loss_before']:.3f} → {lost['loss_after']:.3f}"
    what += f"{_between('change ', lost.get('rise_interval'))}, KL from the base {kl:.3f}"
    what += f"{_between('', lost.get('kl_interval'))} nats per token"
    if rises[0] > FORGOT or kls[0] > MOVED:
        how = "a lower train.lr, or `deltaw scale`, gives up some of the task and forgets less"
        yield Finding("warning", f"{what}: it forgot a lot; {how}")
    elif rise > FORGOT or kl > MOVED:
        yield Finding("note", f"{what}: it may have forgotten a lot, but so few passages can't tell")
    else:
        yield Finding("ok", what)


def _between(what: str, interval: Sequence[float] | None) -> str:
    return f" (95 %: {what}{interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
