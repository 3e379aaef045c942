"""plan(config): the run rehearsed in a minute, and what it will take: memory, time, disk, and what becomes of the rows.

Nothing is computed from the model's shape: each kind of work that the run consists of is done once at its largest, with
the run's own functions, and its peak and its seconds are taken.

    opening         the base, the data, the adapter
    held-out loss   the longest rows, as many as are taken at a time
    answers         the rows with the longest prompts, as many as are generated together, their first NEW tokens
    training        the largest batch of the whole run, unless it takes long; smaller ones for the fit (memory.py); one
                    update
    forgetting      the largest chunk of the general text
    saving          a checkpoint and the adapter, into a temporary folder beside the run's

Memory is the largest of these peaks. Time is the sum of the seconds, each by how often it comes and how many tokens or
rows it has; steps are counted, not estimated (data/loader.py). What is left out: report.html, which is written when the
run is finished, and that frozen layers may be computed once a run (training/frozen.py), which makes it faster.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.base.load import pick_device
from deltaw.config import RunConfig
from deltaw.data.dataset import DataReport
from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.evaluate.forgetting import forgetting
from deltaw.evaluate.held_out import answer, held_out_loss, rows_asked
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.show.text import clock, gib
from deltaw.training import memory
from deltaw.training.checkpoint import save_checkpoint
from deltaw.training.memory import Fit, Point, Window, window
from deltaw.training.preflight import (
    QUIET,
    Work,
    check_longest,
    disk_needed,
    existing,
    explain,
    largest_chunk,
    largest_evaluation,
    work_left,
)
from deltaw.training.run import general_rows, prepare_run
from deltaw.training.trainer import Trainer

SHAPES, SETTLED = 5, 16  # kernels that a step of another shape adds; steps until the holes are as large as they get
NEW, ROWS = 32, 128  # tokens generated for each of so many rows
LONG, PIECE = 16_384, 10.0  # tokens from which on smaller pieces are tried first; seconds that one piece may take
WHAT_IF = (0.5, 1, 2, 4)  # times train.tokens_per_batch


@dataclass(frozen=True)
class Phase:
    """One kind of work: the peak of one piece of it in bytes, and the seconds of all of it in the run."""

    name: str
    peak: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes, seconds, counts; `what_if`: the training's peak by tokens in a batch."""

    output: str
    computed: str  # "bfloat16 on cpu"
    steps: int
    tokens: int
    supervised_tokens: int
    longest_batch: int
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

    def text(self) -> str:
        """For people."""
        lines = [
            ("run", f"{self.output}, in {self.computed}"),
            ("steps", f"{self.steps:,}, the largest batch of {self.longest_batch:,} tokens"),
            ("tokens", f"{self.tokens:,}, of which {self.supervised_tokens:,} are trained ({self.data.share:.1%})"),
            ("memory", f"{gib(self.largest.peak)} at its peak, in {self.largest.name}; {gib(self.memory_there)} there"),
            ("time", f"{clock(self.seconds)}, training at {self.tokens_per_second:.0f} tokens/s; the report aside"),
            ("disk", f"{gib(self.disk_needed)}; {gib(self.disk_free)} free"),
            *_rows(self.data),
        ]
        head = [f"{name:8} {text}".rstrip() for name, text in lines]
        table = [f"{'':24}{'peak':>10}{'time':>10}"]
        table += [f"{phase.name:24}{gib(phase.peak):>10}{clock(phase.seconds):>10}" for phase in self.phases]
        fit = f"{gib(self.fit.fixed)} + {gib(self.fit.token * 1000)} for 1,000 tokens"
        fit += f" + {gib(self.fit.supervised * 1000)} for 1,000 trained ones"
        what_if = [f"{tokens:,} tokens".ljust(24) + f"{gib(peak):>10}" for tokens, peak in self.what_if.items()]
        return "\n".join([*head, "", *table, "", f"a batch takes {fit}:", *what_if])


def plan(config: RunConfig, display: Display | None = None) -> Plan:
    """Rehearse a run; nothing of it stays. Raises InputError as `train` does, RunError where memory is too small."""
    display = display or Display()
    device = pick_device(config.train.device)
    with window(device) as opened:
        model, dataset = prepare_run(config, display)
        general = general_rows(config, model)
    there = memory.held_memory(device) + memory.free_memory(device)
    with _folder_beside(Path(config.output)) as folder:
        trainer = Trainer(config, Run(folder), model, dataset, display)
        work = work_left(trainer)
        rehearsal = Rehearsal(trainer, work)
        try:
            with memory.bounded(device):
                check_longest(trainer)
                rehearsal.play(general)
        except Exception as error:
            raise explain(error, trainer, fix="plan with one of these, then train with it") or error from None
        needed = disk_needed(trainer)
    fit = memory.fit_memory(rehearsal.points)
    share, longest = work.supervised / work.tokens, max(len(example.tokens) for example in dataset.train)
    sizes = [work.longest_tokens if f == 1 else max(longest, int(f * config.train.tokens_per_batch)) for f in WHAT_IF]
    return Plan(
        output=config.output,
        computed=f"{str(model.base.dtype).removeprefix('torch.')} on {model.base.device}",
        steps=work.steps,
        tokens=work.tokens,
        supervised_tokens=work.supervised,
        longest_batch=work.longest_tokens,
        phases=[Phase("opening", opened.peak, opened.seconds), *rehearsal.phases],
        memory_there=there,
        fit=fit,
        what_if={size: fit.bytes_at(size, share * size) for size in sizes},
        tokens_per_second=1 / max(rehearsal.seconds_a_token, 1e-9),
        disk_needed=needed,
        disk_free=shutil.disk_usage(existing(Path(config.output))).free,
        data=dataset.report,
    )


class Rehearsal:
    """Every kind of work at its largest, in the order of the run."""

    def __init__(self, trainer: Trainer, work: Work) -> None:
        self.trainer, self.work = trainer, work
        self.device = trainer.model.base.device
        self.phases: list[Phase] = []
        self.points: list[Point] = []

    def play(self, general: Sequence[Example]) -> None:
        """All of it."""
        evaluating = [self._held_out_loss, self._answers] if self.trainer.dataset.eval else []
        starting = [self._start] if self.trainer.config.adapter.from_data else []
        acts = [*starting, *evaluating, self._update, self._training, self._saving]
        acts += [lambda: self._forgetting(general)] if general else []
        with self.trainer.display.task("rehearsing", len(acts)) as update:
            for number, act in enumerate(acts):
                update(number)
                act()
            update(len(acts))

    @property
    def seconds_a_token(self) -> float:
        """Of the largest batches that were measured."""
        most = max(point.tokens for point in self.points)
        largest = [point for point in self.points if point.tokens == most]
        return sum(point.seconds for point in largest) / sum(point.tokens for point in largest)

    def _note(self, name: str, seen: Window, times: float, more: int = 0) -> None:
        """`times`: how much of it the run has, for each of what was done; `more`: bytes that all of it would hold."""
        self.phases.append(Phase(name, seen.peak + more, seen.seconds * times))

    def _start(self) -> None:
        with window(self.device) as seen:
            self.trainer.begin()
        self._note("start", seen, 1)

    def _held_out_loss(self) -> None:
        held_out, total, every = self.trainer.dataset.eval, self.trainer.total, self.trainer.config.train.eval_every
        rows = largest_evaluation(held_out)
        with window(self.device) as seen:
            held_out_loss(self.trainer.model.forward, rows)
        share = sum(len(row.tokens) for row in held_out) / sum(len(row.tokens) for row in rows)
        self._note("held-out loss", seen, share * (2 + (math.ceil(total / every) if every else 0)))

    def _answers(self) -> None:
        config, held_out = self.trainer.config.evaluate, self.trainer.dataset.eval
        asked = rows_asked(self.trainer.model, held_out, config)
        by_prompt = sorted(asked, key=lambda row: int(row.loss_mask.sum()) - len(row.tokens))
        rows, new = by_prompt[:ROWS], min(NEW, config.max_new_tokens)
        if not rows:
            return
        try:
            with window(self.device) as seen:
                answer(self.trainer.model, rows, new)
        except InputError as error:  # the run leaves them out as well, unless a metric needs them
            if config.metrics:
                raise
            self.trainer.display.say(f"no answers to held-out rows: {error.what}")
            return
        sampled = self.trainer.total // (self.trainer.config.train.sample_every or self.trainer.total + 1)
        times = (2 * len(asked) + sampled * config.samples) / len(rows) * config.max_new_tokens / new
        rest = len(rows) * (config.max_new_tokens - new) * _cache_bytes(self.trainer.model.base.model)
        self._note("answers", seen, times, rest)

    def _update(self) -> None:
        for parameter in self.trainer.attached.parameters:
            parameter.grad = torch.zeros_like(parameter)
        with window(self.device) as seen:
            self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self._note("updates", seen, self.work.steps)

    def _training(self) -> None:
        longest, supervised = self.work.longest_tokens, self.work.longest_supervised
        sizes = [longest // part for part in (8, 4, 2, 1)]
        if longest > LONG:
            sizes += [longest // part for part in (64, 32, 16)]
        accumulating = self.work.batches > 1
        for point in memory.measure(self.trainer, self.work.longest, sizes, accumulating=accumulating, seconds=PIECE):
            self.points.append(point)
        peak, most = max(point.peak for point in self.points), max(point.tokens for point in self.points)
        if most < longest:
            peak = max(peak, memory.fit_memory(self.points).bytes_at(longest, supervised))
            self.trainer.display.say(
                f"a batch of {longest:,} tokens takes too long to try: its memory is worked out from batches of up to "
                f"{most:,}, and it may take longer than the time says"
            )
        if self.device.type == "cpu":  # what steps of other shapes add: holes as far as Heap lets them, kernels
            holes = (memory.GROWTH - 1) * min(1, self.work.steps / SETTLED)
            peak += round(holes * peak) + min(memory.KERNELS, SHAPES * self.work.steps) * memory.KERNEL_BYTES
        self.phases.append(Phase("training", peak, self.seconds_a_token * self.work.tokens))

    def _saving(self) -> None:
        trainer, every = self.trainer, self.trainer.config.train.save_every
        with window(self.device) as seen:
            save_checkpoint(trainer.run.checkpoints, trainer.state, trainer.attached, trainer.optimizer, 1)
            trainer.attached.adapter(trainer.id).save(trainer.run.adapter)
        self._note("saving", seen, math.ceil(trainer.total / every))

    def _forgetting(self, general: Sequence[Example]) -> None:
        rows = largest_chunk(general)
        with window(self.device) as seen:
            forgetting(self.trainer.model, "general text", rows, QUIET)
        self._note("forgetting", seen, sum(len(row.tokens) for row in general) / sum(len(row.tokens) for row in rows))


def _cache_bytes(model: Any) -> int:
    """What a generated token leaves behind for the next ones: a key and a value in each layer of attention.

    0 where the config has no heads: the state of a recurrence doesn't grow.
    """
    config = model.config.get_text_config(decoder=True)
    asked = _most(config, "num_attention_heads")
    heads = _most(config, "num_key_value_heads") or asked
    size = _most(config, "head_dim") or _most(config, "hidden_size") // max(1, asked)
    return 2 * _most(config, "num_hidden_layers") * heads * size * next(model.parameters()).itemsize


def _most(config: Any, name: str) -> int:
    """A size in a config, the largest where each layer has its own, 0 where there is none."""
    value = getattr(config, name, None)
    return max((v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)), default=0)


def _rows(data: DataReport) -> list[tuple[str, str]]:
    """What becomes of the rows, those that are lost by number."""
    lines = [("rows", f"{data.train_rows:,} to train on, {data.eval_rows:,} held out, of {data.rows_read:,} read")]
    kinds = {"left out": data.too_long_dropped, "cut": data.truncated, "with nothing left to train": data.untrained}
    long = ", ".join(f"{count:,} {what}" for what, count in kinds.items() if count)
    if long:
        lines.append(("", f"too long, {long}: {_listed(data.too_long, sum(kinds.values()), ', ')}"))
    if data.unusable:
        lines.append(("", f"unusable, {data.unusable:,}: {_listed(data.problems, data.unusable, '; ')}"))
    if data.duplicates or data.overlap:
        lines.append(("", f"{data.duplicates:,} copies of another; {data.overlap:,} held out that are trained on, too"))
    return lines


def _listed(found: Sequence[str], count: int, between: str) -> str:
    shown = between.join(found)
    return shown if count <= len(found) else f"{shown}{between}and {count - len(found):,} more"


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A folder on the disk that the run will be on, gone when the block ends. Raises InputError."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".deltaw-plan-", dir=existing(output.absolute().parent))
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}", fix="choose another output") from None
    with folder as name:
        yield Path(name)
