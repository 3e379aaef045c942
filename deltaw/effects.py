"""Settings that do nothing beside others: a run file that has one says something else than its writer thinks.

    train.eval_every, train.sample_every, evaluate.metrics, .samples, .max_new_tokens    without held-out rows
    train.sample_every         where no samples are asked for
    evaluate.max_new_tokens    where nothing is answered
    train.lr_ratio_b           in full fine-tuning, which has no B
    data.seed                  where no row is chosen

Only a value other than the default counts, since a run's own config.yaml has every default written out; and 0 samples,
which is what one gets. Not here: `train.epochs` beside `train.steps`, which is documented to go before it and is used
to cut a run short (said when it starts), and bounds that aren't reached (`data.max_length`, `train.keep`, …).

Below config.py, which calls it on its own values: hence no types of it.
"""

from typing import Any


def without_effect(config: Any) -> list[str]:
    """Each setting of a RunConfig that does nothing, and what it would need."""
    data, train, evaluate, full = config.data, config.train, config.evaluate, config.adapter.full
    rows = "held-out rows: set data.eval"
    samples, tokens = (type(evaluate).model_fields[name].default for name in ("samples", "max_new_tokens"))
    longer = evaluate.max_new_tokens != tokens
    no_rows = {
        "train.eval_every": train.eval_every is not None,
        "train.sample_every": train.sample_every is not None,
        "evaluate.metrics": bool(evaluate.metrics),
        "evaluate.samples": evaluate.samples not in (0, samples),
        "evaluate.max_new_tokens": longer,
    }
    if data.eval is None:
        found = {name: rows for name, given in no_rows.items() if given}
    else:
        answered = evaluate.metrics or evaluate.samples
        found = {"train.sample_every": "evaluate.samples"} if train.sample_every and not evaluate.samples else {}
        found |= {"evaluate.max_new_tokens": "evaluate.metrics or evaluate.samples"} if longer and not answered else {}
    if full and train.lr_ratio_b != 1:
        found["train.lr_ratio_b"] = "factors, and adapter: full has none"
    if data.seed and not isinstance(data.eval, int) and data.limit is None:
        found["data.seed"] = "rows to choose: data.eval as a number, or data.limit"
    return [f"{name} does nothing without {what}" for name, what in found.items()]
