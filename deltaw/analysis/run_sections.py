"""The sections of a report's page on the run: what it learnt, forgot and answered, and how to do it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.analysis import pictures
from deltaw.analysis.page import (
    Block,
    Cell,
    Fact,
    Picture,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    excerpt,
    number,
    thinned,
)
from deltaw.analysis.training import ANSWER, Metrics, Training
from deltaw.config import ObjectiveConfig, RunConfig
from deltaw.config.sources import label
from deltaw.errors import command
from deltaw.files.output import gib
from deltaw.files.paths import public_name
from deltaw.show.text import clock, counted, figure_name, framed, percent

LOSSES = {"training": "loss", "held out": "eval_loss"}
OF_PREFERENCES = (
    ("Accuracy by step.", "chosen preferred", {"training": "accuracy", "held out": "eval_accuracy"}),
    ("Log-probability of an answer by step.", "nats", {"chosen": "logp_chosen", "rejected": "logp_rejected"}),
)
OF_REWARDS = (
    ("Reward by step.", "mean reward", {"sampled": "reward", "held out, greedy": "eval_reward"}),
    ("Groups without a difference, and answers cut off, by step.", "share", {
        "groups of one reward": "flat_groups", "cut off": "truncated"}),
    ("Entropy by step.", "nats per token", {"sampled": "entropy"}),
    ("Length of an answer by step.", "tokens", {"sampled": "answer_tokens"}),
)  # fmt: skip
HEADLINES = 5  # held-out figures among the headline numbers
ROWS, FIGURES = 300, 40  # in a table of the page; a page must not grow with the run


def figures(result: Mapping[str, Any]) -> list[Fact]:
    """Before and after: the loss, the task's metrics, general text."""
    before, after = (result.get("eval", {}).get(side, {}) for side in ("before", "after"))
    names = [name for name in after if name != "perplexity"][:HEADLINES]
    labels = {"loss": "held-out loss"}
    was = {name: f"{number(before[name])} before" if name in before else "" for name in names}
    facts = [Fact(labels.get(name, figure_name(name)), after[name], was[name]) for name in names]
    lost = result.get("forgetting", {})
    if None not in (sides := [lost.get("loss_before"), lost.get("loss_after")]):
        facts.append(Fact("loss on general text", sides[1], f"{number(sides[0])} before"))
    elif (kl := lost.get("kl")) is not None:
        facts.append(Fact("KL from the base", kl, "nats per token of general text"))
    return facts


def of_training(training: Training) -> list[Section]:
    """Sections on a run's own figures: learning, forgetting, answers."""
    result = training.result
    objective = training.config.objective
    shown = OF_PREFERENCES if objective.is_preference else OF_REWARDS if objective.is_rewarded else ()
    weighed = [block for one in shown for block in _by_step(training.metrics, *one)]
    unit = f"{objective.kind}'s" if objective.is_preference else "nats per token"
    sections = [Section("Learning", [*_before_after(result), *_curve(training.metrics, unit), *weighed])]
    if lost := result.get("forgetting"):
        sections.append(Section("What it forgot", [*_forgot(lost), *_retained(result.get("retain") or {})]))
    if result.get("answers"):
        sections.append(Section("Answers", _answers(result["answers"])))
    return sections


def the_run(training: Training, folder: Path) -> Section:
    """What was trained on what, how, when and where, and how to do it again."""
    config, result = training.config, training.result
    train, machine, held_out = config.train, result.get("machine", {}), result.get("eval", {}).get("rows")
    took = result.get("total_seconds")
    facts: list[tuple[str, list[str]]] = [
        ("base", [config.base, result.get("dtype", ""), _kept_as(config.base_weights)]),
        ("objective", [_objective(config.objective)]),
        ("held to", [f"the base on {public_name(str(train.retain.data))}" if train.retain else ""]),
        ("data", [label(config.data.train), _count(result, "train_rows", "row"), f"{number(held_out or 0)} held out"]),
        ("form", [result.get("form", "")]),
        ("length", [_times(training.epochs), _count(result, "steps", "step"), _count(result, "tokens", "token")]),
        ("learning rate", [f"{train.lr:g}", train.schedule, _per_step(config)]),
        ("seed", [str(train.seed)]),
        ("activations", ["" if (way := result.get("checkpointing", "none")) == "none" else f"checkpointing: {way}"]),
        ("processes", [_several(int(result.get("processes", 1)))]),
        ("finished", [result.get("finished", ""), f"took {clock(took)}" if took else ""]),
        ("machine", [machine.get("device", ""), machine.get("cpu", ""), *_speed(result)]),
        ("made with", [f"{name} {version}" for name, version in result.get("versions", {}).items()]),
        ("again", [command("train", folder / "config.yaml", f"output={folder}-again")]),
    ]
    rows: list[list[Cell]] = [[name, ", ".join(filter(None, parts))] for name, parts in facts]
    return Section("The run", [Table(["", ""], [row for row in rows if row[1]])])


def _kept_as(weights: str) -> str:
    return "" if weights == "auto" else f"base_weights: {weights}"


def _objective(objective: ObjectiveConfig) -> str:
    """Its kind, rewards and numbers; nothing of plain supervision."""
    rewards = [f"reward {' + '.join(one.called for one in objective.reward)}"] if objective.reward else []
    options = [f"{name} {value:g}" for name, value in objective.options.items() if isinstance(value, float) and value]
    return "" if objective.kind == "sft" else ", ".join([objective.kind, *rewards, *options])


def _several(processes: int) -> str:
    return "" if processes == 1 else f"{processes}, which took each step together"


def _per_step(config: RunConfig) -> str:
    if config.objective.is_rewarded:
        prompts, samples, _ = config.objective.group
        return f"{number(prompts)} prompts with {number(samples)} answers per step"
    return f"{number(config.train.tokens_per_step)} tokens per step"


def _count(result: Mapping[str, Any], name: str, one: str) -> str:
    return counted(int(result[name]), one) if result.get(name) else ""


def _times(epochs: float | None) -> str:
    return "" if epochs is None else "once through the data" if epochs == 1 else f"{epochs:.3g} times through the data"


def _speed(result: Mapping[str, Any]) -> list[str]:
    speed, memory = result.get("tokens_per_second"), result.get("peak_memory_bytes")
    return [f"{number(speed)} tokens/s" if speed else "", f"{gib(memory)} at most" if memory else ""]


def _answers(rows: Sequence[Mapping[str, str | None]]) -> list[Block]:
    """What was asked and answered; what stands around every question alike is shown once."""
    before, asked, after = framed([row["prompt"] or "" for row in rows])
    samples = [
        Sample(excerpt(prompt), *(row[part] and excerpt(row[part] or "") for part in ANSWER[1:]))
        for row, prompt in zip(rows, asked, strict=True)
    ]
    frame: list[list[Cell]] = [["begins with", excerpt(before)], ["ends with", excerpt(after)]]
    shown = [row for row in frame if row[1]]
    return [*([Table(["every prompt", ""], shown)] if shown else []), Samples(samples)]


def _forgot(lost: Mapping[str, Any]) -> list[Block]:
    before, after, kl = (lost.get(name) for name in ("loss_before", "loss_after", "kl"))
    rise = None if before is None or after is None else after - before
    rows: list[list[Cell]] = [
        ["loss", before, after, rise, *(lost.get("rise_interval") or (None, None))],
        ["KL", 0.0, kl, kl, *(lost.get("kl_interval") or (None, None))],
    ]
    passages = f"{number(lost['passages'])} passages, " if lost.get("passages") else ""
    tokens = f"{passages}{number(lost.get('tokens'))} tokens of `{lost.get('source', '–')}`"
    words = [
        "The loss and KL(base ‖ adapted) on general text, in nats per token.",
        f"They were measured on {tokens}, which it wasn't trained on.",
        "On other passages of this kind, 95 % of changes would lie within the interval (bootstrap over passages).",
        "`deltaw scale` shows what a smaller factor would keep and what it would cost.",
    ]
    return [Table(["", "base", "adapted", "change", "95 % from", "to"], rows), Text(" ".join(words))]


def _retained(retain: Mapping[str, Any]) -> list[Block]:
    if None in (known := [retain.get(name) for name in ("tokens", "weight", "time_share", "kl")]):
        return []
    tokens, weight, time, kl = known
    words = [
        "It was held to the base while it learnt (`train.retain`):",
        f"{number(tokens)} tokens of `{public_name(str(retain.get('data', '–')))}`, weight {number(weight)}, about "
        f"{percent(float(time or 0))} of the time of training.",
        f"In its last steps the KL from the base on that text was {number(kl)} nats per token.",
    ]
    return [Text(" ".join(words))]


def _by_step(metrics: Metrics, title: str, y_label: str, names: Mapping[str, str]) -> list[Block]:
    """What an objective reports by step. `names`: of the lines, by what they are called."""
    lines = {kind: [line for line in metrics if name in line] for kind, name in names.items()}
    series = {
        kind: ([line["step"] for line in some], [line[names[kind]] for line in some])
        for kind, some in lines.items()
        if some
    }
    steps = [line for line in metrics if next(iter(names.values())) in line]
    if len(steps) < 2:
        return []
    columns = ["step", *names.values()]
    shown: list[list[Cell]] = [[line.get(name) for name in columns] for line in steps[-ROWS:]]
    svg = pictures.lines(series, x_label="step", y_label=y_label)
    return [Picture(svg, title, title.rstrip("."), Table([figure_name(name) for name in columns], shown))]


def _curve(metrics: Metrics, unit: str) -> list[Block]:
    steps = [line for line in metrics if "loss" in line]
    if len(steps) < 2:
        return []
    series = {}
    for kind, name in LOSSES.items():
        if lines := [line for line in metrics if name in line]:
            series[kind] = ([line["step"] for line in lines], [line[name] for line in lines])
    shown = [steps[i] for i in thinned([line["loss"] for line in steps], ROWS)]
    rows: list[list[Cell]] = [[line.get(name) for name in ("step", "loss", "lr", "grad_norm")] for line in shown]
    some = f"{len(shown)} of {number(len(steps))} steps: the highest and the lowest loss of each stretch"
    caption = f"{some}; all of them: `metrics.jsonl`, `deltaw inspect --json`" if len(shown) < len(steps) else ""
    table = Table(["step", "loss", "learning rate", "gradient norm"], rows, caption)
    svg = pictures.lines(series, x_label="step", y_label=f"loss, {unit}")
    return [Picture(svg, "Loss by step.", f"Training loss over {counted(len(steps), 'step')}", table)]


def _before_after(result: Mapping[str, Any]) -> list[Block]:
    before, after = (result.get("eval", {}).get(side, {}) for side in ("before", "after"))
    if not before or not after:
        return []
    rows: list[list[Cell]] = [[figure_name(name), before.get(name), after[name]] for name in list(after)[:FIGURES]]
    return [Table(["", "base", "adapted"], rows, f"On {number(result['eval'].get('rows'))} held-out rows")]
