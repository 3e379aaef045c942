"""Preflight: what would fail in the third hour fails in the first minute.

Before its first step a run takes the largest batch that it will meet forward and backward, and the largest things that
it will be measured on forward, and checks that its checkpoints will fit on the disk. That costs at most a batch; what
the first step or evaluation shows anyway is left to them. Nothing that a step depends on is changed.

Where memory runs out, here or later, shortage.py says which settings would have fitted.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deltaw.base.frozen import embedding_of
from deltaw.base.limits import Limits
from deltaw.data.example import Example
from deltaw.data.examples import lengths_of
from deltaw.errors import InputError, RunError
from deltaw.files.output import gib
from deltaw.model import Model
from deltaw.run import Run
from deltaw.training.checkpoint import list_checkpoints
from deltaw.training.fit import one_pass
from deltaw.training.imagined import imagined_work
from deltaw.training.largest import Work, count_tokens, largest_chunk, largest_evaluation, shared_line, work_left
from deltaw.training.learner import Learner
from deltaw.training.measuring import plain_loss, what_was_forgotten
from deltaw.training.memory import bounded, free_memory, is_out_of_memory, release
from deltaw.training.opening import Opened

ALIKE = 0.9  # of the largest batch: what shows as much
TIGHT = 0.25  # share of the free memory below which nothing need be tried


def short_form(opened: Opened, learner: Learner, run: Run, general: Sequence[Example] = ()) -> None:
    """Try the run's largest work before its first step in this process. `general`: the text of forgetting.

    It leaves out what the first step shows anyway, and the general text where its logits would take little of the
    memory that is free. Raises RunError where the disk is too small, and whatever PyTorch raises where memory runs out.
    """
    check_disk(opened, learner, run)
    model, held_out, work = opened.model, opened.dataset.eval, work_of(opened, learner)
    with bounded(opened.device):
        check_longest(model, opened.dataset.rows)
        if work.first < ALIKE * work.longest_tokens:
            one_pass(model.forward, learner, work.batch(), accumulating=work.batches > 1)
        if general and _logits_bytes(model, largest_chunk(general)) > TIGHT * free_memory(opened.device):
            what_was_forgotten(model, largest_chunk(general))
        if (
            held_out and run.before.is_file() and not opened.is_rewarded
        ):  # else the base is measured on them all, right now
            plain_loss(model, largest_evaluation(held_out))
    release(opened.device)


def work_of(opened: Opened, learner: Learner, say: Callable[[str], object] = lambda line: None) -> Work:
    """What is left of the run for `learner`. Its largest batch has the general text that goes with it, all of which
    meets the head. `say`: where a line goes that says what of it is shared."""
    left = max(0, learner.total - learner.state.step)
    state, config = learner.state, learner.config
    if opened.is_rewarded:
        work = imagined_work(opened, left)
        for line in shared_line(work.shared):
            say(line)
        return work
    work = work_left(opened.dataset.train, config, state.position, left, opened.world.size, shares=opened.shares)
    for line in shared_line(work.shared):
        say(line)
    text, retain = opened.kept_text, config.retain
    if text is None or retain is None or not left:
        return work
    pieces, room = list[Example](), retain.share * work.longest_tokens
    for piece in text.at(range(len(text.pieces))):
        if room <= 0:
            break
        pieces.append(replace(piece, loss_mask=np.arange(len(piece.tokens)) > 0))
        room -= len(piece.tokens)
    general = text.tokens(state.step, learner.total)
    return replace(work, longest=[*work.longest, *pieces], pieces=tuple(pieces), general=general)


def check_longest(model: Model, rows: Sequence[Example]) -> None:
    """Run the longest row forward where it is beyond what the base was made for. Raises InputError where it can't be:
    not every border shows in the model's modules (base/limits.py)."""
    context = Limits.of(model.base.model).context
    row = rows[int(lengths_of(rows).argmax())]
    if context is None or len(row.tokens) <= context:
        return
    try:
        plain_loss(model, [row])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{row.origin}: {len(row.tokens):,} tokens, and this base takes no more than {context:,}: {error!s:.80}",
            fix=f"set data.max_length to {context}: longer texts are then split; of other rows, data.too_long decides "
            "whether they are left out or cut",
        ) from None


def _logits_bytes(model: Model, examples: Sequence[Example]) -> int:
    """What `forgetting` holds of a chunk: five times its logits in float32, as far as it is most at once."""
    vocabulary = embedding_of(model.base.model).shape[0]
    return 5 * 4 * vocabulary * count_tokens(examples)


def disk_needed(opened: Opened, learner: Learner) -> int:
    """Bytes of the checkpoints that the run holds at once (those kept, the best, the one being written) and of its
    adapter, which has twice the rank where the start is taken off."""
    every, total = opened.config.train, opened.total
    best = bool(every.eval_every and opened.dataset.eval)
    written = total // every.save_every + 1 + (total // (every.eval_every or total))
    factors = sum(p.nbytes for p in learner.attached.parameters)
    adapter = factors * (2 if opened.config.adapter.moves_base else 1)
    return min(every.keep + best + 1, written) * learner.checkpoint_bytes() + adapter


def check_disk(opened: Opened, learner: Learner, run: Run) -> None:
    """Raise RunError where what the run will write doesn't fit beside what it has written."""
    written = len(list_checkpoints(run.checkpoints)) * learner.checkpoint_bytes()
    needed, free = disk_needed(opened, learner) - written, free_disk(run.folder)
    if needed > free:
        raise RunError(
            f"output {run.folder}: its checkpoints and adapter need {gib(needed)}, but only {gib(free)} are free",
            fix=f"free some space, choose another output, or set train.keep lower than {opened.config.train.keep}",
        )


def free_disk(path: Path) -> int:
    """Bytes that are free where it lies, or will."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
