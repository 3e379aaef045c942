"""Preflight: what would fail in hour three fails in minute one, and says what to do.

Before its first step a run takes the largest batch that it will meet forward and backward, and the largest things that
it will be measured on forward, and looks whether its checkpoints will fit on the disk. That costs a batch at most; what
the first step or evaluation shows anyway is left to them. Nothing that a step depends on is changed.

Which batch is the largest is known without the model: what step k trains on is a function of the lengths of the rows
(data/loader.py).

Where memory runs out, then or later, `explain` fits its cost on smaller batches (memory.py) and names settings that
would have fitted.
"""

import math
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltaw.base.limits import Limits
from deltaw.data.example import Example
from deltaw.data.loader import fill, plan
from deltaw.data.pack import pack
from deltaw.errors import InputError, RunError, command
from deltaw.evaluate import forgetting as general_forgetting
from deltaw.evaluate import held_out
from deltaw.files.paths import written
from deltaw.show.progress import Display
from deltaw.show.text import gib
from deltaw.training.checkpoint import list_checkpoints
from deltaw.training.memory import (
    Fit,
    Point,
    bounded,
    fit_memory,
    free_memory,
    held_memory,
    is_out_of_memory,
    measure,
    one_pass,
    release,
)

if TYPE_CHECKING:
    from deltaw.training.trainer import Trainer

ALIKE = 0.9  # of the largest batch: what shows as much
TIGHT = 0.25  # share of the free memory below which nothing need be tried
HEADROOM = 0.7  # share of what is there beside the fixed part, that a setting may take to be called one that fits
LOOKING = 5.0  # seconds in which the largest batch of the run is looked for
PER_PARAMETER = 16  # bytes: float32 master, gradient and two moments
FORGOTTEN, ANSWERS, LOSS = "measuring what was forgotten", "answering rows", "measuring the loss on held-out rows"
MEASURED = {  # by a module that no training step passes through, the most telling first
    "deltaw.evaluate.forgetting": FORGOTTEN,
    "deltaw.generate.engine": ANSWERS,
    "deltaw.evaluate.held_out": LOSS,
}
QUIET = Display(quiet=True)


@dataclass(frozen=True)
class Work:
    """What is left of a run, counted. `longest`: the examples of its largest batch, of which `batches` make a step."""

    steps: int
    tokens: int
    supervised: int
    longest: list[Example]
    batches: int
    first: int  # tokens of the largest batch of the next step

    @property
    def longest_tokens(self) -> int:
        return sum(len(example.tokens) for example in self.longest)

    @property
    def longest_supervised(self) -> int:
        return sum(int(example.loss_mask.sum()) for example in self.longest)


def work_left(trainer: "Trainer") -> Work:
    """The steps from the trainer's state to its end. No step left: all zeros, and no longest batch.

    Every step is looked at, for up to `LOOKING` seconds; of a longer run those that were stand for the others.
    """
    examples, left = trainer.dataset.train, max(0, trainer.total - trainer.state.step)
    lengths = [len(example.tokens) for example in examples]
    trained = [int(example.loss_mask.sum()) for example in examples]
    steps, tokens, supervised, until = 0, 0, 0, time.monotonic() + LOOKING
    largest, longest, batches, first = (0, 0), list[int](), 0, 0
    for step in islice(_steps(trainer, lengths), left):
        for batch in step:
            size = sum(lengths[n] for n in batch), sum(trained[n] for n in batch)
            tokens, supervised = tokens + size[0], supervised + size[1]
            if size > largest:
                largest, longest, batches = size, batch, len(step)
            first = max(first, size[0]) if not steps else first
        steps += 1
        if time.monotonic() > until:
            break
    tokens, supervised = (count * left // max(1, steps) for count in (tokens, supervised))
    return Work(left, tokens, supervised, [examples[n] for n in longest], batches, first)


def _steps(trainer: "Trainer", lengths: list[int]) -> Iterator[list[list[int]]]:
    """For ever."""
    config = trainer.config.train
    epoch, start = trainer.state.epoch, trainer.state.step_in_epoch
    sizes = {"tokens_per_step": config.tokens_per_step, "tokens_per_batch": config.tokens_per_batch}
    while True:
        yield from plan(lengths, **sizes, seed=config.seed, epoch=epoch)[start:]
        epoch, start = epoch + 1, 0


def short_form(trainer: "Trainer", general: Sequence[Example] = ()) -> None:
    """Try what the run will come to, before its first step in this process. `general`: the text of forgetting.

    Left out is what the first step shows anyway, and the general text where its logits would take little of the memory
    that is free. Raises RunError where the disk is too small, and whatever PyTorch raises where memory is.
    """
    check_disk(trainer)
    work, device = work_left(trainer), trainer.model.base.device
    with bounded(device):
        check_longest(trainer)
        if work.first < ALIKE * work.longest_tokens:
            one_pass(trainer, pack(work.longest), accumulating=work.batches > 1)
        if general and _logits_bytes(trainer, largest_chunk(general)) > TIGHT * free_memory(device):
            general_forgetting.forgetting(trainer.model, "", largest_chunk(general), QUIET)
        if trainer.dataset.eval and trainer.run.before.is_file():  # else the base is measured on them all, right now
            held_out.held_out_loss(trainer.model.forward, largest_evaluation(trainer.dataset.eval))
    release(device)


def check_longest(trainer: "Trainer") -> None:
    """Run the longest row forward where it is beyond what the base was made for. Raises InputError where it can't be:
    not every border shows in the model's modules (base/limits.py)."""
    context = Limits.of(trainer.model.base.model).context
    row = max([*trainer.dataset.train, *trainer.dataset.eval], key=lambda row: len(row.tokens))
    if context is None or len(row.tokens) <= context:
        return
    try:
        held_out.held_out_loss(trainer.model.forward, [row])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{row.origin}: {len(row.tokens):,} tokens, more than {context:,} this base can't be given: {error!s:.80}",
            fix=f"set data.max_length to {context}: data.too_long says whether such rows are left out or cut",
        ) from None


def _logits_bytes(trainer: "Trainer", examples: Sequence[Example]) -> int:
    """What `forgetting` holds of a chunk: five times its logits in float32, as far as it is most at once."""
    vocabulary = trainer.model.base.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return 5 * 4 * vocabulary * sum(len(example.tokens) for example in examples)


def largest_chunk(general: Sequence[Example]) -> list[Example]:
    """What `forgetting` takes at a time, at its largest."""
    lengths = [len(example.tokens) for example in general]
    groups = fill(range(len(general)), lengths, general_forgetting.TOKENS_AT_ONCE)
    return [general[n] for n in max(groups, key=lambda group: sum(lengths[n] for n in group))]


def largest_evaluation(examples: Sequence[Example]) -> list[Example]:
    """What `held_out_loss` takes at a time, at its largest: it sorts by length."""
    taken, room = list[Example](), held_out.TOKENS_AT_ONCE
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        room -= len(example.tokens)
        if taken and room < 0:
            break
        taken.append(example)
    return taken


def checkpoint_bytes(trainer: "Trainer") -> int:
    """Of one checkpoint: all that trains with two moments, and what an initialiser left; its texts are some KiB."""
    layers = trainer.attached.layers.values()
    constants = sum(constant.nbytes for layer in layers for constant in layer.constants().values())
    return 3 * sum(parameter.nbytes for parameter in trainer.attached.parameters) + constants


def disk_needed(trainer: "Trainer") -> int:
    """Bytes of the checkpoints that the run holds at once (those kept, the best, the one being written) and of its
    adapter, which has twice the rank where the start is taken off."""
    config, every = trainer.config, trainer.config.train
    best = bool(every.eval_every and trainer.dataset.eval)
    written = trainer.total // every.save_every + 1 + (trainer.total // (every.eval_every or trainer.total))
    adapter = sum(p.nbytes for p in trainer.attached.parameters) * (2 if config.adapter.moves_base else 1)
    return min(every.keep + best + 1, written) * checkpoint_bytes(trainer) + adapter


def check_disk(trainer: "Trainer") -> None:
    """Raise RunError where what the run will write doesn't fit beside what it has written."""
    folder = existing(trainer.run.folder)
    written = len(list_checkpoints(trainer.run.checkpoints)) * checkpoint_bytes(trainer)
    needed, free = disk_needed(trainer) - written, shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"output {trainer.run.folder}: its checkpoints and adapter need {needed:,} bytes, {free:,} are free",
            fix=f"free space, choose another output, or set train.keep lower than {trainer.config.train.keep}",
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def explain(error: BaseException, trainer: "Trainer", fix: str | None = None) -> RunError | None:
    """What to say where memory ran out: the estimate and three settings that would fit. None for another error.

    `fix`: the last line, in place of how to go on with the run.
    """
    if not is_out_of_memory(error):
        return None
    device, measured = trainer.model.base.device, evaluation_in(error)
    traceback.clear_frames(error.__traceback__)  # they hold the tensors that were too many
    trainer.optimizer.zero_grad()
    release(device)
    there = held_memory(device) + free_memory(device)
    if measured:
        after = f"after step {trainer.state.step} of {trainer.total}"
        settings = _settings_of_evaluation(trainer, measured)
        what = f"out of memory {measured} {after}: it takes more than the {gib(there)} there are"
        return RunError("\n  ".join([what, *settings]), fix or _go_on(trainer, settings[0]))
    work = work_left(trainer)
    points = list[Point]()
    sizes = [work.longest_tokens // part for part in (16, 8, 4)]
    try:
        with bounded(device):
            points.extend(measure(trainer, work.longest, sizes, accumulating=work.batches > 1))
    except Exception as again:
        if not is_out_of_memory(again):
            raise
        traceback.clear_frames(again.__traceback__)
    found, takes = list[Setting](), "takes more than that, and so do smaller ones"
    if len(points) > 1:
        fit = fit_memory(points)
        needed = fit.bytes_at(work.longest_tokens, work.longest_supervised)
        found = settings_that_fit(trainer, work, fit, there)
        takes = f"takes about {gib(needed)}"
    at = f"step {trainer.state.step + 1} of {trainer.total}"
    what = f"out of memory in {at}: {gib(there)} are there, a batch of {work.longest_tokens:,} tokens {takes}"
    lines = [f"{setting.text}: about {gib(setting.bytes)}" for setting in found] or ["only a smaller base would fit"]
    return RunError("\n  ".join([what, *lines]), fix or _go_on(trainer, found[0].text if found else None))


@dataclass(frozen=True)
class Setting:
    """What to change in the run file, the largest batch then, and the peak that it would come to."""

    text: str
    tokens: int
    bytes: int


def settings_that_fit(trainer: "Trainer", work: Work, fit: Fit, there: float) -> list[Setting]:
    """Up to three changes under which the largest batch stays well below the `there` bytes that it didn't fit into.

    Each comes with as many tokens a batch as fit. Fewer tokens alone come first: they change the speed, not the run.
    Where the batch should have fitted, by the fit, only what is surely smaller is named.
    """
    tokens, longest = work.longest_tokens, max(len(example.tokens) for example in trainer.dataset.train)
    token = fit.token + fit.supervised * work.longest_supervised / tokens
    explained = fit.fixed + tokens * token > there
    limit = fit.fixed + HEADROOM * (there - fit.fixed) if explained else math.inf

    def setting(change: str, saved: float, factor: float, at_most: float) -> Setting | None:
        fixed, per_token = fit.fixed - saved, max(1.0, factor * token)
        room = (limit - fixed) / per_token
        fewer = tokens if room >= at_most == tokens else _rounded(min(at_most, room))
        words = [change] * bool(change)
        words += [f"train.tokens_per_batch={fewer}"] * (fewer < tokens)
        words += [f"data.max_length={fewer}"] * (fewer < longest)  # a row longer than a batch stands alone
        return Setting(" ".join(words), fewer, round(fixed + per_token * fewer)) if fewer else None

    plain = setting("", 0, 1, tokens if explained else tokens / 2)
    enough = plain.tokens if plain else 0
    changes = [setting(*change, tokens) for change in _savings(trainer)] if explained else []
    smaller = [setting("", 0, 1, enough / part) for part in (2, 4)]
    found = [plain, *(change for change in changes if change and change.tokens > enough), *smaller]
    return [one for one in found if one][:3]


def _savings(trainer: "Trainer") -> list[tuple[str, float, float]]:
    """(change, bytes that it saves whatever the batch, factor on what a token costs)."""
    base, spec = trainer.model.base, trainer.config.adapter
    trained = {id(parameter) for parameter in trainer.attached.parameters}
    frozen = sum(weight.nbytes for weight in base.model.parameters() if id(weight) not in trained)
    learning = PER_PARAMETER * sum(parameter.numel() for parameter in trainer.attached.parameters)
    savings = [("train.dtype=bfloat16", frozen / 2, 0.5)] if base.dtype == torch.float32 else []
    if spec.full:
        savings.append(("adapter={rank: 16}", 0.9 * learning, 1.0))
    elif spec.rank > 1:
        savings.append((f"adapter.rank={spec.rank // 2}", learning / 2, 1.0))
    return savings


def _rounded(tokens: float) -> int:
    """Down to a multiple of 64, or below that to a power of two; 0 below 4."""
    return int(tokens) // 64 * 64 if tokens >= 64 else 1 << int(tokens).bit_length() - 1 if tokens >= 4 else 0


def evaluation_in(error: BaseException) -> str | None:
    """What was being measured when `error` was raised, from the functions it passed through; None in training."""
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return next((said for module, said in MEASURED.items() if module in modules), None)


def _settings_of_evaluation(trainer: "Trainer", measured: str) -> list[str]:
    """What takes less; how much isn't known, since one of the smallest pieces was too large."""
    new, rows = trainer.config.evaluate.max_new_tokens, trainer.dataset.eval or trainer.dataset.train
    settings = {
        FORGOTTEN: ["evaluate.general=null"],
        ANSWERS: [f"evaluate.max_new_tokens={max(1, new // 2)}", "evaluate.metrics=[]"],
        LOSS: [f"data.max_length={max(len(row.tokens) for row in rows) // 2}"],
    }[measured]
    if trainer.model.base.dtype == torch.float32:
        settings.append("train.dtype=bfloat16")
    return [*settings, "base=…, a smaller one"][:3]


def _go_on(trainer: "Trainer", setting: str | None) -> str:
    """How to go on with the run that just failed: with a setting that may be changed on the way, else anew."""
    folder, saved = trainer.run.folder, list_checkpoints(trainer.run.checkpoints)
    remains = f"{saved[-1].name} remains" if saved else "nothing was trained yet"
    if setting and " " not in setting and setting.startswith(("train.tokens_per_batch", "evaluate.")):
        return f"{remains}; go on with: {command('train', folder, setting, options=['--allow'])}"
    words = [
        folder / "config.yaml",
        setting or "base=…",
        *([f"output={written(str(folder))}-smaller"] if saved else []),
    ]
    return f"{remains}; a new run: {command('train', *words, options=[] if saved else ['--replace'])}"
