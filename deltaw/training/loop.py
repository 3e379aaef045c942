"""train(config): the whole run, top to bottom.

claim the run folder; check everything that can be checked before the model is loaded
open base, data, adapter, optimiser; or put a checkpoint back
measure the base, take the steps, measure the adapter, save it (trainer.py), write its report
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from deltaw.adapter.file import Adapter
from deltaw.adapter.inject import attach
from deltaw.adapter.spec import find_targets
from deltaw.base.forward import plan_forward
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import find_base
from deltaw.config import RunConfig, load_config, parse_config
from deltaw.data.dataset import Dataset
from deltaw.errors import command
from deltaw.evaluate.forgetting import forgetting, general_text
from deltaw.model import Model, open_dataset
from deltaw.progress import Display
from deltaw.run import Run
from deltaw.training.changes import check_changes
from deltaw.training.checkpoint import Saved, latest_checkpoint
from deltaw.training.memory import bound_caches, release
from deltaw.training.preflight import explain, short_form
from deltaw.training.result import Found, write_report, write_result
from deltaw.training.stop import StopRequest
from deltaw.training.trainer import Trainer


def train(config: RunConfig, *, replace: bool = False, display: Display | None = None) -> Adapter:
    """Run `config` and return the adapter, which is also in `<output>/adapter`.

    `replace` discards an earlier run in the same folder. Raises InputError before the weights are loaded where that is
    possible, RunError when it fails later, `Stopped` on a signal.
    """
    run = Run(Path(config.output))
    with run.claimed(new=True, replace=replace):
        return _run(config, run, None, display or Display())


def resume(
    folder: str | Path, overrides: Iterable[str] = (), *, allow: bool = False, display: Display | None = None
) -> Adapter:
    """Go on with an interrupted run from its newest whole checkpoint.

    `overrides` (`train.lr=1e-4`) need `allow`. Raises InputError when it is no run, is finished, or can't go on so.
    """
    run, display = Run(Path(folder)), display or Display()
    run.check_resumable()
    with run.claimed(new=False):
        config = load_config(run.config, overrides)
        saved = latest_checkpoint(run.checkpoints, display)
        # The checkpoint knows what it was made with, whatever was written into config.yaml since.
        began = parse_config(saved.state.config, source="the checkpoint") if saved else load_config(run.config)
        changes = check_changes(began, config, allow=allow, run=str(folder))
        for line in changes:
            display.say(f"changed: {line}")
        config = config.model_copy(update={"output": str(folder)})  # it may have been moved since it was started
        if saved is None:
            display.say(f"{folder} has no checkpoint yet: it starts from its beginning")
        elif changes:
            run.write_config(config)
        return _run(config, run, saved, display)


def _run(config: RunConfig, run: Run, saved: Saved | None, display: Display) -> Adapter:
    """A run from its beginning or from a checkpoint to its end, in a folder that is claimed."""
    began = time.monotonic()
    with StopRequest() as stop:
        model, dataset = prepare_run(config, display)
        general = general_text(config.evaluate.general, model.renderer) if config.evaluate.general else []
        trainer = Trainer(_pinned(config, model), run, model, dataset, display, stop)
        try:
            if saved is None:
                trainer.begin()
            else:
                trainer.restore(saved)
            stop.advice = f"go on with: {command('train', run.folder)}"
            short_form(trainer, general)
            before = trainer.measure_base()
            trainer.take_steps()
            adapter, after = trainer.finish()
            release(model.base.device)
            lost = forgetting(model, str(config.evaluate.general), general, display) if general else None
        except Exception as error:
            raise explain(error, trainer) or error from None
        found = Found(before, after, lost)
        write_result(run, config, trainer.state, model, dataset, found, time.monotonic() - began)
        stop.advice = f"the run is finished, its report is not: {command('inspect', run.folder)}"
        if config.evaluate.report:
            write_report(run, display)
    return adapter


def prepare_run(config: RunConfig, display: Display) -> tuple[Model, Dataset]:
    """Model and data up to the first step, cheapest checks first."""
    bound_caches()
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


def _pinned(config: RunConfig, model: Model) -> RunConfig:
    """The config with what `auto` and a hub's branch came to: a resumed run must not choose otherwise."""
    source, dtype = model.base.source, str(model.base.dtype).removeprefix("torch.")
    base = config.base if source.revision is None else f"{source.public_name}@{source.revision}"
    return config.model_copy(update={"base": base, "train": config.train.model_copy(update={"dtype": dtype})})
