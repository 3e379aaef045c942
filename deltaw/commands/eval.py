"""`deltaw eval`: a run on its own held-out rows, or any model on any file."""

from contextlib import nullcontext

from deltaw.config import EvaluateConfig, RunConfig
from deltaw.errors import InputError
from deltaw.evaluate.held_out import evaluate
from deltaw.evaluate.metrics import METRICS
from deltaw.evaluate.rows import rows_of
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import table


def eval_named(
    name: str,
    data: str | None,
    *,
    base: str | None,
    use_adapter: bool,
    metrics: list[str] | None,
    rows: int | None,
    max_tokens: int | None,
    display: Display,
) -> Result:
    """Loss, perplexity and metrics. Raises InputError before the weights are read."""
    named = Named(name)
    config = measured(named.config, metrics, max_tokens)
    model, examples = rows_of(named, data, base=base, rows=rows, display=display)
    with nullcontext() if use_adapter or model.attached is None else model.attached.disabled():
        evaluation = evaluate(model, examples, config, display=display)
    figures = {
        "model": name,
        "adapter": model.attached is not None and use_adapter,
        "rows": len(examples),
        "supervised_tokens": evaluation.supervised_tokens,
        **evaluation.summary(),
    }
    return Result(figures, table((title.replace("_", " "), str(value)) for title, value in figures.items()))


def measured(run: RunConfig | None, metrics: list[str] | None, max_tokens: int | None) -> EvaluateConfig:
    """What is measured: the metrics named, else the run's own; answers as long as asked for, else as the run's."""
    unknown = [metric for metric in metrics or () if metric not in METRICS]
    if unknown:
        raise InputError(f"no metric {unknown[0]!r}", fix=f"known: {', '.join(METRICS)}")
    own = run.evaluate if run else EvaluateConfig()
    config = EvaluateConfig.checked(
        metrics=tuple(metrics) if metrics else own.metrics,
        max_new_tokens=own.max_new_tokens if max_tokens is None else max_tokens,
        samples=0,
    )
    if max_tokens is not None and not config.metrics:
        raise InputError("--max-tokens does nothing without a metric: nothing is answered", fix="name one: --metrics")
    return config
