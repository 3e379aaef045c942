"""The held-out prompts of a run on rewards, answered and rewarded once more: by its adapter and by its base."""

from contextlib import ExitStack
from dataclasses import replace

from deltaw.data.opening import open_dataset
from deltaw.errors import InputError
from deltaw.evaluation.held_out import Evaluation, spread
from deltaw.evaluation.own_metric import Consent, open_metrics
from deltaw.evaluation.rows import own_data
from deltaw.evaluation.side_by_side import SideBySide
from deltaw.model import open_model
from deltaw.named import Named
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.opening import Opened
from deltaw.training.rewarding import rewarded_evaluation, with_rewards


def reward_side_by_side(
    named: Named,
    *,
    base: str | None,
    use_adapter: bool,
    use_base: bool,
    rows: int | None,
    allow_code: bool,
    display: Display,
) -> SideBySide:
    """Raises InputError as `evaluate` does, before the weights are read where that is possible."""
    own_data(named)  # which must hold rows out
    config, consent = named.local, Consent(named.name, allow_code)
    assert config is not None and config.objective.is_rewarded
    metrics = open_metrics(config.evaluate.metrics, consent)
    model = open_model(named, base=base, display=display)
    _, _, dataset = open_dataset(config, display, model.base.source)
    known = Run(named.path).before
    if rows is not None and rows < len(dataset.eval):
        dataset = replace(dataset, eval=dataset.eval.take(spread(range(len(dataset.eval)), rows)))
    opened = Opened(config, model, dataset, 0, metrics, consent=consent)
    sides: dict[str, Evaluation | None] = {"adapter": None, "base": None}
    with ExitStack() as stack:
        opened = with_rewards(opened, stack)
        if use_adapter:
            sides["adapter"] = rewarded_evaluation(opened, display=display, name="adapter")
        if use_base:
            with opened.attached.disabled():
                sides["base"] = rewarded_evaluation(opened, display=display, name="base")
    main = sides["adapter"] or sides["base"]
    if main is None:
        raise InputError("nothing to measure: neither the adapter nor the base", fix="leave one of the two options out")
    then = Evaluation.from_json(Run(named.path).read_json(known)).rows if known.is_file() else ""
    same = then == main.rows if then and rows is None else None
    return SideBySide(named.name, None, len(dataset.eval), metrics, sides["adapter"], sides["base"], same)
