"""train(config): the whole run, top to bottom.

claim the run folder; check everything that can be checked before the model is loaded
open base, data, adapter, optimiser; or put a checkpoint back
measure the base, take the steps (trainer.py); save the adapter, measure it, write its report (finish.py)
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter
from deltaw.adapter.targets import find_targets
from deltaw.base.forward import plan_forward
from deltaw.base.limits import Limits
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import find_base
from deltaw.config import RunConfig, load_config, parse_config
from deltaw.data.dataset import Dataset
from deltaw.data.example import Example
from deltaw.errors import command
from deltaw.evaluate.forgetting import general_text
from deltaw.model import Model, load_adapter, open_dataset, open_model
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.changes import check_changes, check_length
from deltaw.training.checkpoint import Saved, latest_checkpoint
from deltaw.training.finish import finish, measure_again
from deltaw.training.memory import bound_caches
from deltaw.training.optim import WARMUP
from deltaw.training.preflight import explain, short_form
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
    """Go on with an interrupted run from its newest whole checkpoint; or measure what a finished one lacks.

    `overrides` (`train.lr=1e-4`) need `allow`. Raises InputError when it is no run, is finished, or can't go on so.
    """
    run, display = Run(Path(folder)), display or Display()
    run.check_resumable()
    with run.claimed(new=False):
        config = load_config(run.config, overrides)
        finished = run.result.is_file()
        saved = None if finished else latest_checkpoint(run.checkpoints, display)
        # The checkpoint knows what it was made with, whatever was written into config.yaml since.
        began = (
            parse_config(saved.state.config, source="the checkpoint", begun=True) if saved else load_config(run.config)
        )
        began, config = (_as_begun(one, saved) for one in (began, config))
        changes = check_changes(began, config, allow=allow, run=str(folder), finished=finished)
        for line in changes:
            display.say(f"changed: {line}")
        config = config.model_copy(update={"output": str(folder)})  # it may have been moved since it was started
        if finished:
            return _measure_again(config, run, display)
        if saved is not None and config.train.steps:  # `restore` looks for itself, when much has been read
            check_length(config.train.steps, saved.state.step, run=str(folder))
        if saved is None:
            display.say(f"{folder} has no checkpoint yet: it starts from its beginning")
        return _run(config, run, saved, display, changed=config != load_config(run.config))


def _run(config: RunConfig, run: Run, saved: Saved | None, display: Display, *, changed: bool = False) -> Adapter:
    """A run from its beginning or from a checkpoint to its end, in a folder that is claimed."""
    began = time.monotonic()
    with StopRequest() as stop:
        model, dataset = prepare_run(config, display)
        general = general_rows(config, model)
        trainer = Trainer(_pinned(config, model), run, model, dataset, display, stop)
        try:
            if saved is None:
                trainer.begin()
            else:
                trainer.restore(saved)
                if changed:  # and it is known now that it can go on so
                    run.write_config(config)
            stop.advice = f"go on with: {command('train', run.folder)}"
            short_form(trainer, general)
            before = trainer.measure_base()
            trainer.take_steps()
            return finish(trainer, before, general, began)
        except Exception as error:
            raise explain(error, trainer) or error from None


def _measure_again(config: RunConfig, run: Run, display: Display) -> Adapter:
    """What result.json says that failed, on the saved adapter."""
    with StopRequest("the run is finished, what it lacks is not measured yet") as stop:
        bound_caches()
        _, _, dataset = open_dataset(config, display)
        model = open_model(run.folder, device=config.train.device, display=display)
        general = general_rows(config, model)
        run.write_config(config)
        measure_again(Trainer(config, run, model, dataset, display, stop), general)
    return load_adapter(run.folder)


def prepare_run(config: RunConfig, display: Display) -> tuple[Model, Dataset]:
    """Model and data up to the first step, cheapest checks first."""
    bound_caches()
    source = find_base(config.base, display=display)
    skeleton = open_skeleton(source)
    find_targets(skeleton, config.adapter)
    _, renderer, dataset = open_dataset(config, display)
    limits, rows = Limits.of(skeleton), [*dataset.train, *dataset.eval]
    limits.check(rows)
    for line in config.switched_off():
        display.say(line)
    for warning in [*dataset.report.warnings, *limits.warnings(rows)]:
        display.say(f"warning: {warning}")
    base = open_base(source, dtype=config.train.dtype, device=config.train.device, display=display)
    forward = plan_forward(base.model)
    generator = torch.Generator().manual_seed(config.train.seed)
    attached = attach(base.model, config.adapter, generator=generator, start_later=config.adapter.from_data)
    model = Model(base, renderer, forward, attached)
    display.say(f"{source.name} in {str(base.dtype)[6:]} on {base.device}: {model.describe()}")
    for line in attached.notes():
        display.say(line)
    return model, dataset


def general_rows(config: RunConfig, model: Model) -> list[Example]:
    """The text on which forgetting is measured, cut to what the model can hold; none where it isn't asked."""
    source = config.evaluate.general
    if not source:
        return []
    limits = Limits.of(model.base.model)
    rows = general_text(source, model.renderer, limits.longest)
    limits.check(rows, name=f"evaluate.general: {source}")
    return rows


def _as_begun(config: RunConfig, saved: Saved | None) -> RunConfig:
    """The config as it was meant when the run began: a checkpoint that doesn't say which deltaw wrote it is from when a
    warm-up of 10, the default, was cut to a tenth of a short run, which now needs that it is left open."""
    if saved is None or "deltaw" in saved.state.conditions or config.train.warmup_steps != WARMUP:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"warmup_steps": None})})


def _pinned(config: RunConfig, model: Model) -> RunConfig:
    """The config with what `auto` and a hub's branch came to: a resumed run must not choose otherwise."""
    source, dtype = model.base.source, str(model.base.dtype).removeprefix("torch.")
    base = config.base if source.revision is None else f"{source.public_name}@{source.revision}"
    return config.model_copy(update={"base": base, "train": config.train.model_copy(update={"dtype": dtype})})
