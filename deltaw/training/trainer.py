"""A run in progress: the base measured, the steps taken, the adapter saved.

A step's loss is the sum over its batches divided once by the step's supervised tokens, so gradient accumulation is
exact to the token. A step is applied only if its loss and its gradient are finite (watch.py). What a step does depends
on the state before it and on nothing else, so stopping anywhere and resuming gives the same bits (on a CPU).

After a step comes what is due: an evaluation on held-out rows, samples, a checkpoint. A signal that comes during a step
waits until its end; then, as during an evaluation, the rest is cut off and the step saved. The evaluation that was cut
off is made up for when the run goes on: `state.evaluated` is behind.
"""

import dataclasses
import math
import time
from contextlib import nullcontext
from typing import Any

import torch

from deltaw.adapter.attach import Attached
from deltaw.adapter.file import Adapter
from deltaw.base.batch import Batch
from deltaw.base.fingerprint import same_base
from deltaw.config import RunConfig
from deltaw.data.dataset import Dataset
from deltaw.data.loader import Loader, LoaderState
from deltaw.data.render import TEMPLATE
from deltaw.errors import InputError, RunError, command
from deltaw.evaluate.held_out import (
    Evaluation,
    add_answers,
    answer,
    evaluate_loss,
    held_out_loss,
    perplexity,
    rows_asked,
)
from deltaw.files.atomic import write_text_atomic
from deltaw.model import PLAIN, Model
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.show.text import one_line
from deltaw.training.attempt import Attempts
from deltaw.training.changes import check_length
from deltaw.training.checkpoint import (
    Saved,
    TrainState,
    checkpoint_at,
    conditions,
    is_whole,
    put_back,
    put_factors_back,
    read_checkpoint,
    save_checkpoint,
)
from deltaw.training.frozen import above_the_frozen
from deltaw.training.log import EventLog
from deltaw.training.memory import Heap, bounded, release
from deltaw.training.optim import WARMUP, learning_rate, make_optimizer, set_rate, warmup_steps
from deltaw.training.start import start_from_data
from deltaw.training.stop import Stopped, StopRequest
from deltaw.training.watch import Unfit, Watch, check_loss, note_skip, note_update


class Trainer:
    """One run in progress. Its `state`, the factors and the optimiser's moments are all that changes."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        model: Model,
        dataset: Dataset,
        display: Display,
        stop: StopRequest | None = None,
    ) -> None:
        assert model.attached is not None
        self.config, self.run, self.model, self.dataset, self.display = config, run, model, dataset, display
        self.attached: Attached = model.attached
        self.stop = stop or StopRequest()
        self.attempts = Attempts(self)  # of what is measured before the last step
        self.optimizer = make_optimizer(self.attached, config.train)
        self.id = model.id if dataset.chat else dataclasses.replace(model.id, template=PLAIN)
        prints = {"base": self.id.fingerprint, "data": dataset.fingerprint, "template": self.id.template}
        now = conditions(model.base.device)
        self.state = TrainState(fingerprints=prints, config=config.model_dump(mode="json"), conditions=now)
        self.forward = model.forward  # of training steps
        self.total = config.train.steps or self._loader().total_steps(config.train.epochs)
        self.warmup = warmup_steps(self.total, config.train)
        if self.warmup >= self.total:
            raise InputError(
                f"train.warmup_steps is {self.warmup} of {self.total} steps: the run would never reach train.lr",
                fix="lower it, or leave it out (null): a tenth of a short run is taken then",
            )
        self._saved_step = 0

    def begin(self) -> None:
        """Make the folder a run's, and the start that an initialiser wants of the data."""
        self.run.create(self.config)
        if self.warmup < WARMUP and self.config.train.warmup_steps is None:
            self.display.say(f"warm-up: {self.warmup} of {self.total} steps, since the run is short")
        if self.config.adapter.from_data:
            start_from_data(self.attached, self.model, self._loader(), self.display)

    def restore(self, saved: Saved) -> None:
        """Take up a checkpoint. Raises InputError when it belongs to another base, data or template."""
        now, then = self.state.fingerprints, saved.state.fingerprints
        changed = [name for name, value in now.items() if not same_base(then.get(name, ""), value)]
        if changed:
            raise InputError(
                f"{self.run.folder} can't go on: its {' and '.join(changed)} changed since it was stopped",
                fix="put it back as it was, or start a new run",
            )
        check_length(self.total, saved.state.step, run=str(self.run.folder))
        put_back(self.attached, self.optimizer, saved)
        now, then = self.state.conditions, saved.state.conditions
        other = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
        if other:
            self.display.say(f"warning: it goes on with {', '.join(other)}: the last bits will differ")
        self.state = dataclasses.replace(saved.state, config=self.state.config, conditions=now)
        self._saved_step = self.state.step
        best = self.state.best_step
        if best and not is_whole(checkpoint_at(self.run.checkpoints, best)):
            self.display.say(f"warning: step {best} was the best, but its checkpoint is gone: what comes now decides")
            self.state.best_step, self.state.best_loss = 0, None
        if missing := self.run.cut_metrics(self.state.metrics_lines):
            self.display.say(f"{self.run.metrics} lacks {missing} of the {self.state.metrics_lines} lines it had")
        self.display.say(f"resumed after step {self.state.step} of {self.total}")

    def measure_base(self) -> Evaluation | None:
        """The base on the held-out rows, once a run. What fails here has cost nothing yet, so it is an error, unless it
        is answers that no metric needs."""
        if not self.dataset.eval:
            return None
        if self.run.before.is_file():
            return Evaluation.from_json(self.run.read_json(self.run.before))
        with self.attached.disabled():
            release(self.model.base.device)
            before = evaluate_loss(self.model, self.dataset.eval, display=self.display, name="before")
            before = self._base_answers(before)
        self.run.write_json(self.run.before, before.to_json())
        return before

    def answers(self, evaluation: Evaluation, name: str) -> Evaluation:
        """The same with the model's answers, as it stands."""
        rows, config = self.dataset.eval, self.config.evaluate
        return add_answers(evaluation, self.model, rows, config, display=self.display, name=name)

    def _base_answers(self, before: Evaluation) -> Evaluation:
        try:
            return self.answers(before, "before")
        except InputError as error:  # so it will be after training, too
            if self.config.evaluate.metrics:
                raise
            self.display.say(f"no answers to held-out rows: {error.what}")
            return dataclasses.replace(before, unanswered=error.what)
        except Exception as error:
            if self.config.evaluate.metrics:
                raise
            self.attempts.note("answers", error, what="no answers of the base")
            return before

    def take_steps(self) -> None:
        """All steps that are left. Raises Stopped when a signal came, after saving."""
        if self.total > self._loader().steps_in_epoch(0):
            self.forward = above_the_frozen(self.model, self.dataset, self.config.train.tokens_per_batch, self.display)
        taken = self.state.step - self.state.skipped
        self.watch = Watch(self.attached, self.config.train, self.total, taken=taken, say=self.display.say)
        first = True  # the step of this process that shows whether there is memory enough
        log, heap = EventLog(self.run, self.state.step), Heap(self.model.base.device)
        try:
            with self.stop.held(), self.display.task("training", self.total) as update:
                update(self.state.step)
                self._when_due(log)  # the evaluation that a stop cut off
                for batches, position in self._loader():
                    if self.state.step >= self.total:
                        break
                    with bounded(self.model.base.device) if first else nullcontext():
                        record = self._step(batches, position)
                    first = False
                    self._log(log, record)
                    said = f"loss {record['loss']:.3f}" if "loss" in record else "skipped"
                    update(self.state.step, f"{said}  {self.state.tokens_per_second:.0f} tokens/s")
                    self._when_due(log)
                    heap.tidy()
        finally:
            log.close()

    def save_adapter(self) -> Adapter:
        """The adapter, in its folder: the best one where held-out rows were watched."""
        if self.state.best_step and self.state.best_step != self.state.step:
            self._take_best()
        adapter = self.attached.adapter(self.id)
        self._save_template()  # before the weights: an adapter that is there has what it needs
        adapter.save(self.run.adapter)
        return adapter

    def _save_template(self) -> None:
        """The chat template beside the weights, where the base's tokenizer has another one."""
        renderer, file = self.model.renderer, self.run.adapter / TEMPLATE
        if self.id.template == PLAIN or renderer.own_template or renderer.template is None:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, renderer.template)

    def _take_best(self) -> None:
        best = self.state.best_step
        try:
            put_factors_back(self.attached, read_checkpoint(checkpoint_at(self.run.checkpoints, best)))
            self.display.say(f"best on the held-out rows: step {best}")
        except InputError as error:
            self.display.say(f"warning: step {best} was the best, but {error.what}: the last step's adapter is saved")
            self.state.best_step = self.state.step

    def _when_due(self, log: EventLog) -> None:
        """What comes after a step: an evaluation, samples, a checkpoint. A signal cuts the first two off and saves."""
        every, step = self.config.train, self.state.step
        if not step:
            return
        done = f"stopped after step {step} of {self.total} and saved"
        try:
            due = every.eval_every and (step % every.eval_every == 0 or step == self.total)
            if due and self.dataset.eval and self.state.evaluated < step:
                with self.stop.released():
                    loss, _ = held_out_loss(self.model.forward, self.dataset.eval)
                self._log(log, self._note_evaluation(loss))
            if every.sample_every and step % every.sample_every == 0 and self._saved_step < step:
                with self.stop.released():
                    self.attempts("samples", self._sample, what=f"step {step}: no samples")
            self.stop.check()
        except Stopped:
            self._save()
            self.stop.check(done)
        except Exception:  # of the held-out loss: what was learnt stays
            self._save()
            raise
        if step % every.save_every == 0 or step in (self.total, self.state.best_step):
            self._save()
            self.stop.check(done)

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one: it was resumed from, then."""
        if self._saved_step == self.state.step:
            return
        self.run.sync_metrics()
        save_checkpoint(self.run.checkpoints, self.state, self.attached, self.optimizer, self.config.train.keep)
        self._saved_step = self.state.step

    def _log(self, log: EventLog, record: dict[str, Any]) -> None:
        log.write(record)
        self.state.metrics_lines += 1

    def _step(self, batches: list[Batch], position: LoaderState) -> dict[str, Any]:
        """One update, or none where the step is skipped; RunError, with the state as it was, where it may not be."""
        began, state, config = time.monotonic(), self.state, self.config.train
        supervised = sum(batch.supervised for batch in batches)
        record: dict[str, Any] = {"step": state.step + 1}
        try:
            loss, norm = self._gradient(batches, supervised)
            rate = learning_rate(state.step, self.total, config)
            set_rate(self.optimizer, rate)
            with self.watch.update(rate, loss, batches):
                self.optimizer.step()
            note_update(loss, state, config)
            record |= {"loss": loss, "lr": rate, "grad_norm": norm}
        except Unfit as unfit:
            self._skip(unfit)
            record |= {"skipped": unfit.what, "rows": unfit.rows}
        self.optimizer.zero_grad()
        state.step += 1
        state.epoch, state.step_in_epoch = position.epoch, position.step
        state.tokens += sum(len(batch.tokens_T) for batch in batches)
        state.supervised_tokens += supervised
        state.seconds += time.monotonic() - began
        figures = {"tokens": state.tokens, "supervised_tokens": state.supervised_tokens}
        return {**record, **figures, "seconds": round(state.seconds, 3)}

    def _gradient(self, batches: list[Batch], supervised: int) -> tuple[float, float]:
        """(mean loss in nats a token, norm before clipping), the gradient in place. Raises Unfit where it is none."""
        loss_sum, rows = 0.0, [origin for batch in batches for origin in batch.origins]
        if not supervised:
            raise Unfit("not one token of it is trained", rows)
        if self.config.adapter.dropout:
            torch.manual_seed(hash((self.config.train.seed, self.state.step)))
        self._dropout(True)
        for number, batch in enumerate(batches, 1):
            batch = batch.to(self.model.base.device)
            loss, _ = self.forward.loss(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                what = f"the loss of batch {number} of {len(batches)} is NaN or infinite"
                raise Unfit(what, batch.origins, not_finite=True)
            (loss / supervised).backward()
            loss_sum += value
        self._dropout(False)
        norm = float(torch.nn.utils.clip_grad_norm_(self.attached.parameters, self.config.train.clip))
        if not math.isfinite(norm):
            raise Unfit("the gradient is NaN or infinite", rows, not_finite=True)
        check_loss(loss_sum / supervised, rows, self.state, self.config.train)
        return loss_sum / supervised, norm

    def _skip(self, unfit: Unfit) -> None:
        self.optimizer.zero_grad()
        self._dropout(False)
        try:
            note_skip(unfit, self.state, self.config.train)
        except RunError:
            if self.state.step:
                self._save()
            raise
        self.display.say(f"skipped step {self.state.step + 1}: {unfit}")

    def _note_evaluation(self, loss: float) -> dict[str, Any]:
        """The held-out loss at this step; its checkpoint is kept while it is the best. Raises RunError where it isn't
        finite, unless no step is left that could be wasted."""
        state = self.state
        if not math.isfinite(loss):
            what = f"step {state.step}: the held-out loss is {loss}"
            if state.step < self.total:
                without = command("train", self.run.folder, "train.eval_every=null", options=["--allow"])
                raise RunError(what, fix=f"lower train.lr, or look at data.eval; to the adapter without it: {without}")
            self.display.say(f"warning: {what}")
            state.evaluated = state.step
            return {"step": state.step, "eval_not_finite": str(loss)}
        state.evaluated = state.step
        best = state.best_loss is None or loss < state.best_loss
        if best:
            state.best_step, state.best_loss = state.step, loss
        self.display.say(f"step {state.step}: held-out loss {loss:.4f}" + ("  (best so far)" if best else ""))
        return {"step": state.step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}

    def _sample(self) -> None:
        """Answers to some held-out rows, as the adapter stands."""
        config = self.config.evaluate.model_copy(update={"metrics": ()})
        rows = rows_asked(self.model, self.dataset.eval, config)
        for got in answer(self.model, rows, config.max_new_tokens):
            prompt, given, truth = (one_line(text, 80, end=True) for text in (got.prompt, got.given, got.truth))
            self.display.say(f"step {self.state.step}: {prompt} {given}   [truth: {truth}]")

    def _dropout(self, on: bool) -> None:
        for layer in self.attached.layers.values():
            layer.train(on)

    def _loader(self) -> Loader:
        config, at = self.config.train, self.state
        return Loader(
            self.dataset.train,
            config.tokens_per_step,
            config.tokens_per_batch,
            config.seed,
            LoaderState(at.epoch, at.step_in_epoch),
        )
