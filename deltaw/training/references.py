"""The reference of a run of preferences: what the model said of each answer before the first step.

The reference is the model that training begins with: the base, with the adapter off, or the adapter that the run starts
from (`adapter: {from: …}`). So there is no second model in memory, and nothing is computed twice: the summed
log-probability of every answer is found once, before the first step, and kept in the run's folder.

    references.safetensors    float64 [N] each: train, eval (in the order of the rows), and where the objective wants
                              an anchor train_beside, eval_beside (data/weighed.py)
                              in its header, `of`: SHA-256 over the rows', the base's and the start's fingerprints

A run that resumes reads them. Where they are lost, or are of other rows (a run that was extended over new data), they
are computed again from the base; those of an adapter that it started from can't be, since it has been trained on.
Rejected: computing them in every step (a third more work in each epoch), and a second set of factors (which costs
memory for the whole run, to save a file of 8 bytes per answer).
"""

import hashlib
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from deltaw.data.examples import Examples
from deltaw.data.weighed import mismatched
from deltaw.errors import InputError, RunError
from deltaw.evaluation.weighing import Sums, anchor_of, figures_of, summed_logprobs, weighed_sums
from deltaw.files.safetensors import load_safetensors, read_header, save_safetensors
from deltaw.run import Run
from deltaw.show.progress import Display, Progress
from deltaw.training.opening import Opened
from deltaw.training.world import ALONE, World

Asked = dict[str, dict[str, np.ndarray]]  # what references said, by what they are of


def with_references(opened: Opened, run: Run, display: Display, *, fresh: bool, asked: Asked | None = None) -> Opened:
    """The same with what the reference says of each answer, where the objective asks for it. `fresh`: no step is taken
    yet; `asked`: what was asked for other runs on this base, which is added to. Raises RunError where it is lost."""
    if not opened.objective.references:
        return opened
    file, of = run.references, _of(opened)
    try:
        known = load_safetensors(file)
        if read_header(file).metadata.get("of") == of and {*known} == {*_wanted(opened)}:
            return _with(opened, {name: tensor.numpy() for name, tensor in known.items()})
    except (InputError, OSError):
        pass
    start = opened.lineage.started_from
    if start and not fresh:
        raise RunError(
            f"{file} is lost, or of other rows: what {start.name}, the adapter that this run started from, said of "
            "each answer can't be found again, since it has been trained on",
            fix="put the file back, or begin again: deltaw train run.yaml --replace",
        )
    asked, what = {} if asked is None else asked, f"{of} {[*_wanted(opened)]}"
    if what not in asked:
        with nullcontext() if start else opened.attached.disabled():
            asked[what] = _computed(opened, display)
    arrays = asked[what]
    save_safetensors({name: torch.from_numpy(array) for name, array in arrays.items()}, file, {"of": of})
    return _with(opened, arrays)


def handed_out(opened: Opened, world: World) -> Opened:
    """The same on every rank: rank 0's."""
    if world.is_alone or not opened.objective.references:
        return opened
    sizes = {name: len(rows) for name, rows in _wanted(opened).items()}
    mine = opened.references if world.is_first else {name: np.zeros(size) for name, size in sizes.items()}
    tensors = [torch.from_numpy(mine[name]) for name in sizes]
    world.hand_out(tensors, "what the reference says of the answers")
    return _with(opened, {name: tensor.numpy() for name, tensor in zip(sizes, tensors, strict=True)})


def held_out(opened: Opened, world: World = ALONE) -> tuple[float, dict[str, float]]:
    """The loss on the held-out answers, finite or not, and what is to be said of them. Several processes take as many
    rows each."""
    weighed, forward, objective = opened.weighed("eval"), opened.model.forward, opened.objective
    if objective.anchored:
        objective = objective.with_anchor(anchor_of(forward, weighed))
    share = range(world.rank, len(opened.dataset.eval.units), world.size)
    sums = weighed_sums(forward, weighed, objective, share)
    if not world.is_alone:
        loss, count, *figures = world.sums(sums.values, "the loss on held-out answers")
        sums = Sums(loss, int(count), dict(zip(sums.figures, figures, strict=True)))
    return sums.loss / sums.count if sums.count else math.nan, figures_of(sums, objective)


def _wanted(opened: Opened) -> dict[str, Examples]:
    """The rows of each array."""
    parts = {"train": opened.dataset.train, "eval": opened.dataset.eval}
    beside = {f"{name}_beside": rows for name, rows in parts.items()} if opened.objective.anchored else {}
    return {name: rows for name, rows in (parts | beside).items() if len(rows)}


def _computed(opened: Opened, display: Display) -> dict[str, np.ndarray]:
    wanted, done, arrays = _wanted(opened), 0, dict[str, np.ndarray]()
    with display.task("the reference", sum(map(len, wanted.values()))) as progress:
        for name, rows in wanted.items():
            beside = name.endswith("_beside")
            examples = [mismatched(rows, number) for number in range(len(rows))] if beside else rows
            seen = partial(_beyond, progress, done)  # after the examples of the arrays before this one
            arrays[name] = summed_logprobs(opened.model.forward, examples, progress=seen, say=display.say)
            done += len(rows)
    if wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        rows = wanted[wrong[0]]
        row = rows.origin(int(np.flatnonzero(~np.isfinite(arrays[wrong[0]]))[0]))
        raise RunError(f"{row}: its log-probability under the reference isn't finite", fix="look at it, or use float32")
    return arrays


def _beyond(progress: Progress, before: int, number: int) -> None:
    progress(before + number)


def _with(opened: Opened, arrays: dict[str, np.ndarray]) -> Opened:
    return replace(opened, references=arrays)


def _of(opened: Opened) -> str:
    start = opened.lineage.started_from
    parts = (opened.dataset.fingerprint, opened.id.fingerprint, start.fingerprint if start else "")
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
