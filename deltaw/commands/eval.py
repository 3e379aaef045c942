"""`deltaw eval`: a run on its own held-out rows, or any model on any file."""

from pathlib import Path
from typing import Any

from deltaw.config import EvaluateConfig, RunConfig, load_config
from deltaw.errors import InputError
from deltaw.evaluate.held_out import evaluate
from deltaw.evaluate.metrics import METRICS
from deltaw.evaluate.rows import rows_of
from deltaw.model import is_run
from deltaw.show.progress import Display


def evaluate_on(
    name: str,
    data: str | None,
    *,
    base: str | None,
    use_adapter: bool,
    metrics: list[str] | None,
    rows: int | None,
    max_tokens: int | None,
    display: Display,
) -> dict[str, Any]:
    """{model, adapter, rows, loss, perplexity, <metrics>}. Raises InputError before the weights are read."""
    config = load_config(Path(name) / "config.yaml") if is_run(Path(name)) else None
    what = _what(config, metrics, max_tokens)
    model, examples = rows_of(name, data, base=base, rows=rows, display=display)
    if use_adapter or model.attached is None:
        result = evaluate(model, examples, what, display=display)
    else:
        with model.attached.disabled():
            result = evaluate(model, examples, what, display=display)
    return {
        "model": name,
        "adapter": model.attached is not None and use_adapter,
        "rows": len(examples),
        "supervised_tokens": result.supervised_tokens,
        **result.summary(),
    }


def _what(config: RunConfig | None, metrics: list[str] | None, max_tokens: int | None) -> EvaluateConfig:
    """What is measured: the metrics named, else the run's own; answers as long as asked for, else as the run's."""
    unknown = [metric for metric in metrics or () if metric not in METRICS]
    if unknown:
        raise InputError(f"no metric {unknown[0]!r}", fix=f"known: {', '.join(METRICS)}")
    own = config.evaluate if config else EvaluateConfig()
    what = EvaluateConfig.checked(
        metrics=tuple(metrics) if metrics else own.metrics,
        max_new_tokens=own.max_new_tokens if max_tokens is None else max_tokens,
        samples=0,
    )
    if max_tokens is not None and not what.metrics:
        raise InputError("--max-tokens does nothing without a metric: nothing is answered", fix="name one: --metrics")
    return what
