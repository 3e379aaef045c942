"""`deltaw eval`: an adapter beside its base (evaluation/side_by_side.py), as a table; each row's answers as JSONL."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from deltaw.evaluation.side_by_side import SideBySide, evaluate
from deltaw.files.atomic import write_text_atomic
from deltaw.files.lock import claimed_file
from deltaw.kernels.copies import making
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import table
from deltaw.show.text import counted, figure_name, rounded
from deltaw.training.groups import PART
from deltaw.training.reward_sides import reward_side_by_side
from deltaw.training.rewarding import REWARD

LOWER = ("loss", "perplexity")  # is better
PREFERRED = {"margin": True, "accuracy": True, "likelier": True, "logp_chosen": True}  # of preferences


def eval_named(
    name: str,
    data: str | None,
    *,
    base: str | None,
    use_adapter: bool,
    use_base: bool,
    metrics: Sequence[str] | None,
    rows: int | None,
    max_tokens: int | None,
    output: str | None,
    allow_code: bool,
    display: Display,
) -> Result:
    """`output`: a JSONL file of each row's answers and scores. Raises InputError before the weights are read."""
    with making(), nullcontext() if output is None else claimed_file(Path(output)):
        named = Named.of(name)
        sides: dict[str, Any] = {"base": base, "use_adapter": use_adapter, "use_base": use_base, "rows": rows}
        sides |= {"allow_code": allow_code, "display": display}
        if (
            named.config is not None
            and named.config.objective.is_rewarded
            and (data, metrics, max_tokens) == (None,) * 3
        ):
            measured = reward_side_by_side(named, **sides)
        else:
            every = output is not None
            measured = evaluate(named, data, metrics=metrics, max_tokens=max_tokens, every_answer=every, **sides)
        lines = [in_words(measured)]
        if output is not None:
            rows_of = [json.dumps(row, ensure_ascii=False) + "\n" for row in measured.answers()]
            write_text_atomic(Path(output), "".join(rows_of))
            lines += ["", f"answers: {output}"]
    return Result({**measured.to_json(), "output": output}, "\n".join(lines))


def in_words(measured: SideBySide) -> str:
    """A line per figure: the base's, the adapter's, and what became of it."""
    sides = {"base": measured.base, "adapter": measured.adapter}
    figures = {side: evaluation.summary() for side, evaluation in sides.items() if evaluation}
    higher = {**dict.fromkeys(LOWER, False), **PREFERRED, **{m.name: m.higher_is_better for m in measured.metrics}}
    rewards = {name: True for name in measured.main.summary() if name == REWARD or name.startswith(PART)}
    higher |= {**rewards, "truncated": False} if rewards else {}
    rows = []
    for name in measured.main.summary():
        values = [side[name] for side in figures.values() if name in side]
        rows.append([figure_name(name), *[""] * (len(figures) - len(values)), *map(rounded, values)])
        if len(values) == 2:
            rows[-1] += change(*values, higher_is_better=higher.get(name))
    head = ("", *figures, *(("change", "") if len(figures) == 2 else ()))
    of = measured.data or "held-out"
    where = f"{counted(measured.rows, 'row')} of {of}" if measured.data else counted(measured.rows, f"{of} row")
    tokens = f"{counted(measured.main.supervised_tokens, measured.main.counts)} measured"
    for name, ends in measured.main.intervals.items():
        if None not in ends:
            tokens += f"; {name} between {ends[0]:.3f} and {ends[1]:.3f} (95 %)"
    other = "" if measured.as_trained is not False else "; not the rows that the run held out when it was trained"
    return "\n".join([table(rows, head, align="lrrrl", rule=True), "", f"{where}, {tokens}{other}"])


def change(base: float, adapter: float, *, higher_is_better: bool | None) -> tuple[str, str]:
    """By how much, and whether that is better, if that can be said; nothing of a change that isn't shown."""
    text = rounded(adapter - base)
    if not any(digit in text for digit in "123456789"):
        return "0", ""
    text = text if adapter < base else f"+{text}"
    if higher_is_better is None:
        return text, ""
    better = (adapter > base) == higher_is_better
    return text, "better" if better else "worse"
