"""verify-resume: shows on the user's own run file and machine that a run stopped anywhere ends with the same bits.

`steps` steps are taken straight through, with a checkpoint after each. Then, for every k, a fresh adapter and a fresh
optimiser restore checkpoint k and take the remaining steps. The comparison is of the bytes of the last factors and
moments, and every line of metrics.jsonl but for the times.

To keep it to about a minute the base is loaded once, nothing is measured on held-out rows, and a step has at most two
batches: enough to be accumulated. The schedule is that of a run of `steps` steps.
"""

import dataclasses
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deltaw.adapter.attach import detach
from deltaw.config import RunConfig
from deltaw.files.safetensors import load_safetensors
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.changes import restore
from deltaw.training.checkpoint import FACTORS, MOMENTS, Saved, checkpoint_at, read_checkpoint
from deltaw.training.log import EventLog
from deltaw.training.measuring import Attempts
from deltaw.training.opening import Opened, attach_fresh, begin, open_run
from deltaw.training.references import with_references
from deltaw.training.rewarding import with_rewards
from deltaw.training.run import Steps
from deltaw.training.stop import StopRequest
from deltaw.training.underway import Underway


@dataclasses.dataclass(frozen=True)
class Resumed:
    """How a run that was stopped after `stopped_after` steps ended, beside the one that wasn't."""

    stopped_after: int
    same_bits: bool
    same_metrics: bool
    largest_difference: float  # of a factor's number


@dataclasses.dataclass(frozen=True)
class Verified:
    """What verify-resume found."""

    steps: int
    device: str
    resumed: list[Resumed]

    @property
    def exact(self) -> bool:
        return all(one.same_bits and one.same_metrics for one in self.resumed)

    def to_json(self) -> dict[str, Any]:
        return {"exact": self.exact, **dataclasses.asdict(self)}

    def text(self) -> str:
        """One line per stop, and the verdict."""
        lines = [
            f"stopped after step {one.stopped_after} of {self.steps}: "
            + ("the same bits" if one.same_bits else f"different bits, by up to {one.largest_difference:.2g}")
            + (", the same metrics" if one.same_metrics else ", OTHER METRICS")
            for one in self.resumed
        ]
        verdict = (
            "exact" if self.exact else "NOT exact" + (" (some GPU sums have no fixed order)" * (self.device != "cpu"))
        )
        return "\n".join([*lines, f"resuming this run on {self.device} is {verdict}"])


def verify_resume(config: RunConfig, steps: int, display: Display) -> Verified:
    """Train `steps` steps straight and from each checkpoint. Leaves nothing behind. Raises InputError, RunError."""
    train = {
        "steps": steps,
        "save_every": 1,
        "keep": steps,
        "eval_every": None,
        "sample_every": None,
        "warmup_steps": min(config.train.warmup_steps or 0, steps - 1),
        "patience": None,
    }
    opened = _short_steps(open_run(_with(config, train), display))
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as place, ExitStack() as stack:
        opened = with_rewards(opened, stack)
        straight = Run(Path(place) / "straight")
        straight.folder.mkdir()
        _train(opened, straight, None, display)
        resumed = []
        for k in range(1, steps):
            opened = _fresh_adapter(opened)
            resumed.append(_resume_from(k, opened, straight, Run(Path(place) / str(k)), display))
    return Verified(steps, opened.device.type, resumed)


def _with(config: RunConfig, train: dict[str, Any]) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _short_steps(opened: Opened) -> Opened:
    """Of two batches at most; how large a step would be is settled by the data."""
    train = opened.config.train
    if opened.is_rewarded:
        return opened
    size = min(train.step_tokens, 2 * train.batch_tokens)
    return dataclasses.replace(opened, config=_with(opened.config, {"tokens_per_step": size}))


def _resume_from(k: int, opened: Opened, straight: Run, run: Run, display: Display) -> Resumed:
    shutil.copytree(checkpoint_at(straight.checkpoints, k), checkpoint_at(run.checkpoints, k))
    shutil.copy(straight.metrics, run.metrics)  # with the lines after step k, as a kill would leave it
    _train(opened, run, read_checkpoint(checkpoint_at(run.checkpoints, k)), display)
    ends = [checkpoint_at(one.checkpoints, opened.total) for one in (straight, run)]
    same = all((ends[0] / name).read_bytes() == (ends[1] / name).read_bytes() for name in (FACTORS, MOMENTS))
    factors = [load_safetensors(end / FACTORS) for end in ends]
    largest = max(float((factors[0][name] - value).abs().max()) for name, value in factors[1].items())
    resumed = Resumed(k, same, _untimed(straight) == _untimed(run), largest)
    shutil.rmtree(run.folder)  # of a large adapter there need not be one for each k
    return resumed


def _train(opened: Opened, run: Run, saved: Saved | None, display: Display) -> None:
    """All steps that are left, from the beginning or a checkpoint, into `run`."""
    opened = dataclasses.replace(opened, config=opened.config.model_copy(update={"output": str(run.folder)}))
    learner = opened.learner(display)
    if saved is None:
        begin(opened, run, display)
    else:
        restore(learner, saved, run, display)
    opened = with_references(opened, run, display, fresh=saved is None)
    attempts = Attempts(opened.device, display.say, lambda error: None)  # of nothing: no samples are asked for
    Steps(Underway(opened, learner, run, StopRequest(), display, attempts, EventLog(run, display.say))).take()


def _fresh_adapter(opened: Opened) -> Opened:
    detach(opened.attached)
    attached = attach_fresh(opened.model.base.model, opened.config, opened.model.renderer.tokens)
    return dataclasses.replace(opened, model=dataclasses.replace(opened.model, attached=attached))


def _untimed(run: Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.endswith("seconds")} for line in run.read_metrics()
    ]
