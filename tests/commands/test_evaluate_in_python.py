"""`deltaw.evaluate`: what `deltaw eval` measures, from Python, on a file or on rows."""

import json
from importlib import import_module
from pathlib import Path

import pytest

import deltaw
from deltaw.commands.eval import eval_named
from deltaw.errors import InputError
from deltaw.show.progress import Display
from tests.faults.common import child, imported_anew


def test_a_file_and_its_rows_are_one_and_the_same_as_the_verb(folder: Path) -> None:
    file = folder / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 60
    by_file, by_rows = (deltaw.evaluate(folder / "one", data, metrics=["exact_match"]) for data in (file, rows))
    assert by_file.rows == by_rows.rows == 60
    assert by_file.adapter and by_rows.adapter and by_file.base
    assert by_file.adapter.summary() == by_rows.adapter.summary() != by_file.base.summary()
    assert len(list(by_rows.answers())) == 60
    assert len(repr(by_rows)) < 400 and "\n" not in repr(by_rows)
    said = eval_named(
        str(folder / "one"), str(file), base=None, use_adapter=True, use_base=True, metrics=["exact_match"], rows=None,
        max_tokens=None, output=None, allow_code=False, display=Display(quiet=True),
    )  # fmt: skip
    assert said.data["loss"] == by_file.adapter.loss


def test_a_run_is_measured_on_its_own_rows(folder: Path) -> None:
    assert deltaw.evaluate(str(folder / "one"), metrics=["none"]).rows == 8


@pytest.mark.parametrize("data", [[], [{"prompt": object()}], 3])
def test_what_is_no_data_is_refused(folder: Path, data: object) -> None:
    with pytest.raises(InputError):
        deltaw.evaluate(folder / "one", data)  # type: ignore[arg-type]


def test_the_name_is_the_function_whatever_was_imported_before() -> None:
    def work() -> None:
        imported_anew("deltaw")
        import_module("deltaw.evaluation")
        import_module("deltaw.config.evaluate")
        assert import_module("deltaw").evaluate.__name__ == "evaluate"

    ended = child(work)
    assert ended.code == 0, ended.output
