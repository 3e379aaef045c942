"""plan(config): a rehearsal of the run in half a minute: the memory, time and disk that it will take, and what becomes
of its rows.

Nothing is computed from the model's shape: each kind of work that the run consists of is done once at its largest, with
the run's own functions, and its peak and its seconds are taken.

    opening         the base, the data, the adapter
    reference       the longest answers of preferences, which are weighed once
    held-out loss   the longest rows, as many as are taken at a time
    sampling        of a run on rewards: answers to the longest prompts, as many as a step has, their first NEW tokens;
                    steps are planned as if no answer ended before its time (imagined.py), and rewards cost nothing
    answers         the rows with the longest prompts, as many as are generated together, their first NEW tokens
    asking          what the base says of a part of the text of `train.retain`
    training        the largest batch of the whole run, unless it takes long; smaller ones for the fit (fit.py); one
                    update
    forgetting      the largest chunk of the general text
    saving          a checkpoint and the adapter, into a temporary folder beside the run's

Memory is the largest of these peaks. Time is the sum of the seconds, each by how often it comes and how many tokens or
rows it has; steps are counted, not estimated (data/loader.py). Left out are report.html, which is written when the
run is finished, and the gain where frozen layers are computed once per run (opening.py).
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltaw.base.load import pick_device
from deltaw.config import RunConfig
from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.evaluation.held_out import answer, rows_asked
from deltaw.evaluation.weighing import summed_logprobs
from deltaw.generate.cache import bytes_per_token
from deltaw.generate.rollout import sampled
from deltaw.generate.sampling import Sampling
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training import fit, length, memory
from deltaw.training.batch_size import sized
from deltaw.training.checkpoint import save_checkpoint
from deltaw.training.fit import Point
from deltaw.training.imagined import imagined_groups
from deltaw.training.largest import Work, count_tokens, largest_chunk, largest_evaluation
from deltaw.training.learner import Learner
from deltaw.training.measuring import ANSWERS, plain_loss, what_was_forgotten
from deltaw.training.memory import Window, window, working_on
from deltaw.training.opening import Opened, general_rows, open_run, start_from_data
from deltaw.training.planned import Phase, Plan, Retaining
from deltaw.training.preflight import check_longest, disk_needed, existing, work_of
from deltaw.training.recomputing import choose
from deltaw.training.retain import Retain
from deltaw.training.shortage import explain

NEW, ROWS = 32, 128  # tokens generated for each of so many rows
LONG, PIECE = 16_384, 10.0  # tokens from which on smaller pieces are tried first; seconds that one piece may take
ASKING = "asking the base"
WHAT_IF = (0.5, 1, 2, 4)  # times train.tokens_per_batch


def plan(config: RunConfig, display: Display | None = None) -> Plan:
    """Rehearse a run, leaving nothing behind. Raises InputError as `train` does, RunError where memory is too small."""
    display = display or Display()
    device = pick_device(config.train.device)
    with window(device) as opening:
        opened = open_run(config, display)
        general = general_rows(config, opened.model, opened.retained)
    opened = sized(opened, display)
    available = memory.held_memory(device) + memory.free_memory(device)
    learner, dataset = opened.learner(display), opened.dataset
    work = work_of(opened, learner)
    opened, choice = choose(opened, learner, work, display)
    with _folder_beside(Path(config.output)) as folder:
        rehearsal = Rehearsal(opened, learner, work, Run(folder), display)
        try:
            with memory.bounded(device):
                check_longest(opened.model, dataset.rows)
                rehearsal.play(general)
        except Exception as error:
            fix = "plan again with one of these, then train with it"
            raise explain(error, opened, learner, Run(folder), fix=fix) or error from None
    needs, base = fit.fit_memory(rehearsal.points), opened.model.base
    share, longest = work.longest_supervised / max(1, work.longest_tokens), opened.longest
    sizes = [
        work.longest_tokens if f == 1 else max(longest, int(f * opened.config.train.batch_tokens)) for f in WHAT_IF
    ]
    return Plan(
        output=config.output,
        computed=", its base ".join(filter(None, [f"{str(base.dtype).removeprefix('torch.')} on {device}", base.kept])),
        steps=work.steps,
        tokens_per_step=length.tokens_of_step(opened.config, dataset),
        length=[
            *config.notes(),
            *length.notes(config, opened.config, work.steps),
            *length.warnings(config, opened.config, dataset, work.steps),
        ],
        checkpointing=choice.way,
        recomputed=choice,
        tokens=work.tokens,
        supervised_tokens=work.supervised,
        retained=rehearsal.retained(),
        longest_batch=work.longest_tokens,
        phases=[Phase("opening", opening.peak, opening.seconds), *rehearsal.phases],
        memory_there=available,
        fit=needs,
        what_if={size: needs.bytes_at(size, share * size) for size in sorted(sizes)},
        shared=work.shared,
        tokens_per_second=work.tokens / max(rehearsal.seconds_a_token * work.computed, 1e-9),
        disk_needed=disk_needed(opened, learner),
        disk_free=shutil.disk_usage(existing(Path(config.output))).free,
        data=opened.dataset.report,
    )


class Rehearsal:
    """Each kind of work at its largest, in the order of the run."""

    def __init__(self, opened: Opened, learner: Learner, work: Work, run: Run, display: Display) -> None:
        self.opened, self.learner, self.work, self.run, self.display = opened, learner, work, run, display
        self.model, self.device = opened.model, opened.device
        self.held_out, self.every, self.total = opened.dataset.eval, opened.config.train, opened.total
        self.phases: list[Phase] = []
        self.points: list[Point] = []

    def play(self, general: Sequence[Example]) -> None:
        """All of it."""
        answering = [] if self.opened.config.objective.is_preference else [self._answers]
        losses = [] if self.opened.is_rewarded else [self._held_out_loss]
        evaluating = [*losses, *answering] if self.held_out else []
        starting = [self._start] if self.opened.config.adapter.from_data else []
        weighing = [self._reference] if self.opened.objective.references else []
        sampling = [self._sampling] if self.opened.is_rewarded else []
        acts = [*starting, *weighing, *evaluating, *sampling, self._update, self._training, self._saving]
        if retain := self.opened.retain(self.model.forward):
            acts.append(lambda: self._asking(retain))
        acts += [lambda: self._forgetting(general)] if general else []
        with self.display.task("rehearsing", len(acts)) as progress:
            for number, act in enumerate(acts):
                progress(number)
                act()
            progress(len(acts))

    @property
    def seconds_a_token(self) -> float:
        """Of the largest batches that were measured."""
        most = max(point.tokens for point in self.points)
        largest = [point for point in self.points if point.tokens == most]
        return sum(point.seconds for point in largest) / sum(point.tokens for point in largest)

    def retained(self) -> Retaining | None:
        """What `train.retain` takes; None where the run has none."""
        retain, seconds = self.every.retain, {phase.name: phase.seconds for phase in self.phases}
        if retain is None or not self.work.steps:
            return None
        asking, training = seconds[ASKING], seconds["training"]
        besides = asking + self.seconds_a_token * self.work.general
        return Retaining(retain.data, self.work.general, besides, training + asking)

    def _note(self, name: str, seen: Window, times: float, more: int = 0) -> None:
        """`times`: how much of it the run has, for each of what was done; `more`: bytes that all of it would hold."""
        self.phases.append(Phase(name, seen.peak + more, seen.seconds * times))

    def _start(self) -> None:
        with window(self.device) as seen:
            start_from_data(self.opened, self.display)
        self._note("start", seen, 1)

    def _reference(self) -> None:
        """What the reference says of every answer, once; and of mismatched ones, which each step asks again."""
        dataset, anchored = self.opened.dataset, self.opened.objective.anchored
        rows = largest_evaluation(dataset.rows)
        with window(self.device) as seen:
            summed_logprobs(self.model.forward, rows)
        once = count_tokens(dataset.train) + count_tokens(self.held_out)
        self._note(
            "reference", seen, ((2 if anchored else 1) * once + anchored * self.work.tokens) / count_tokens(rows)
        )

    def _held_out_loss(self) -> None:
        rows = largest_evaluation(self.held_out)
        with window(self.device) as seen:
            plain_loss(self.model, rows)
        often = 2 + self._evaluations
        self._note("held-out loss", seen, count_tokens(self.held_out) / count_tokens(rows) * often)

    @property
    def _evaluations(self) -> int:
        """On the way."""
        return math.ceil(self.total / self.every.eval_every) if self.every.eval_every else 0

    def _sampling(self) -> None:
        _, samples, longest = self.opened.config.objective.group
        prompts, new = [group.prompt for group in imagined_groups(self.opened)], min(NEW, longest)
        sampling = Sampling(max_new_tokens=new, temperature=1.0, seed=0)
        with window(self.device) as seen, working_on(ANSWERS):
            sampled(self.model.base.model, prompts, samples, sampling, frozenset())
        rest = min(len(prompts) * samples, ROWS) * (longest - new) * bytes_per_token(self.model.base.model)
        self._note("sampling", seen, self.work.steps * longest / new, rest)

    def _answers(self) -> None:
        config, rewarded = self.opened.answering, self.opened.is_rewarded
        asked = rows_asked(self.model, self.held_out, config, every_row=rewarded)
        by_prompt = sorted(asked, key=lambda row: int(row.loss_mask.sum()) - len(row.tokens))
        rows, new = by_prompt[:ROWS], min(NEW, config.max_new_tokens)
        if not rows:
            return
        try:
            with window(self.device) as seen, working_on(ANSWERS):
                answer(self.model, rows, new)
        except InputError as error:  # the run leaves them out as well, unless a metric needs them
            if config.metrics:
                raise
            self.display.say(f"no answers to held-out rows: {error.what}")
            return
        sampled = self.total // (self.every.sample_every or self.total + 1)
        often = 2 + (self._evaluations if rewarded else 0)
        times = (often * len(asked) + sampled * config.samples) / len(rows) * config.max_new_tokens / new
        rest = len(rows) * (config.max_new_tokens - new) * bytes_per_token(self.model.base.model)
        self._note("answers", seen, times, rest)

    def _update(self) -> None:
        for parameter in self.learner.attached.parameters:
            parameter.grad = torch.zeros_like(parameter)
        with window(self.device) as seen:
            self.learner.optimizer.step()
        self.learner.optimizer.zero_grad()
        self._note("updates", seen, self.work.steps)

    def _training(self) -> None:
        longest, supervised = self.work.longest_tokens, self.work.longest_supervised
        sizes = [longest // part for part in (8, 4, 2, 1)]
        if longest > LONG:
            sizes += [longest // part for part in (64, 32, 16)]
        options: dict[str, Any] = {"accumulating": self.work.batches > 1, "seconds": PIECE, "whole": self.work.batch}
        for point in fit.measure(self.model.forward, self.learner, self.work.longest, sizes, **options):
            self.points.append(point)
        peak, most = max(point.peak for point in self.points), max(point.tokens for point in self.points)
        if most < longest:
            peak = max(peak, fit.fit_memory(self.points).bytes_at(longest, supervised))
            self.display.say(
                f"a batch of {longest:,} tokens takes too long to try: its memory is estimated from batches of up to "
                f"{most:,}, and the run may take longer than predicted"
            )
        peak = memory.of_all_steps(peak, self.work.steps, self.device)
        tokens = self.work.computed + self.work.general
        self.phases.append(Phase("training", peak, self.seconds_a_token * tokens))

    def _asking(self, retain: Retain) -> None:
        """What the base says of the general text."""
        with window(self.device) as seen:
            rows = retain.ask(0)
        width, asked = rows[0][0].nbytes, sum(map(len, rows))
        self._note(ASKING, seen, retain.text.asked(self.work.general, width) / asked)

    def _saving(self) -> None:
        with window(self.device) as seen:
            save_checkpoint(self.run.checkpoints, self.learner.saved(), 1)
            self.learner.attached.adapter(self.opened.id).save(self.run.adapter)
        self._note("saving", seen, math.ceil(self.total / self.every.save_every))

    def _forgetting(self, general: Sequence[Example]) -> None:
        rows = largest_chunk(general)
        with window(self.device) as seen:
            what_was_forgotten(self.model, rows)
        self._note("forgetting", seen, count_tokens(general) / count_tokens(rows))


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A folder on the run's disk, gone when the block ends. Raises InputError."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".deltaw-plan-", dir=existing(output.absolute().parent))
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}", fix="choose another output") from None
    with folder as name:
        yield Path(name)
