"""`deltaw runs`: the runs in a folder (deltaw/runs.py), as a table that fits the terminal."""

import time
from collections.abc import Sequence
from pathlib import Path

from deltaw.errors import command, listed
from deltaw.files.output import gib
from deltaw.runs import Entry, list_runs, ranked
from deltaw.show.result import Result
from deltaw.show.table import ending, fitted, terminal_width
from deltaw.show.text import counted, figure_name, one_line, rounded

SHORT = {
    "exact_match": "exact",
    "rouge_l": "ROUGE-L",
    "f1": "F1",
    "character_error_rate": "CER",
    "word_error_rate": "WER",
    "phoneme_error_rate": "PER",
}
NAME, WORDS = 30, 24  # characters of a run's name, of a base's or a file's
LEFT_OUT = ("size", "data", "base", "rank", "lr", "when")  # in this order, where there is no room; then metrics


def runs_named(folder: str, *, by: str, width: int | None = None) -> Result:
    """`by`: when, name, loss or a metric. Raises InputError."""
    entries = ranked(list_runs(folder), by)
    data = {"folder": folder, "runs": [entry.to_json() for entry in entries]}
    if not entries:
        return Result(data, f"no runs in {folder}; {command('train', 'run.yaml')} makes one where its `output` says")
    return Result(data, run_table(entries, width or terminal_width()))


def run_table(entries: Sequence[Entry], width: int) -> str:
    """A line per run, and below it what the table couldn't say."""
    metrics = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
    titles = [SHORT.get(name, one_line(figure_name(name), 16)) for name in metrics]
    head = ["run", "state", "steps", "loss", *titles, "lr", "rank", "base", "data", "size", "when"]
    align = "llrr" + "r" * len(metrics) + "rrllrl"
    rows = [_row(entry, metrics) for entry in entries]
    text, missing = fitted(rows, head, align=align, drop=[*LEFT_OUT, *titles[:0:-1]], width=width)
    notes = []
    if any(entry.loss is None and entry.train_loss is not None for entry in entries):
        notes.append("in parentheses: the training loss of the last step; no rows were held out")
    if missing:
        notes.append(f"no room for: {', '.join(missing)} (a wider terminal, or --json)")
    for state, of in (("broken", "problem"), ("failed", "failed")):
        lines = [f"{one_line(e.name, 40)}: {_words(getattr(e, of))}" for e in entries if getattr(e, of)]
        notes += [f"{state}:", listed([one_line(line) for line in lines])] if lines else []
    return "\n".join([text, "", counted(len(entries), "run"), *notes])


def _words(why: str | list[str]) -> str:
    return why if isinstance(why, str) else f"{', '.join(why)} couldn't be measured"


def _row(entry: Entry, metrics: Sequence[str]) -> list[str]:
    loss = rounded(entry.loss) if entry.loss is not None else ""
    if not loss and entry.train_loss is not None:
        loss = f"({rounded(entry.train_loss)})"
    return [
        ending(one_line(entry.name), NAME),
        entry.state,
        "" if entry.steps is None else f"{entry.steps:,}",
        loss,
        *(rounded(entry.metrics[name]) if name in entry.metrics else "" for name in metrics),
        "" if entry.lr is None else f"{entry.lr:g}",
        "" if entry.rank is None else str(entry.rank),
        _last_part((entry.base or "").partition("@")[0]),
        _last_part(entry.data),
        "" if entry.adapter_bytes is None else gib(entry.adapter_bytes),
        _moment(entry.when),
    ]


def _last_part(name: str | None) -> str:
    """Of a base or a file, without what many have before it: a folder, an organisation, `builtin:`."""
    return ending(one_line(Path(name.removeprefix("builtin:")).name), WORDS) if name else ""


def _moment(when: float) -> str:
    """To the minute this year, else the date."""
    moment = time.localtime(when)
    return time.strftime("%m-%d %H:%M" if moment.tm_year == time.localtime().tm_year else "%Y-%m-%d", moment)
