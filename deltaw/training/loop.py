"""train(config): the whole run, top to bottom.

    check everything that can be checked before the model is loaded
    open base, data, adapter, optimiser; or put a checkpoint back
    measure the base, take the steps, measure the adapter, save it, write its report

A step's loss is the sum over its batches divided once by the step's supervised tokens, so gradient accumulation is
exact to the token. A step is applied only if its loss and its gradient are finite. What a step does depends on the
state before it and on nothing else, so stopping anywhere and resuming gives the same bits (on a CPU).
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from deltaw.adapter.file import Adapter
from deltaw.adapter.inject import Attached, attach
from deltaw.adapter.spec import find_targets
from deltaw.base.forward import plan_forward
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import find_base
from deltaw.config import RunConfig, load_config
from deltaw.data.dataset import Dataset
from deltaw.data.loader import Loader, LoaderState
from deltaw.data.pack import Batch
from deltaw.errors import InputError, RunError
from deltaw.evaluate.forgetting import forgetting, general_text
from deltaw.evaluate.held_out import Evaluation, answer, evaluate, held_out_loss, perplexity, spread
from deltaw.model import PLAIN, Model, open_dataset
from deltaw.progress import Display
from deltaw.run import Run
from deltaw.training.checkpoint import Saved, TrainState, latest_checkpoint, put_back, save_checkpoint
from deltaw.training.frozen import above_the_frozen
from deltaw.training.log import EventLog
from deltaw.training.optim import learning_rate, make_optimizer, set_rate
from deltaw.training.result import Found, write_report, write_result
from deltaw.training.start import start_from_data
from deltaw.training.stop import Stopped, StopRequest


def train(config: RunConfig, *, replace: bool = False, resume: bool = False, display: Display | None = None) -> Adapter:
    """Run `config` and return the adapter, which is also in `<output>/adapter`.

    `replace` discards an earlier run in the same folder, `resume` goes on from its newest checkpoint. Raises InputError
    before the weights are loaded where that is possible, RunError when it fails later, `Stopped` on a signal.
    """
    began, display = time.monotonic(), display or Display()
    run = Run(Path(config.output)) if resume else Run.check(config, replace=replace)
    model, dataset = _prepare(config, display)
    general = general_text(config.evaluate.general, model.renderer) if config.evaluate.general else []
    trainer = Trainer(config, run, model, dataset, display)
    saved = latest_checkpoint(run.checkpoints, display) if resume else None
    if saved is None:
        if resume:
            display.say(f"{run.folder} has no checkpoint yet: it starts from its beginning")
        # What `auto` came to is part of the run: a resumed one must not race again and choose otherwise.
        dtype = str(model.base.dtype).removeprefix("torch.")
        run.create(config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})}))
        if config.adapter.from_data:
            start_from_data(trainer.attached, model, trainer._loader(), display)
    else:
        trainer.restore(saved)
    with StopRequest() as stop:
        before = trainer.measure_base()
        trainer.take_steps(stop)
    adapter, after = trainer.finish()
    lost = forgetting(model, str(config.evaluate.general), general, display) if general else None
    found = Found(before, after, lost)
    write_result(run, config, trainer.state, model, dataset, found, time.monotonic() - began)
    if config.evaluate.report:
        write_report(run, display)
    return adapter


def resume(folder: str | Path, *, display: Display | None = None) -> Adapter:
    """Go on with an interrupted run. Raises InputError when it is finished already, or is no run."""
    run = Run(Path(folder))
    if run.result.is_file():
        raise InputError(f"{folder} is finished: its adapter is {run.adapter}", fix="to train anew use another output")
    config = load_config(run.config)
    # A run folder may have been moved since it was started.
    return train(config.model_copy(update={"output": str(folder)}), resume=True, display=display)


def _prepare(config: RunConfig, display: Display) -> tuple[Model, Dataset]:
    """Model and data up to the first step, cheapest checks first."""
    source = find_base(config.base, progress=display.say)
    find_targets(open_skeleton(source), config.adapter)
    _, renderer, dataset = open_dataset(config, display)
    for warning in dataset.report.warnings:
        display.say(f"warning: {warning}")
    base = open_base(source, dtype=config.train.dtype, device=config.train.device, progress=display.say)
    forward = plan_forward(base.model)
    generator = torch.Generator().manual_seed(config.train.seed)
    attached = attach(base.model, config.adapter, generator=generator, start_later=config.adapter.from_data)
    model = Model(base, renderer, forward, attached)
    display.say(f"{source.name} in {str(base.dtype)[6:]} on {base.device}: {model.describe()}")
    for layer in attached.unmatched[:3]:
        display.say(f"not adapted: {layer}" + (" …" if len(attached.unmatched) > 3 else ""))
    return model, dataset


class Trainer:
    """One run in progress. Its `state`, the factors and the optimiser's moments are all that changes."""

    def __init__(self, config: RunConfig, run: Run, model: Model, dataset: Dataset, display: Display) -> None:
        assert model.attached is not None
        self.config, self.run, self.model, self.dataset, self.display = config, run, model, dataset, display
        self.attached: Attached = model.attached
        self.optimizer = make_optimizer(self.attached, config.train)
        self.id = model.id if dataset.chat else dataclasses.replace(model.id, template=PLAIN)
        prints = {"base": self.id.fingerprint, "data": dataset.fingerprint, "template": self.id.template}
        self.state = TrainState(fingerprints=prints)
        self.forward = model.forward  # of training steps
        self.total = config.train.steps or self._loader().total_steps(config.train.epochs)

    def restore(self, saved: Saved) -> None:
        """Take up a checkpoint. Raises InputError when it belongs to another base, data or template."""
        changed = [n for n, value in self.state.fingerprints.items() if saved.state.fingerprints.get(n) != value]
        if changed:
            raise InputError(
                f"{self.run.folder} can't go on: its {' and '.join(changed)} changed since it was stopped",
                fix="put it back as it was, or start a new run",
            )
        put_back(self.attached, self.optimizer, saved)
        self.state = saved.state
        self.run.cut_metrics(self.state.step)
        self.display.say(f"resumed after step {self.state.step} of {self.total}")

    def measure_base(self) -> Evaluation | None:
        """The base on the held-out rows, once a run."""
        if not self.dataset.eval:
            return None
        if self.run.before.is_file():
            return Evaluation.from_json(self.run.read_json(self.run.before))
        with self.attached.disabled():
            before = self._evaluate("before")
        self.run.write_json(self.run.before, before.to_json())
        return before

    def take_steps(self, stop: StopRequest) -> None:
        """All steps that are left. Raises Stopped when a signal came, after saving."""
        every, log = self.config.train, EventLog(self.run)
        if self.total > self._loader().steps_in_epoch(0):
            self.forward = above_the_frozen(self.model, self.dataset, every.tokens_per_batch, self.display)
        with self.display.task("training", self.total) as update:
            update(self.state.step)
            for batches, position in self._loader():
                if self.state.step >= self.total:
                    break
                record = self._step(batches, position)
                step = self.state.step
                log.write(record)
                update(step, f"loss {record['loss']:.3f}  {self.state.tokens / self.state.seconds:.0f} tokens/s")
                if every.eval_every and self.dataset.eval and (step % every.eval_every == 0 or step == self.total):
                    log.write(self._eval())
                if every.sample_every and step % every.sample_every == 0:
                    self._sample()
                if step % every.save_every == 0 or step == self.total or stop.signal:
                    save_checkpoint(self.run.checkpoints, self.state, self.attached, self.optimizer, every.keep)
                if stop.signal and step < self.total:
                    log.close()
                    done = f"stopped after step {step} of {self.total} and saved"
                    raise Stopped(stop.signal, f"{done}; go on with: deltaw train {self.run.folder}")
        log.close()

    def finish(self) -> tuple[Adapter, Evaluation | None]:
        """Save the adapter, the best one where held-out rows were watched, and measure what was saved."""
        if self.state.best_step and self.state.best_step != self.state.step:
            best = Adapter.load(self.run.best)
            for path, layer in self.attached.layers.items():
                layer.set_factors(best.factors[path])
            self.display.say(f"best on the held-out rows: step {self.state.best_step}")
        after = self._evaluate("after") if self.dataset.eval else None
        adapter = self.attached.adapter(self.id)
        adapter.save(self.run.adapter)
        return adapter, after

    def _step(self, batches: list[Batch], position: LoaderState) -> dict[str, Any]:
        """One update. Raises RunError, with the state as it was, when the loss or the gradient is not finite."""
        began, state, config = time.monotonic(), self.state, self.config.train
        supervised, loss_sum = sum(batch.supervised for batch in batches), 0.0
        if self.config.adapter.dropout:
            torch.manual_seed(hash((config.seed, state.step)))
        self._dropout(True)
        for number, batch in enumerate(batches, 1):
            batch = batch.to(self.model.base.device)
            loss, _ = self.forward.loss(batch.tokens_T, batch.labels_T, batch.positions_T, batch.starts_S)
            value = float(loss.detach())
            if not math.isfinite(value):
                self._not_finite(f"the loss of batch {number} of {len(batches)}", [batch])
            (loss / supervised).backward()
            loss_sum += value
        self._dropout(False)
        norm = float(torch.nn.utils.clip_grad_norm_(self.attached.parameters, config.clip))
        if not math.isfinite(norm):
            self._not_finite("the gradient", batches)
        rate = learning_rate(state.step, self.total, config)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        state.epoch, state.step_in_epoch = position.epoch, position.step
        state.tokens += sum(len(batch.tokens_T) for batch in batches)
        state.supervised_tokens += supervised
        state.seconds += time.monotonic() - began
        return {
            "step": state.step,
            "loss": loss_sum / supervised,
            "lr": rate,
            "grad_norm": norm,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "seconds": round(state.seconds, 3),
        }

    def _not_finite(self, what: str, batches: list[Batch]) -> None:
        self.optimizer.zero_grad()
        if self.state.step:
            save_checkpoint(self.run.checkpoints, self.state, self.attached, self.optimizer, self.config.train.keep)
        rows = [origin for batch in batches for origin in batch.origins]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise RunError(
            f"step {self.state.step + 1}: {what} is NaN or infinite; nothing was updated\nrows: {shown}",
            fix="look at these rows, or lower train.lr",
        )

    def _eval(self) -> dict[str, Any]:
        """The held-out loss at this step; the adapter is kept when it is the best so far."""
        loss, _ = held_out_loss(self.model.forward, self.dataset.eval)
        state = self.state
        best = state.best_loss is None or loss < state.best_loss
        if best:
            self.attached.adapter(self.id).save(self.run.best)
            state.best_step, state.best_loss = state.step, loss
        self.display.say(f"step {state.step}: held-out loss {loss:.4f}" + ("  (best so far)" if best else ""))
        return {"step": state.step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}

    def _sample(self) -> None:
        """Answers to the first rows, held out if there are any, as the adapter stands."""
        rows = spread(self.dataset.eval or self.dataset.train, self.config.evaluate.samples)
        for got in answer(self.model, rows, self.config.evaluate.max_new_tokens):
            prompt, given, truth = (one_line(text) for text in (got.prompt, got.given, got.truth))
            self.display.say(f"step {self.state.step}: {prompt} {given}   [truth: {truth}]")

    def _evaluate(self, name: str) -> Evaluation:
        return evaluate(self.model, self.dataset.eval, self.config.evaluate, display=self.display, name=name)

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


def one_line(text: str, limit: int = 80) -> str:
    """Text on one line, its end kept when it is long (a prompt's end is what matters)."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else "…" + flat[1 - limit :]
