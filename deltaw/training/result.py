"""result.json: a run's figures, and how they are shown at its end."""

import math
import platform
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from deltaw.config import RunConfig
from deltaw.data.dataset import Dataset
from deltaw.errors import DeltawError, command
from deltaw.evaluate.forgetting import Forgetting
from deltaw.evaluate.held_out import Evaluation, spread
from deltaw.model import Model
from deltaw.progress import Display
from deltaw.run import Run
from deltaw.training.checkpoint import TrainState
from deltaw.training.log import peak_memory_bytes
from deltaw.version import VERSION

SHOWN = 10  # answers kept in result.json


@dataclass(frozen=True)
class Found:
    """The base and the adapter on the held-out rows, and what was forgotten; None where it wasn't asked."""

    before: Evaluation | None
    after: Evaluation | None
    forgetting: Forgetting | None


def write_result(
    run: Run,
    config: RunConfig,
    state: TrainState,
    model: Model,
    dataset: Dataset,
    found: Found,
    total_seconds: float,
) -> dict[str, Any]:
    """Write result.json, which marks the run as finished. Times in seconds, memory in bytes, losses in nats."""
    assert model.attached is not None
    before, after = found.before, found.after
    answers = list(zip(before.answers, after.answers, strict=True)) if before and after else []
    report = dataset.report
    result = {
        "base": config.base,
        "adapter": str(run.adapter),
        "trained_parameters": sum(p.numel() for p in model.attached.parameters),
        "steps": state.step,
        "best_step": state.best_step or state.step,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "seconds": round(state.seconds, 2),
        "total_seconds": round(total_seconds, 2),
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
        "peak_memory_bytes": peak_memory_bytes(model.base.device),
        "eval": {
            "rows": len(dataset.eval),
            "before": before.summary() if before else None,
            "after": after.summary() if after else None,
        },
        "forgetting": asdict(found.forgetting) if found.forgetting else None,
        "form": report.form,
        "dropped": report.unusable + report.too_long_dropped + report.untrained,
        "truncated": report.truncated,
        "train_rows": report.train_rows,
        "forward": model.describe(),
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "machine": {"device": str(model.base.device), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "versions": {"deltaw": VERSION, "torch": torch.__version__},
        "answers": [
            {"prompt": b.prompt, "before": b.given, "after": a.given, "truth": b.truth}
            for b, a in spread(answers, SHOWN)
        ],
    }
    run.write_json(run.result, result)
    return result


def write_report(run: Run, display: Display) -> None:
    """report.html, and what the checks found. The run is saved already: a report that fails takes nothing with it."""
    from deltaw.analysis.report import inspect  # matplotlib takes a second

    try:
        report = inspect(run.folder, base_is_known=True, display=display)
        path = report.write(run.report)
    except DeltawError as error:
        display.say(f"no report: {error.what}")
        return
    for finding in report.findings:
        if finding.level in ("warning", "problem"):
            display.say(f"{finding.level}: {finding.words}")
    display.say(f"report: {path}")


def summary(run: Run) -> str:
    """What a person reads at the end of a run: answers before and after, the loss curve, figures, what next."""
    result = run.read_json(run.result)
    parts = []
    if result["answers"]:
        parts.append(_answers(result["answers"]))
    losses = [line["loss"] for line in run.read_metrics() if "loss" in line]
    if len(losses) > 1:
        parts.append("training loss\n" + plot(losses))
    parts.append(_figures(result))
    parts.append(f"adapter: {run.adapter}\nnext:    " + "\n         ".join(_next(run, result)))
    return "\n\n".join(parts)


def _next(run: Run, result: dict[str, Any]) -> list[str]:
    """Commands worth trying, with a prompt that this run knows."""
    prompts = [row["prompt"] for row in result["answers"] if len(row["prompt"]) < 40 and "\n" not in row["prompt"]]
    prompt = prompts[0] if prompts else "a prompt"
    return [command("chat", run.folder), command("eval", run.folder), command("generate", run.folder, prompt)]


def plot(values: list[float], width: int = 64, height: int = 8) -> str:
    """A line chart in text: each column the mean of its share of `values`, the axis labelled at both ends."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    columns = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(columns), max(columns)
    step = (high - low) / height or 1.0
    blocks = " ▁▂▃▄▅▆▇█"
    rows = []
    for row in range(height - 1, -1, -1):
        fill = [min(8, max(0, math.ceil(((value - low) / step - row) * 8))) for value in columns]
        label = f"{high:8.3f} " if row == height - 1 else f"{low:8.3f} " if row == 0 else " " * 9
        rows.append(label + "│" + "".join(blocks[level] for level in fill).rstrip())
    return "\n".join([*rows, " " * 9 + "└" + "─" * count, f"{'':10}step 1{f'step {len(values)}':>{max(0, count - 6)}}"])


def _answers(rows: list[dict[str, str]]) -> str:
    table = [("asked", "before", "after", "truth")]
    table += [tuple(_cell(row[key]) for key in ("prompt", "before", "after", "truth")) for row in rows]  # type: ignore[misc]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "─" * len(lines[0].ljust(sum(widths) + 6)), *lines[1:]])


def _cell(text: str, limit: int = 28) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _figures(result: dict[str, Any]) -> str:
    lines = [
        f"{result['steps']} steps, {result['tokens']:,} tokens ({result['supervised_tokens']:,} trained on) in "
        f"{result['seconds']:.0f} s: {result['tokens_per_second']:.0f} tokens/s, "
        f"{result['peak_memory_bytes'] / 2**30:.1f} GiB, {result['trained_parameters']:,} parameters trained"
    ]
    before, after = result["eval"]["before"], result["eval"]["after"]
    if before and after:
        lines += [f"{name.replace('_', ' '):20} {before[name]:9.4f} → {after[name]:.4f}" for name in after]
        lines.append(f"{'':20} measured on {result['eval']['rows']} held-out rows")
    if lost := result.get("forgetting"):
        lines.append(
            f"{'general text, loss':20} {lost['loss_before']:9.4f} → {lost['loss_after']:.4f}, "
            f"KL from the base {lost['kl']:.4f} nats a token"
        )
    return "\n".join(lines)
