"""The sections of a report's page on what the update does by trial (effect.py): pictures, tables and sentences."""

import math
from collections.abc import Sequence

from deltaw.analysis import pictures
from deltaw.analysis.effect.effect import OTHER, TASK, Effect, Point
from deltaw.analysis.effect.tokens import CLEAR, CURVE, Token
from deltaw.analysis.effect.words import in_words, measured_on
from deltaw.analysis.maps import layer_map
from deltaw.analysis.page import Block, Cell, Picture, Section, Table, Text, excerpt
from deltaw.analysis.words import short
from deltaw.evaluation.intervals import Interval

INTERVALS = "All intervals are of 95 %: where the figure would lie on other rows like these."
WITH_PARTS_OFF, BY_TOKEN = "With parts of it off", "Token by token"
LABELS = {TASK: "the task's labels", OTHER: "general text"}
HEAD = ["task loss", "from", "to", "KL", "from", "to", "task loss, change", "from", "to", "KL, change", "from", "to"]


def of_effect(effect: Effect) -> list[Section]:
    """What it does, token by token, and with parts of it off."""
    words = [*in_words(effect), f"{measured_on(effect)} {INTERVALS}"]
    blocks: list[Block] = [Text("\n\n".join(words)), _pareto(effect), *_modules(effect)]
    sections = [Section("What it does", blocks)]
    if off := _without(effect):
        sections.append(Section(WITH_PARTS_OFF, off))
    return [*sections, Section(BY_TOKEN, _tokens(effect))]


def _pareto(effect: Effect) -> Picture:
    """Task loss against KL, along the scale and along the rank."""
    names = {"scale": "by scale", "rank": "cut to a rank"}
    curves = {names[group]: points for group, points in effect.curves.items() if group == "scale" or len(points) > 1}
    series = {
        name: ([p.kl.value for p in points], [p.task_loss.value for p in points]) for name, points in curves.items()
    }
    labels = {name: [_label(p, name) for p in points] for name, points in curves.items()}
    svg = pictures.scatter(
        series, x_label="KL from the base on general text, nats per token", y_label="task loss, nats per token",
        labels=labels, joined=True, log_y=True,
    )  # fmt: skip
    rows: list[list[Cell]] = [[p.group or "", p.name, *_cells(p)] for p in effect.of(None, "scale", "rank")]
    caption = (
        "What each scale (×) and each rank (r) buys: down is better at the task, left is nearer to the base. Ranks are "
        "the trained update cut (Eckart-Young); nothing is trained again."
    )
    return Picture(svg, caption, "Task loss against KL from the base", Table(["", "", *HEAD], rows, "nats per token"))


def _label(point: Point, curve: str) -> str:
    if point.group is None:
        return point.name if curve == "by scale" else ""
    return f"× {point.name}" if point.group == "scale" else f"r {point.name}"


def _cells(point: Point) -> list[Cell]:
    intervals = (point.task_loss, point.kl, point.task_change, point.kl_change)
    return [cell for one in intervals for cell in (one.value, one.low, one.high)]


def _modules(effect: Effect) -> list[Block]:
    sizes = {path: one.value(TASK) for path, one in effect.modules.items()}
    more: dict[str, float | None] = {}
    for path, one in effect.modules.items():
        task, other = one.value(TASK), one.value(OTHER)
        more[path] = math.log2(task / other) if task and other else None
    chance = {path: math.log2(task / one.random) if (task := one.value(TASK)) and one.random else None
              for path, one in effect.modules.items()}  # fmt: skip
    return [
        layer_map(
            {path: None if size is None else 100 * size for path, size in sizes.items()},
            "‖ΔWx‖ / ‖Wx‖ on task tokens, %",
            "How much each update adds to what its weight gives, on the inputs that reach it in the task's rows.",
        ),
        layer_map(
            more,
            "task over general text, doublings",
            "The same beside general text: 1 is twice as much on the task's tokens, −1 half as much, 0 no difference.",
            diverging=True,
        ),
        layer_map(
            chance,
            "task over random inputs, doublings",
            "The same beside chance, inputs drawn at random: 0 is what the sizes of `ΔW` and `W` alone would give.",
            diverging=True,
        ),
    ]


def _without(effect: Effect) -> list[Block]:
    """With the update off in one layer, in one kind of module."""
    blocks: list[Block] = []
    if kinds := effect.of("kind"):
        series = {
            "the task's loss rises by": [p.task_change.value for p in kinds],
            "KL from the base falls by": [-p.kl_change.value for p in kinds],
        }
        svg = pictures.bars([short(p.name) for p in kinds], series, y_label="nats per token", errors={
            "the task's loss rises by": [_half(p.task_change) for p in kinds],
            "KL from the base falls by": [_half(p.kl_change) for p in kinds],
        })  # fmt: skip
        blocks.append(
            _picture(
                svg,
                "The update off in one kind of module, on in all others. Whiskers are as long as the 95 % intervals.",
                "kind",
                kinds,
            )
        )
    if layers := effect.of("layer"):
        blocks += [
            _by_layer("task loss without it, change in nats", layers, [p.task_change for p in layers]),
            _by_layer("KL without it, change in nats", layers, [p.kl_change for p in layers]),
        ]
    if blocks:
        words = (
            "How much the task loses, and how much nearer to the base general text comes, while a part of the update "
            "is off. The parts don't add up: where two layers do the same, neither is missed while the other is on."
        )
        blocks.insert(0, Text(words))
    return blocks


def _by_layer(label: str, layers: Sequence[Point], changes: Sequence[Interval]) -> Picture:
    xs = [float(point.name) for point in layers]
    svg = pictures.lines(
        {"change": (xs, [one.value for one in changes])},
        x_label="layer whose update is off",
        y_label=label,
        bands={"change": (xs, [one.low for one in changes], [one.high for one in changes])},
        baseline=("no change", 0.0),
    )
    caption = "The update off in all modules of one layer. The band is the 95 % interval of the difference."
    return _picture(svg, caption, "layer", layers)


def _half(one: Interval) -> float | None:
    return None if one.low is None or one.high is None else (one.high - one.low) / 2


def _picture(svg: str, caption: str, what: str, points: Sequence[Point]) -> Picture:
    rows: list[list[Cell]] = [[p.name, *_cells(p)] for p in points]
    return Picture(svg, caption, f"What each {what}'s update is for", Table([what, *HEAD], rows, "nats per token"))


def _tokens(effect: Effect) -> list[Block]:
    names = {kind: LABELS[kind] for kind in effect.tokens}
    rows: list[list[Cell]] = []
    for kind, tokens in effect.tokens.items():
        for what, one in (
            ("loss, change", tokens.change), ("helped, share", tokens.helped), ("hurt, share", tokens.hurt),
            ("same first guess, share", tokens.same_guess),
        ):  # fmt: skip
            rows.append([names[kind], what, one.value, one.low, one.high])
        rows.append([names[kind], "share that holds half of KL", tokens.half_of_kl, None, None])
    blocks: list[Block] = [
        Table(["", "", "", "95 % from", "to"], rows,
              f"Tuned against base, per token; helped and hurt are by more than {CLEAR:g} nats"),
        _curve(effect),
    ]  # fmt: skip
    general = effect.tokens[OTHER]
    blocks += [
        _table(general.most_moved, "Where general text moved most from the base (KL, nats)"),
        _table(general.most_hurt, "General text: where the update hurt most"),
        _table(effect.tokens[TASK].most_hurt, "The task: where the update hurt most"),
        _table(effect.tokens[TASK].most_helped, "The task: where it helped most"),
    ]
    return [block for block in blocks if not (isinstance(block, Table) and not block.rows)]


def _curve(effect: Effect) -> Picture:
    """The change of each token's loss, in order."""
    xs = [100 * i / (CURVE - 1) for i in range(CURVE)]
    series = {LABELS[kind]: (xs, tokens.curve) for kind, tokens in effect.tokens.items()}
    svg = pictures.lines(
        series, x_label="tokens, from the most helped to the most hurt, %", y_label="change of the loss, nats",
        baseline=("no change", 0.0),
    )  # fmt: skip
    rows: list[list[Cell]] = [[x, *(tokens.curve[i] for tokens in effect.tokens.values())]
                              for i, x in enumerate(xs) if i % 5 == 0]  # fmt: skip
    return Picture(
        svg,
        "Below the dashed line the update helped, above it hurt; where a curve crosses it is the share helped.",
        "Change of loss by token, sorted",
        Table(["% of tokens", *series], rows, "change of the loss, nats"),
    )


def _table(tokens: Sequence[Token], caption: str) -> Table:
    head = ["after …", "token", "base guessed", "tuned guessed", "base loss", "tuned loss", "KL", "row"]
    rows: list[list[Cell]] = []
    for one in tokens:
        words = [f"… {_seen(one.before.lstrip())}", *map(_seen, (one.token, one.base_guess, one.tuned_guess))]
        rows.append([*words, one.base_loss, one.tuned_loss, one.kl, one.origin])
    return Table(head, rows, caption)


def _seen(words: str) -> str:
    """A token as a reader sees it: line ends, tabs and a blank in front are shown."""
    words = excerpt(words.replace("\n", "⏎").replace("\t", "⇥"), 120)
    return f"␣{words[1:]}" if words.startswith(" ") else words
