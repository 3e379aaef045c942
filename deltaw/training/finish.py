"""What comes after the last step: the adapter is saved, then it is measured, then there is a page.

    adapter/          before anything else
    held-out loss     ┐
    answers           │ each tried (attempt.py), each only where it is wanted and isn't known yet
    forgetting        ┘
    result.json       what is known, and in `failed` what isn't and why: from here on the run is finished
    report.html       tried as well

So a run that has taken its steps is whole whatever becomes of it afterwards: its exit code is 0, a failed measurement
is a warning. What failed can be had later: `deltaw train RUN` on a finished run measures what `failed` names and
nothing else, on the adapter as it was saved. Rejected: exit code 1 for a measurement that failed (a script would take
a whole adapter for none), and measuring first (a crash in an answer took the whole training with it).
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace

from deltaw.adapter.file import Adapter
from deltaw.data.example import Example
from deltaw.errors import InputError, RunError
from deltaw.evaluate.forgetting import Forgetting, forgetting
from deltaw.evaluate.held_out import Evaluation, evaluate_loss
from deltaw.training.attempt import Attempts
from deltaw.training.result import Measured, measurements, write_report, write_result
from deltaw.training.trainer import Trainer

REPORT = "report"


def finish(trainer: Trainer, before: Evaluation | None, general: Sequence[Example], began: float) -> Adapter:
    """Save the adapter, measure it, write result.json and the report. `began`: by time.monotonic."""
    adapter = trainer.save_adapter()
    attempts = Attempts(trainer)
    measured = _measure(trainer, Measured(before), general, attempts)
    try:
        write_result(trainer, measured, time.monotonic() - began)
    except RunError as error:
        fix = f"the adapter is saved: {trainer.run.adapter}; free space, then resume the run"
        raise RunError(error.what, fix) from None
    _report(trainer, measured, attempts)
    return adapter


def measure_again(trainer: Trainer, general: Sequence[Example]) -> None:
    """What a finished run lacks, on the adapter that `trainer` has. Raises InputError where its data has changed."""
    run = trainer.run
    result = run.read_json(run.result)
    then, now = result.get("fingerprints", {}), trainer.state.fingerprints
    changed = [name for name, value in then.items() if now.get(name) != value]
    if changed:
        raise InputError(
            f"{run.folder} can't be measured: its {' and '.join(changed)} changed since it was trained",
            fix="put it back as it was",
        )
    before = trainer.measure_base()
    attempts = Attempts(trainer)
    measured = _measure(trainer, Measured.of(before, result), general, attempts)
    run.write_json(run.result, {**result, **measurements(measured, len(trainer.dataset.eval))})
    _report(trainer, measured, attempts)


def _measure(trainer: Trainer, known: Measured, general: Sequence[Example], attempts: Attempts) -> Measured:
    """`known` with what is wanted beside it, as far as it can be had; `failed` says what can't."""
    before, after, answers, lost = known.before, known.after, known.answers, known.forgetting
    model, rows, display = trainer.model, trainer.dataset.eval, trainer.display
    if before and not after:
        after = attempts(
            "held_out_loss",
            lambda: evaluate_loss(model, rows, display=display, name="after"),
            what="no held-out loss of the adapter",
        )
    asked = trainer.config.evaluate.metrics or trainer.config.evaluate.samples
    if before and after and not answers and not before.unanswered and asked:
        pair = before, after
        before, after = attempts("answers", lambda: _answers(trainer, *pair), what="no answers of the adapter") or pair
    if general and not lost:
        lost = attempts("forgetting", lambda: _forgetting(trainer, general), what="what was forgotten isn't known")
    return replace(known, before=before, after=after, forgetting=lost, failed=attempts.failed)


def _answers(trainer: Trainer, before: Evaluation, after: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Both with answers; the base's anew where it gave none (it failed, then)."""
    if not before.answers:
        with trainer.attached.disabled():
            before = trainer.answers(before, "before")
        trainer.run.write_json(trainer.run.before, before.to_json())
    return before, trainer.answers(after, "after")


def _forgetting(trainer: Trainer, general: Sequence[Example]) -> Forgetting:
    lost = forgetting(trainer.model, str(trainer.config.evaluate.general), general, trainer.display)
    if not lost.is_finite:
        raise RunError(f"the losses on {lost.source} are {lost.loss_before} and {lost.loss_after}, KL is {lost.kl}")
    return lost


def _report(trainer: Trainer, measured: Measured, attempts: Attempts) -> None:
    """report.html; where that fails, result.json says so. The last line says how to have what failed."""
    run, display = trainer.run, trainer.display
    folder = shlex.quote(str(run.folder))
    trainer.stop.advice = f"the run is finished, its report is not: deltaw inspect {folder}"
    if trainer.config.evaluate.report:
        attempts(REPORT, lambda: write_report(run, display), what="no report")
        if REPORT in attempts.failed:
            attempts("result", lambda: _note(trainer, attempts.failed), what=f"{run.result} doesn't say so")
    if attempts.failed:
        display.say(f"the adapter is saved: {run.adapter}; to measure what failed: deltaw train {folder}")


def _note(trainer: Trainer, failed: dict[str, str]) -> None:
    trainer.run.write_json(trainer.run.result, {**trainer.run.read_json(trainer.run.result), "failed": failed})
