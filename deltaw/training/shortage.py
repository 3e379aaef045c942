"""What to say when memory ran out: how much it would have taken, and settings that would have fitted.

For a training step, both are estimated from smaller batches that are run now (fit.py). For an evaluation, only what
takes less is named: its smallest piece was too large.
"""

import math
import traceback
from dataclasses import dataclass

import torch

from deltaw.base.forward import Forward
from deltaw.errors import RunError, command
from deltaw.files.output import gib
from deltaw.files.paths import written
from deltaw.run import Run
from deltaw.training.checkpoint import list_checkpoints
from deltaw.training.fit import Fit, Point, fit_memory, measure
from deltaw.training.largest import Work
from deltaw.training.learner import Learner
from deltaw.training.measuring import ANSWERS, FORGOTTEN, LOSS
from deltaw.training.memory import OutOfMemory, bounded, free_memory, held_memory, is_out_of_memory, release
from deltaw.training.opening import Opened
from deltaw.training.preflight import work_of
from deltaw.training.recomputing import recomputed, ways_left

HEADROOM = 0.7  # a setting fits if it takes at most this share of the memory left beside the fixed part
RESUMABLE = (
    "train.tokens_per_batch",
    "train.checkpointing",
    "evaluate.",
)  # settings that leave a run the run that it is
PER_PARAMETER = 16  # bytes: float32 master, gradient and two moments


def explain(
    error: BaseException, opened: Opened, learner: Learner, run: Run, fix: str | None = None
) -> RunError | None:
    """The estimate and up to three settings that would fit; None for an error other than out of memory.

    `fix`: the last line, in place of how to go on with the run.
    """
    if not is_out_of_memory(error):
        return None
    traceback.clear_frames(error.__traceback__)  # they hold the tensors that were too many
    learner.optimizer.zero_grad()
    release(opened.device)
    room = held_memory(opened.device) + free_memory(opened.device)
    if isinstance(error, OutOfMemory):
        settings = _settings_of_evaluation(opened, error.work)
        after = f"after step {learner.state.step} of {opened.total}"
        what = f"{error.what} {after}: it takes more than the {gib(room)} available"
        return RunError("\n  ".join([what, *settings]), fix or _go_on(run, settings[0]))
    work, settings_fitting = work_of(opened, learner), list[Setting]()
    takes = "takes more than that, and so do smaller ones"
    if fit := _fitted(opened.model.forward, opened, learner, work):
        takes = f"takes about {gib(fit.bytes_at(work.longest_tokens, work.longest_supervised))}"
        settings_fitting = settings_that_fit(opened, work, fit, room, _recomputed(opened, learner, work))
    at = f"step {learner.state.step + 1} of {opened.total}"
    what = f"out of memory in {at}: {gib(room)} are available, and a batch of {work.longest_tokens:,} tokens {takes}"
    lines = [f"{setting.text}: about {gib(setting.bytes)}" for setting in settings_fitting]
    lines = lines or ["only a smaller base would fit"]
    return RunError(
        "\n  ".join([what, *lines]), fix or _go_on(run, settings_fitting[0].text if settings_fitting else None)
    )


def _recomputed(opened: Opened, learner: Learner, work: Work) -> tuple[str, Fit] | None:
    """The next way of keeping less (recomputing.py), and what batches take then."""
    for way in ways_left(opened)[:1]:
        with recomputed(opened, way) as forward:
            if fit := _fitted(forward, opened, learner, work):
                return way, fit
    return None


def _fitted(forward: Forward, opened: Opened, learner: Learner, work: Work) -> Fit | None:
    """From a sixteenth, an eighth and a quarter of the largest batch, as far as there is memory for them."""
    if opened.shards:  # passes take all ranks
        return None
    points = list[Point]()
    sizes = [work.longest_tokens // part for part in (16, 8, 4)]
    try:
        with bounded(opened.device):
            passes = measure(forward, learner, work.longest, sizes, accumulating=work.batches > 1)
            points.extend(passes)
    except Exception as again:
        if not is_out_of_memory(again):
            raise
        traceback.clear_frames(again.__traceback__)
    return fit_memory(points) if len(points) > 1 else None


@dataclass(frozen=True)
class Setting:
    """What to change in the run file, the largest batch then, and the peak that it would come to."""

    text: str
    tokens: int
    bytes: int


def settings_that_fit(
    opened: Opened, work: Work, fit: Fit, available: float, again: tuple[str, Fit] | None = None
) -> list[Setting]:
    """Up to three changes under which the largest batch stays well below the `available` bytes that it didn't fit into.

    Each comes with as many tokens per batch as fit. Fewer tokens alone come first: they change the speed, not the run;
    so do layers that run again in the backward (`again`: how, and what batches take then).
    Where the batch should have fitted, by the fit, only what is surely smaller is named.
    """
    tokens, longest = work.longest_tokens, opened.longest
    token = fit.token + fit.supervised * work.longest_supervised / tokens
    explained = fit.fixed + tokens * token > available
    limit = fit.fixed + HEADROOM * (available - fit.fixed) if explained else math.inf

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
    savings = _savings(opened)
    if again is not None:
        way, then = again
        factor = (then.token + then.supervised * work.longest_supervised / tokens) / max(1.0, token)
        savings = [(f"train.checkpointing={way}", fit.fixed - then.fixed, factor), *savings]
    changes = [setting(*change, tokens) for change in savings] if explained else []
    smaller = [setting("", 0, 1, enough / part) for part in (2, 4)]
    candidates = [plain, *(change for change in changes if change and change.tokens > enough), *smaller]
    return [one for one in candidates if one][:3]


def _savings(opened: Opened) -> list[tuple[str, float, float]]:
    """(change, bytes that it saves whatever the batch, factor on what a token costs)."""
    base, spec, parameters = opened.model.base, opened.config.adapter, opened.attached.parameters
    trained = {id(parameter) for parameter in parameters}
    stored = (weight for weight in base.model.parameters() if id(weight) not in trained)
    frozen = sum(weight.nbytes for weight in stored if weight.dtype == torch.float32)
    learning = PER_PARAMETER * sum(parameter.numel() for parameter in parameters)
    savings = [("train.dtype=bfloat16", frozen / 2, 0.5)] if base.dtype == torch.float32 else []
    if spec.start is not None:
        return savings  # its sizes are those of the adapter that it starts from
    if spec.full:
        savings.append(("adapter={rank: 16}", 0.9 * learning, 1.0))
    elif spec.rank > 1:
        savings.append((f"adapter.rank={spec.rank // 2}", learning / 2, 1.0))
    return savings


def _rounded(tokens: float) -> int:
    """Down to a multiple of 64, or below that to a power of two; 0 below 4."""
    return int(tokens) // 64 * 64 if tokens >= 64 else 1 << int(tokens).bit_length() - 1 if tokens >= 4 else 0


def _settings_of_evaluation(opened: Opened, work: str) -> list[str]:
    """What takes less; how much isn't known, since one of the smallest pieces was too large."""
    new, rows = opened.config.evaluate.max_new_tokens, opened.dataset.eval or opened.dataset.train
    settings = {
        FORGOTTEN: ["evaluate.general=null"],
        ANSWERS: [f"evaluate.max_new_tokens={max(1, new // 2)}", "evaluate.metrics=[]"],
        LOSS: [f"data.max_length={max(len(row.tokens) for row in rows) // 2}"],
    }[work]
    if opened.model.base.dtype == torch.float32:
        settings.append("train.dtype=bfloat16")
    return [*settings, "base=… (a smaller one)"][:3]


def _go_on(run: Run, setting: str | None) -> str:
    """How to continue the run that just failed: with a setting that may change on resuming, otherwise as a new run."""
    folder, saved = run.folder, list_checkpoints(run.checkpoints)
    remains = f"{saved[-1].name} remains" if saved else "nothing has been trained yet"
    if setting and all(word.startswith(RESUMABLE) for word in setting.split()):
        return f"{remains}; resume with: {command('train', folder, *setting.split(), options=['--allow'])}"
    words = [
        folder / "config.yaml",
        setting or "base=…",
        *([f"output={written(str(folder))}-smaller"] if saved else []),
    ]
    return f"{remains}; a new run: {command('train', *words, options=[] if saved else ['--replace'])}"
