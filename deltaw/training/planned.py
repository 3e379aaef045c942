"""What a run will take, as `deltaw plan` says it (plan.py finds it out)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaw.data.report import DataReport
from deltaw.files.output import gib
from deltaw.show.table import table
from deltaw.show.text import clock, counted
from deltaw.training.fit import Fit
from deltaw.training.largest import shared_line
from deltaw.training.recomputing import Choice


@dataclass(frozen=True)
class Phase:
    """One kind of work: the peak of one piece of it in bytes, and the seconds of all of it in the run."""

    name: str
    peak: int
    seconds: float


@dataclass(frozen=True)
class Retaining:
    """General text that is passed beside the task's tokens (`train.retain`), and the seconds that it takes, of those of
    the whole training."""

    data: str
    tokens: int
    seconds: float
    training: float

    def line(self) -> str:
        """For people."""
        more = self.seconds / max(1e-9, self.training - self.seconds)
        return (
            f"{self.tokens:,} tokens of {self.data} besides, held to the base: {clock(self.seconds)}, {more:.0%} more"
        )


@dataclass(frozen=True)
class Plan:
    """What a run will take, in bytes, seconds and counts; `what_if`: the training's peak by tokens in a batch."""

    output: str
    computed: str  # "bfloat16 on cpu"
    steps: int
    tokens_per_step: int
    length: list[str]  # what there is to say of it (length.py)
    checkpointing: str  # none, blocks or offload
    recomputed: Choice  # the same, with what was measured of it
    tokens: int
    supervised_tokens: int
    retained: Retaining | None
    longest_batch: int
    shared: float  # of the tokens, which examples share with others, so that they aren't computed again
    phases: list[Phase]
    memory_there: int
    fit: Fit
    what_if: dict[int, int]
    tokens_per_second: float
    disk_needed: int
    disk_free: int
    data: DataReport

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        peak = {"peak_memory_bytes": self.largest.peak, "peak_in": self.largest.name}
        return {**asdict(self), **peak, "seconds": round(self.seconds, 1)}

    def _tokens(self) -> str:
        if self.data.is_asked:
            return f"up to {self.tokens:,}, of which up to {self.supervised_tokens:,} are sampled and trained"
        return f"{self.tokens:,}, of which {self.supervised_tokens:,} are trained ({self.data.share:.1%})"

    def _steps(self) -> str:
        batch = f"the largest batch of {self.longest_batch:,}"
        return f"{self.steps:,} of up to {self.tokens_per_step:,} tokens, {batch}"

    def text(self) -> str:
        """For people."""
        lines = [
            ("run", f"{self.output}, in {self.computed}"),
            ("steps", self._steps()),
            *(("", line) for line in self.length),
            ("tokens", self._tokens()),
            *(("", line) for line in shared_line(self.shared)),
            *([("retain", self.retained.line())] if self.retained else []),
            (
                "memory",
                f"{gib(self.largest.peak)} at its peak, in {self.largest.name}; {gib(self.memory_there)} available",
            ),
            *([("", self.recomputed.line())] if self.checkpointing != "none" else []),
            ("time", f"{clock(self.seconds)}, training at {self.tokens_per_second:.0f} tokens/s, without the report"),
            ("disk", f"{gib(self.disk_needed)}; {gib(self.disk_free)} free"),
            *_rows(self.data),
        ]
        head = [f"{name:8} {text}".rstrip() for name, text in lines]
        phases = [(phase.name, gib(phase.peak), clock(phase.seconds)) for phase in self.phases]
        fit = f"{gib(self.fit.fixed)} + {gib(self.fit.token * 1000)} per 1,000 tokens"
        if self.fit.supervised:
            fit += f" + {gib(self.fit.supervised * 1000)} per 1,000 trained ones"
        what_if = [(f"{tokens:,} tokens", gib(peak)) for tokens, peak in self.what_if.items()]
        tables = table(phases, ("", "peak", "time"), align="lr"), table(what_if, align="lr")
        return "\n".join([*head, "", tables[0], "", f"a batch takes {fit}:", tables[1]])


def _rows(data: DataReport) -> list[tuple[str, str]]:
    """What becomes of the rows; those that are lost are named by number."""
    lines = [("rows", f"{data.train_rows:,} to train on, {data.eval_rows:,} held out, of {data.rows_read:,} read")]
    kinds = {"left out": data.too_long_dropped, "cut": data.truncated, "with nothing left to train": data.untrained}
    long = ", ".join(f"{count:,} {what}" for what, count in kinds.items() if count)
    if long:
        lines.append(("", f"too long, {long}: {_listed(data.too_long, sum(kinds.values()), ', ')}"))
    if data.split_rows:
        lines.append(
            ("", f"{counted(data.split_rows, 'text')} split into {data.pieces:,} pieces, {data.kept:.1%} kept")
        )
    if data.unusable:
        lines.append(("", f"unusable, {data.unusable:,}: {_listed(data.problems, data.unusable, '; ')}"))
    if data.duplicates or data.overlap:
        lines.append(
            (
                "",
                f"{counted(data.duplicates, 'copy', 'copies')} of another; "
                f"{counted(data.overlap, 'held-out row is', 'held-out rows are')} also trained on",
            )
        )
    return lines


def _listed(names: Sequence[str], count: int, between: str) -> str:
    shown = between.join(names)
    return shown if count <= len(names) else f"{shown}{between}and {count - len(names):,} more"
