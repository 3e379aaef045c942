"""Finished tiny runs of each kind of adapter, and the runs that start from them or go on."""

from pathlib import Path
from typing import Any

from deltaw.config import parse_config
from deltaw.show.progress import Display
from deltaw.training.run import train
from tests.tiny import run_file, tiny_base, words

KINDS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8},
    "dora": {"rank": 4, "alpha": 8, "magnitude": True},
    "pissa": {"rank": 4, "alpha": 8, "init": "pissa"},
    "full": "full",
    "ranks": {"rank": 4, "alpha": 8, "scaling": "rslora", "rank_overrides": {"q_proj": 2}, "dropout": 0.2},
}
NO_ANSWERS = {"samples": 0, "general": None, "report": False}


def config(folder: Path, output: str, *, adapter: Any, train_on: str = "more.jsonl", **options: Any) -> Any:
    """A run of six steps without evaluations on the way; `options` of `train`."""
    data = {"train": str(folder / train_on), "eval": 8}
    fields = run_file(folder, adapter=adapter, data=data, evaluate=NO_ANSWERS, output=str(folder / output))
    return parse_config({**fields, "train": {**fields["train"], "eval_every": None, **options}})


def finished_runs(folder: Path) -> Path:
    """A base, two sets of rows, and a finished run of each kind."""
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    words(folder / "more.jsonl", 90)
    for kind, adapter in KINDS.items():
        run = config(
            folder, kind, adapter=adapter, train_on="train.jsonl", schedule="constant", warmup_steps=0, steps=None
        )
        train(run, display=Display(quiet=True))
    return folder
