"""`deltaw preview`: the rows that a run would train on, with the trained tokens marked (data/preview.py)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deltaw.config import load_config
from deltaw.show.progress import Display
from deltaw.show.result import Result


def preview_named(run: Path, overrides: Sequence[str], *, rows: int, display: Display) -> Result:
    """The first `rows` examples, the counts, and the warnings that the run would give. Loads no model."""
    config = load_config(run, overrides)
    from deltaw.data.opening import limits_of, open_dataset
    from deltaw.data.preview import printed

    source, renderer, dataset = open_dataset(config, display)
    dataset.report.warnings.extend(limits_of(source, dataset))
    return Result(asdict(dataset.report), printed(dataset, renderer.tokenizer, rows))
