"""Settings that do nothing beside others: a run file that has one says something else than its writer thinks.

    refused    train.eval_every, train.sample_every, evaluate.metrics, evaluate.samples    without held-out rows
               train.lr_ratio_b    in full fine-tuning, which has no B
               data.seed           where no row is chosen
    said       what was switched off elsewhere, as one does to cut a run short: train.epochs by train.steps,
               train.sample_every by 0 samples, evaluate.max_new_tokens by nothing to answer

Only a value other than the default counts, since a run's own config.yaml has every default written out; and 0 samples,
which is what one gets. Bounds that aren't reached (`data.max_length`, `train.keep`, …) aren't looked at.

Below config.py, which calls it on its own values: hence no types of it.
"""

from typing import Any


def without_effect(config: Any) -> list[str]:
    """Each setting of a RunConfig that is to be refused, and what it would need."""
    data, train, evaluate = config.data, config.train, config.evaluate
    no_rows = {
        "train.eval_every": train.eval_every is not None,
        "train.sample_every": train.sample_every is not None,
        "evaluate.metrics": bool(evaluate.metrics),
        "evaluate.samples": evaluate.samples not in (0, _default(evaluate, "samples")),
    }
    found = {name: "held-out rows: set data.eval" for name, given in no_rows.items() if given and data.eval is None}
    if config.adapter.full and train.lr_ratio_b != 1:
        found["train.lr_ratio_b"] = "factors, and adapter: full has none"
    if data.seed and not isinstance(data.eval, int) and data.limit is None:
        found["data.seed"] = "rows to choose: data.eval as a number, or data.limit"
    return [f"{name} does nothing without {what}" for name, what in found.items()]


def switched_off(config: Any) -> list[str]:
    """Each setting that others switch off, in words."""
    train, evaluate = config.train, config.evaluate
    answered = config.data.eval is not None and (evaluate.metrics or evaluate.samples)
    longest = evaluate.max_new_tokens
    lines = {
        f"train.steps: {train.steps} says how long, not train.epochs: {train.epochs:g}": train.steps
        and train.epochs != _default(train, "epochs"),
        f"train.sample_every: {train.sample_every} shows nothing: evaluate.samples is 0": train.sample_every
        and not evaluate.samples,
        f"evaluate.max_new_tokens: {longest} does nothing: no row is answered": not answered
        and longest != _default(evaluate, "max_new_tokens"),
    }
    return [line for line, so in lines.items() if so]


def _default(section: Any, name: str) -> Any:
    return type(section).model_fields[name].default
