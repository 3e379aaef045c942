"""What comes after the last step: the adapter is saved, then measured, then the report is written.

    adapter/          before anything else
    held-out loss     ┐
    answers           │ each tried (measuring.py), each only where it is wanted and isn't known yet
    forgetting        ┘
    result.json       what is known, and in `failed` what isn't and why: from here on the run is finished
    report.html       tried as well

So a run that has taken its steps is complete whatever happens afterwards: its exit code is 0, and a failed measurement
is a warning. What failed can be made up for later: `deltaw train RUN` on a finished run measures what `failed` names
and nothing else, on the adapter as it was saved. Rejected: exit code 1 for a measurement that failed (a script would
take a complete adapter for none), and measuring first (a crash in an answer took the whole training with it).
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from deltaw.adapter.file import Adapter
from deltaw.adapter.history import History
from deltaw.config.sources import public
from deltaw.data.example import Example
from deltaw.data.render import TEMPLATE
from deltaw.errors import InputError, RunError, command
from deltaw.evaluation.forgetting import Forgetting
from deltaw.evaluation.held_out import Evaluation
from deltaw.files.atomic import write_text_atomic
from deltaw.model import PLAIN
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.show.text import counted
from deltaw.training.checkpoint import TrainState, checkpoint_at, read_checkpoint
from deltaw.training.learner import Learner
from deltaw.training.measuring import Attempts, measure_base, measured, what_was_forgotten, with_answers
from deltaw.training.opening import Opened
from deltaw.training.references import with_references
from deltaw.training.result import Measured, measurements, write_report, write_result

REPORT = "report"


def finish(
    opened: Opened,
    learner: Learner,
    run: Run,
    before: Evaluation | None,
    general: Sequence[Example],
    attempts: Attempts,
    display: Display,
    began: float,
    waited: float | None = None,
) -> Adapter:
    """Save the adapter, measure it, write result.json. `before`: the base's figures; `began`: by time.monotonic;
    `waited`: the share of time that its threads had no core."""
    adapter = save_adapter(opened, learner, run, display)
    measured = _measured(opened, run, Measured(before), general, attempts, display)
    try:
        write_result(opened, learner, run, measured, adapter.history, time.monotonic() - began, waited)
    except RunError as error:
        fix = f"the adapter is saved: {run.adapter}; free some space, then resume the run"
        raise RunError(error.what, fix) from None
    return adapter


def measure_again(
    opened: Opened,
    run: Run,
    fingerprints: dict[str, str],
    general: Sequence[Example],
    attempts: Attempts,
    display: Display,
) -> None:
    """Measure what a finished run lacks, on the adapter that `opened` has. Raises InputError where its data has
    changed."""
    result = run.read_json(run.result)
    then = result.get("fingerprints", {})
    changed = [name for name, value in then.items() if fingerprints.get(name) != value]
    if changed:
        raise InputError(
            f"{run.folder} can't be measured: its {' and '.join(changed)} changed after it was trained",
            fix="put it back as it was",
        )
    before = measure_base(opened, run, attempts, display)
    opened = with_references(opened, run, display, fresh=False)
    measured = _measured(opened, run, Measured.of(before, result), general, attempts, display)
    run.write_json(run.result, {**result, **measurements(measured, run, opened)})


def save_adapter(opened: Opened, learner: Learner, run: Run, display: Display) -> Adapter:
    """Save the adapter in its folder: the best one where held-out rows were evaluated."""
    state = learner.state
    if learner.out_of_patience and state.step < learner.total:
        display.say(
            f"stopped early, after step {state.step} of {learner.total}: {counted(state.no_better, 'evaluation')} in a "
            "row without a better loss (train.patience)"
        )
    if state.best_step and state.best_step != state.step:
        try:
            learner.put_factors_back(read_checkpoint(checkpoint_at(run.checkpoints, state.best_step)))
            display.say(f"best on the held-out rows: step {state.best_step}")
        except InputError as error:
            best, state.best_step = state.best_step, state.step
            display.say(f"warning: step {best} was the best, but {error.what}, so the last step's adapter is saved")
    adapter = replace(learner.attached.adapter(opened.id), history=history(opened, state))
    _save_template(opened, run)  # before the weights: an adapter that is there has what it needs
    if opened.model.renderer.grown:  # PEFT and servers look for added tokens beside the adapter
        opened.model.renderer.tokenizer.save_pretrained(run.adapter)
    adapter.save(run.adapter)
    return adapter


def history(opened: Opened, state: TrainState) -> History:
    """How the run's adapter came about."""
    known = {"steps": state.step, "tokens": state.tokens, "data": public(opened.config.data.train)}
    return opened.lineage.model_copy(update=known)


def _save_template(opened: Opened, run: Run) -> None:
    """The chat template beside the weights, where the base's tokenizer has another one."""
    renderer, file = opened.model.renderer, run.adapter / TEMPLATE
    if opened.id.template == PLAIN or renderer.own_template or renderer.template is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, renderer.template)


def _measured(
    opened: Opened, run: Run, known: Measured, general: Sequence[Example], attempts: Attempts, display: Display
) -> Measured:
    """`known`, completed with what is wanted as far as it can be measured; `failed` names the rest."""
    before, after, answers, lost = known.before, known.after, known.answers, known.forgetting
    wanted = opened.config.evaluate
    if before and not after:
        after = attempts(
            "held_out_loss", lambda: measured(opened, display, "after"), what="no held-out loss for the adapter"
        )
    fresh = opened.is_answered and (not answers or (after is not None and not after.scored_by(opened.metrics)))
    if before and after and fresh and not before.unanswered and (wanted.metrics or wanted.samples):
        pair = before, after
        both = attempts("answers", lambda: _answers(opened, run, *pair, display), what="no answers from the adapter")
        before, after = both or pair
        answers = [] if both else answers
    if after and after is not known.after:
        display.say(f"after: {after.line()}")
    if general and not lost:
        lost = attempts(
            "forgetting", lambda: _forgetting(opened, general, display), what="no measure of what was forgotten"
        )
    return replace(known, before=before, after=after, answers=answers, forgetting=lost, failed=attempts.failed)


def _answers(
    opened: Opened, run: Run, before: Evaluation, after: Evaluation, display: Display
) -> tuple[Evaluation, Evaluation]:
    """Both with answers; the base answers again where it gave none (because that failed)."""
    if not before.answers:
        with opened.attached.disabled():
            before = with_answers(before, opened, display, "before")
        run.write_json(run.before, before.to_json())
    return before, with_answers(after, opened, display, "after")


def _forgetting(opened: Opened, general: Sequence[Example], display: Display) -> Forgetting:
    lost = what_was_forgotten(opened.model, general, str(opened.config.evaluate.general), display)
    if not lost.is_finite:
        raise RunError(f"the losses on {lost.source} are {lost.loss_before} and {lost.loss_after}, KL is {lost.kl}")
    return lost


def report(run: Run, attempts: Attempts, display: Display, *, wanted: bool) -> None:
    """Write report.html; where that fails, result.json says so. The last line says how to get what failed."""
    if wanted:
        attempts(REPORT, lambda: write_report(run, display), what="no report")
        if REPORT in attempts.failed:
            attempts("result", lambda: _note(run, attempts.failed), what=f"{run.result} doesn't say that it is")
    if attempts.failed:
        display.say(f"the adapter is saved: {run.adapter}; to measure what failed: {command('train', run.folder)}")


def _note(run: Run, failed: dict[str, str]) -> None:
    run.write_json(run.result, {**run.read_json(run.result), "failed": failed})
