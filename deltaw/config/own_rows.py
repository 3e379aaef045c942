"""Rows that were given as values: a run keeps them in its folder, and its config names them there.

    runs/first/data/train.jsonl   eval.jsonl

So the run can be resumed and measured like any other, and its config.yaml can be read. When the folder is moved, they
move with it: a name that leads nowhere and ends as theirs do is looked for beside the config.
"""

import json
from pathlib import Path
from typing import Any

from deltaw.config.data import DataConfig
from deltaw.config.run import RunConfig
from deltaw.config.sources import rows_given
from deltaw.files.encoding import UTF8
from deltaw.files.strict_json import MARK

FOLDER = "data"
FIELDS = ("train", "eval")


def rows_to_keep(data: DataConfig) -> dict[str, str]:
    """What to write into the run's folder, by the name in it."""
    files = {}
    for field in FIELDS:
        value = getattr(data, field)
        if isinstance(value, tuple) and (rows := rows_given(value)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            # With the mark they are UTF-8 whatever data.encoding says of other files.
            files[_file(field)] = ("" if data.encoding == UTF8 else MARK.decode()) + lines
    return files


def with_names(config: RunConfig) -> RunConfig:
    """The config with the names under which its rows are kept."""
    files = rows_to_keep(config.data)
    names = {field: str(Path(config.output) / _file(field)) for field in FIELDS if _file(field) in files}
    return _with_data(config, names) if names else config


def at_home(config: RunConfig, folder: Path) -> RunConfig:
    """The config of a run that lies in `folder` by now."""
    names = {}
    for field in FIELDS:
        value = getattr(config.data, field)
        if isinstance(value, str) and Path(value).parts[-2:] == (FOLDER, f"{field}.jsonl"):
            own = folder / _file(field)
            if not Path(value).exists() and own.is_file():
                names[field] = str(own)
    return _with_data(config, names) if names else config


def _with_data(config: RunConfig, fields: dict[str, Any]) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=fields)})


def _file(field: str) -> str:
    return f"{FOLDER}/{field}.jsonl"
