"""result.json: a run's figures, and how they are shown when it ends."""

import math
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import torch

from deltaw.adapter.history import History
from deltaw.base.frozen import embedding_of
from deltaw.errors import command
from deltaw.evaluation.forgetting import Forgetting
from deltaw.evaluation.held_out import Evaluation, perplexity, spread
from deltaw.files.output import gib
from deltaw.run import Run
from deltaw.show.chart import columns
from deltaw.show.progress import Display
from deltaw.show.table import table
from deltaw.show.text import counted, figure_name, framed, one_line, rounded
from deltaw.training.checkpoint import TrainState
from deltaw.training.contention import waits_passively
from deltaw.training.groups import PART
from deltaw.training.learner import Learner
from deltaw.training.memory import peak_memory
from deltaw.training.opening import Opened
from deltaw.training.retain import time_share
from deltaw.training.rewarding import REWARD
from deltaw.version import VERSION

SHOWN = 10  # answers kept in result.json
LAST = 10  # steps over which the KL of the text that is retained is averaged


@dataclass(frozen=True)
class Measured:
    """What is known about the adapter: None (and no answers) where it wasn't asked for, or where `failed` says why
    not."""

    before: Evaluation | None = None
    after: Evaluation | None = None
    forgetting: Forgetting | None = None
    answers: list[dict[str, str]] = field(default_factory=list)  # of an earlier result.json
    failed: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(before: Evaluation | None, result: dict[str, Any]) -> "Measured":
        """What a finished run's result.json knows, beside its base's figures."""
        after, lost = result["eval"]["after"], result["forgetting"]
        code = result["eval"].get("code", {})
        return Measured(
            before,
            Evaluation(after.pop("loss", None), after.pop("perplexity", 0.0), 0, metrics=after, code=code)
            if after
            else None,
            Forgetting(**lost) if lost else None,
            result["answers"],
        )


def measurements(measured: Measured, run: Run, opened: Opened) -> dict[str, Any]:
    """The part of result.json that is measured when the training is over. `higher_is_better` and `code`: of each
    metric, and of those that are the user's own."""
    before, after = measured.before, measured.after
    given = (
        {answer.origin: answer for answer in before.answers} if before else {}
    )  # more rows or fewer, if that changed
    pairs = [(given[a.origin], a) for a in after.answers if a.origin in given] if after else []
    return {
        "eval": {
            "rows": len(opened.dataset.eval.units),
            "before": before.summary() if before else None,
            "start": at_the_start(run),
            "after": after.summary() if after else None,
            "unanswered": before.unanswered if before else None,
            "higher_is_better": {**_directions(after), **{m.name: m.higher_is_better for m in opened.metrics}},
            "code": {metric.name: metric.code for metric in opened.metrics if metric.code},
        },
        "forgetting": asdict(measured.forgetting) if measured.forgetting else None,
        "answers": measured.answers
        or [
            {"prompt": b.prompt, "before": b.given, "after": a.given, "truth": b.truth} for b, a in spread(pairs, SHOWN)
        ],
        "failed": measured.failed,
    }


def retained(opened: Opened, run: Run, state: TrainState) -> dict[str, Any] | None:
    """What `train.retain` cost and kept: its tokens, about which part of the training's time they took, the KL from the
    base on them over the last steps, in nats per token."""
    text, asked = opened.kept_text, opened.config.train.retain
    if text is None or asked is None:
        return None
    tokens, words = text.tokens(0, state.step), embedding_of(opened.model.base.model)
    width = words.shape[opened.model.forward.head is not None] * words.dtype.itemsize
    last = [line["retain_kl"] for line in run.read_metrics() if "retain_kl" in line][-LAST:]
    return {
        **asked.model_dump(mode="json"),
        "tokens": tokens,
        "time_share": round(time_share(state.tokens, tokens, text.asked(tokens, width)), 4),
        "kl": sum(last) / len(last) if last else None,
    }


def _directions(after: Evaluation | None) -> dict[str, bool]:
    """Of the figures of a reward: more of it is better, and fewer answers that were cut off."""
    names = [name for name in after.metrics if name == REWARD or name.startswith(PART)] if after else []
    return {**dict.fromkeys(names, True), "truncated": False} if names else {}


def at_the_start(run: Run) -> dict[str, float] | None:
    """The held-out loss of the adapter that the run started from, or its reward."""
    first = [line for line in run.read_metrics() if line["step"] == 0]
    if rewards := [line[f"eval_{REWARD}"] for line in first if f"eval_{REWARD}" in line]:
        return {REWARD: rewards[0]}
    losses = [line["eval_loss"] for line in first if "eval_loss" in line]
    return {"loss": losses[0], "perplexity": perplexity(losses[0])} if losses else None


def write_result(
    opened: Opened,
    learner: Learner,
    run: Run,
    measured: Measured,
    history: History,
    total_seconds: float,
    waited: float | None = None,
) -> None:
    """Write result.json, which marks the run as finished. Times in seconds, memory in bytes, losses in nats."""
    model, report, state = opened.model, opened.dataset.report, learner.state
    result = {
        "base": opened.config.base,
        "adapter": str(run.adapter),
        "trained_parameters": sum(p.numel() for p in opened.attached.parameters),
        "steps": state.step,
        "planned_steps": opened.total,
        "stopped_early": state.step < opened.total,
        "best_step": state.best_step or state.step,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "seconds": round(state.seconds, 2),
        "total_seconds": round(total_seconds, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens_per_second": round(state.tokens_per_second, 1),
        "peak_memory_bytes": peak_memory(opened.device),
        **measurements(measured, run, opened),
        "retain": retained(opened, run, state),
        "form": report.form,
        "example": opened.dataset.example,
        "dropped": report.unusable + report.too_long_dropped + report.untrained,
        "truncated": report.truncated,
        "train_rows": report.train_rows,
        "epoch_tokens": None if opened.is_rewarded else report.tokens,
        "unused": report.unused,
        "left_out": report.left_out,
        "forward": model.describe(),
        "checkpointing": opened.checkpointing,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "processes": opened.world.size,
        "machine": {
            "device": str(model.base.device),
            "threads": torch.get_num_threads(),
            "cpu": platform.machine(),
            "waiting": "passive" if waits_passively() else "default",
            "without_a_core": None if waited is None else round(waited, 3),
        },
        "versions": {"deltaw": VERSION, "torch": torch.__version__},
        "fingerprints": state.fingerprints,
        "history": history.to_json(),
    }
    run.write_json(run.result, result)


def write_report(run: Run, display: Display) -> None:
    """report.html, and what the checks found."""
    from deltaw.analysis.report import inspect  # matplotlib takes a second

    report = inspect(run.folder, base_is_known=True, display=display)
    path = report.write(run.report)
    for finding in report.findings:
        if finding.level in ("warning", "problem"):
            display.say(f"{finding.level}: {finding.words}")
    display.say(f"report: {path}")


def summary(run: Run) -> str:
    """What a person reads at the end of a run: answers before and after, the loss curve, figures, what to do next."""
    result = run.read_json(run.result)
    parts = []
    if result["answers"]:
        parts.append(_answers(result["answers"]))
    for name, title in (("loss", "training loss"), (REWARD, "reward of the sampled answers")):
        if len(values := [line[name] for line in run.read_metrics() if name in line]) > 1:
            parts.append(f"{title}\n{plot(values)}")
    parts.append(_figures(result))
    parts.append(f"adapter: {run.adapter}\nnext:    " + "\n         ".join(_next(run, result)))
    return "\n\n".join(parts)


def _next(run: Run, result: dict[str, Any]) -> list[str]:
    """Commands worth trying: what the run can be measured on, if it held rows out, and a prompt of its own kind."""
    measured = [command("eval", run.folder)] if result["eval"]["rows"] else []
    prompt = result.get("example") or "a prompt"
    return [command("chat", run.folder), *measured, command("generate", run.folder, prompt)]


def plot(values: list[float], width: int = 64, height: int = 8) -> str:
    """A line chart in text: each column the mean of its share of `values`, the axis labelled at both ends."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / height or 1.0
    heights = [math.ceil((mean - low) / step * 8) for mean in means]
    top, bottom = f"{high:8.3f}", f"{low:8.3f}"
    return columns(heights, rows=height, top=top, bottom=bottom, first="step 1", last=f"step {len(values)}")


def _answers(rows: list[dict[str, str]]) -> str:
    head = ("asked", "before", "after", "truth")
    _, prompts, _ = framed([row["prompt"] for row in rows])
    cells = [
        [one_line(prompt, 28, end=True), *(one_line(row[key], 28) for key in ("before", "after", "truth"))]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    return table(cells, head, rule=True)


def _figures(result: dict[str, Any]) -> str:
    lines = [
        f"{counted(result['steps'], 'step')}, {counted(result['tokens'], 'token')} "
        f"({result['supervised_tokens']:,} trained on) in "
        f"{result['seconds']:.0f} s: {result['tokens_per_second']:.0f} tokens/s, "
        f"{gib(result['peak_memory_bytes'])}, {result['trained_parameters']:,} parameters trained"
    ]
    before, after = result["eval"]["before"], result["eval"]["after"]
    if before and after:
        lines += [
            f"{figure_name(name):20} {rounded(before[name]) if name in before else '–':>9} → {rounded(after[name])}"
            for name in after
        ]
        if start := result["eval"].get("start"):
            ((name, value), *_) = start.items()
            at = f"{name} at the start"
            lines.append(f"{at:20} {rounded(value):>9}, of the adapter that it started from")
        lines.append(f"{'':20} measured on {counted(result['eval']['rows'], 'held-out row')}")
    if lost := result.get("forgetting"):
        lines.append(
            f"{'general text, loss':20} {lost['loss_before']:9.4f} → {lost['loss_after']:.4f}, "
            f"KL from the base {lost['kl']:.4f} nats per token"
        )
        if interval := lost.get("rise_interval"):
            lines.append(
                f"{'':20} the rise lies between {interval[0]:+.4f} and {interval[1]:+.4f} (95 %, over passages)"
            )
    if (retain := result.get("retain")) and retain["kl"] is not None:
        lines.append(
            f"{'held to the base on':20} {retain['tokens']:,} tokens of {retain['data']}, KL {retain['kl']:z.4f} there "
            f"at the end; about {retain['time_share']:.0%} of the time of training"
        )
    lines += [f"no {name.replace('_', ' ')}: {why}" for name, why in result.get("failed", {}).items()]
    if why := result["eval"].get("unanswered"):
        lines.append(f"no answers to held-out rows: {why}")
    return "\n".join(lines)
