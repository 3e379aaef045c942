"""What a run folder says of its training: damaged, odd and lacking records are read as far as they go, and said."""

import copy
import json
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.adapter.file import Adapter, BaseId
from deltaw.analysis.checks import check_adapter, check_run
from deltaw.analysis.measure import measure
from deltaw.analysis.page import Facts, Samples, Section, Table, render
from deltaw.analysis.report import Report
from deltaw.analysis.sections import of_weights
from deltaw.analysis.summary import summarise
from deltaw.analysis.training import Training, read_training
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.run import Run

CONFIG = "base: b\ndata: {train: t}\noutput: o\n"
RESULT: dict[str, Any] = {
    "trained_parameters": 1000,
    "steps": 20,
    "best_step": 20,
    "tokens": 2000,
    "epoch_tokens": 1000,
    "tokens_per_second": 12.5,
    "peak_memory_bytes": 2**30,
    "eval": {"rows": 10, "before": {"loss": 3.0, "exact_match": 0.0}, "after": {"loss": 1.0, "exact_match": 0.5}},
    "forgetting": {
        "source": "builtin:general",
        "tokens": 900,
        "loss_before": 2.0,
        "loss_after": 2.1,
        "kl": 0.1,
        "passages": 18,
        "rise_interval": [0.05, 0.15],
        "kl_interval": [0.08, 0.12],
    },
    "form": "completion",
    "train_rows": 100,
    "machine": {"device": "cpu", "threads": 1, "cpu": "x86"},
    "answers": [{"prompt": "a", "before": "b", "after": "c", "truth": None}],
}
STEPS = [
    {"step": i, "loss": 2 - i / 20, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100 * i, "supervised_tokens": 50 * i}
    for i in range(1, 21)
]
MODULES = {"layers.0.q_proj": measure(LowRank(torch.randn(2, 6), torch.randn(5, 2)), torch.randn(5, 6))}


def folder_of(folder: Path, result: str, metrics: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "result.json").write_text(result)
    (folder / "metrics.jsonl").write_bytes(metrics)
    return folder


def written(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def report_of(folder: Path) -> Report:
    training = read_training(folder)
    assert training is not None
    findings = [*check_run(training), *check_adapter(MODULES)]
    return Report(folder, Adapter(AdapterSpec(), {}, BaseId()), "b", MODULES, summarise(MODULES), findings, training)


def everywhere(report: Report, words: str) -> bool:
    """Whether the page, the text and the JSON all say it."""
    return all(words in said for said in (render(report.page()), report.gist(), json.dumps(report.to_json())))


@pytest.fixture
def sound(tmp_path: Path) -> Training:
    training = read_training(folder_of(tmp_path / "run", json.dumps(RESULT), written(STEPS)))
    assert training is not None
    return training


def test_a_sound_run_is_read_whole_and_without_a_word(sound: Training) -> None:
    assert sound.faults == () and sound.metrics == STEPS and sound.epochs == 2
    assert sound.result == {**RESULT, "forgetting": {**RESULT["forgetting"], "rise_interval": (0.05, 0.15),
        "kl_interval": (0.08, 0.12)}, "machine": {"device": "cpu", "cpu": "x86"}}  # fmt: skip
    assert {**sound.to_json(), "metrics": 0} == {**RESULT, "metrics": 0, "faults": []}
    assert sound.to_json()["metrics"]["loss"] == [line["loss"] for line in STEPS]


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 80, b'{"step": 4, "lo', b"", b"\xff\xfe\x85", b"[1, 2]", b"17", b'{"loss": 1.0}', b'{"step": "4"}',
     b'{"step": 4, "loss": "low"}', b'{"step": 1e400}', b'{"step": 4, "loss": ' + b"9" * 5000 + b"}", b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, damage: bytes) -> None:
    lines = written(STEPS).splitlines()
    lines[3] = damage
    report = report_of(folder_of(tmp_path / "run", json.dumps(RESULT), b"\n".join(lines) + b"\n"))
    assert report.training is not None
    assert [line["step"] for line in report.training.metrics if "loss" in line] == [1, 2, 3, *range(5, 21)]
    assert everywhere(report, "metrics.jsonl: 1 of its lines")
    assert render(report.page()).count("<tr>") >= 19


def test_resuming_keeps_lines_by_their_number(tmp_path: Path) -> None:
    """A line that can't be read still counts, or a resumed run would keep one line too many."""
    run = Run(folder_of(tmp_path / "run", "{}", b"\0\0\n" + written(STEPS[1:])))
    assert run.cut_metrics(10) == 1
    assert [line["step"] for line in run.read_metrics()] == list(range(2, 11))
    run.append_metrics({"step": 11})
    assert run.cut_metrics(11) == 1 and run.read_metrics()[-1] == {"step": 11}


def test_a_result_that_is_no_json_leaves_the_adapter_and_the_curve(tmp_path: Path) -> None:
    report = report_of(folder_of(tmp_path / "run", '{"steps": 20, "ev', written(STEPS)))
    assert everywhere(report, "result.json") and "Loss by step" in render(report.page())
    assert not [words for _, words in report.findings if "held-out" in words]


def test_what_is_missing_is_said_and_what_was_never_measured_is_not(tmp_path: Path) -> None:
    without = {name: value for name, value in RESULT.items() if name != "eval"}
    report = report_of(folder_of(tmp_path / "run", json.dumps(without), written(STEPS)))
    assert everywhere(report, "eval") and not [words for _, words in report.findings if "held-out" in words]
    unmeasured = {**RESULT, "eval": {"rows": 0, "before": None, "after": None}, "forgetting": None, "answers": []}
    report = report_of(folder_of(tmp_path / "run", json.dumps(unmeasured), written(STEPS)))
    assert report.training is not None and report.training.faults == ()
    assert [level for level, words in report.findings if "no held-out rows" in words] == ["note"]


@pytest.mark.parametrize("value", [float("nan"), "20", [20], True, 10**400])
def test_a_figure_of_another_kind_is_left_out_and_named(tmp_path: Path, value: Any) -> None:
    odd = {**RESULT, "steps": value, "eval": {**RESULT["eval"], "after": {"loss": value, "exact_match": 0.5}}}
    report = report_of(folder_of(tmp_path / "run", json.dumps(odd), written(STEPS)))
    assert everywhere(report, "steps, eval.after.loss") and "steps" not in report.training.result  # type: ignore[union-attr]
    assert not [words for _, words in report.findings if "held-out loss" in words]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


ODD = st.sampled_from(
    [None, True, -1, 0, 10**400, 1e308, -1e308, float("nan"), float("inf"), "", "x", "\x1b[2J\u202e", [], [1], [[]], {},
     {"loss": 1}, {"before": {}}, [None, None], ["a", "b", "c"]]
)  # fmt: skip


def is_whole(line: bytes) -> bool:
    """Whether a line of metrics.jsonl holds a step and figures, or words where words belong."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**53:
        return False
    return all(type(value) in (int, float) or name in ("skipped", "rows") for name, value in record.items())


@cache
def sections_of_weights() -> list[Section]:
    """They are of MODULES alone, whatever a run's records say."""
    return of_weights(MODULES)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_mutation_stops_the_report(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Fields replaced or removed, bytes overwritten: a report comes out, as text, as JSON and as a page."""
    result, lines = copy.deepcopy(RESULT), copy.deepcopy(STEPS)
    for raw in (result, lines):
        for _ in range(data.draw(st.integers(0, 3))):
            path = data.draw(st.sampled_from([place for place in places(raw) if place]))
            within: Any = raw
            for key in path[:-1]:
                within = within[key]
            if data.draw(st.booleans()):
                within[path[-1]] = copy.deepcopy(data.draw(ODD))  # a later mutation may be of a part of it
            else:
                del within[path[-1]]
    metrics = bytearray(written(lines))
    for at in data.draw(st.lists(st.integers(0, max(0, len(metrics) - 1)), max_size=5)) if metrics else ():
        metrics[at] = data.draw(st.integers(0, 255))
    folder = folder_of(tmp_path_factory.getbasetemp() / "mutated", json.dumps(result), bytes(metrics))
    report = report_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltaw.analysis.report.of_weights", lambda measures: sections_of_weights())
        page, raw_json = render(report.page()), json.dumps(report.to_json(), allow_nan=False)
    assert "</html>" in page and raw_json and "\x1b" not in report.gist()
    assert report.training is not None
    # A digit that became another can't be told; whatever can't be read as figures of a step must be said.
    if not all(is_whole(line) for line in bytes(metrics).split(b"\n") if line.strip()):
        assert report.training.faults, "a record can't be read and nothing is said"


def test_the_page_leads_with_what_the_run_was_for(tmp_path: Path) -> None:
    page = report_of(folder_of(tmp_path / "run", json.dumps(RESULT), written(STEPS))).page()
    labels = [fact.label for block in page.sections[0].blocks if isinstance(block, Facts) for fact in block.facts]
    assert labels[:3] == ["held-out loss", "exact match", "loss on general text"] and "amplification" in labels[3:]


def test_the_page_says_how_the_run_was_made_and_how_to_make_it_again(tmp_path: Path) -> None:
    finished = {
        **RESULT,
        "finished": "2026-01-02T03:04:05+00:00",
        "total_seconds": 75.0,
        "versions": {"deltaw": "9.8.7"},
        "checkpointing": "blocks",
        "processes": 2,
    }
    folder = folder_of(tmp_path / "a run", json.dumps(finished), written(STEPS))
    (section,) = [section for section in report_of(folder).page().sections if section.title == "The run"]
    (table,) = section.blocks
    assert isinstance(table, Table)
    rows = {str(name): str(words) for name, words in table.rows}
    assert rows["base"] == "b" and "100 rows" in rows["data"] and "20 steps" in rows["length"]
    assert rows["finished"] == "2026-01-02T03:04:05+00:00, took 1:15" and rows["made with"] == "deltaw 9.8.7"
    assert "blocks" in rows["activations"] and rows["processes"].startswith("2") and "objective" not in rows
    program, verb, config, output = shlex.split(rows["again"])
    assert (program, verb, config) == ("deltaw", "train", str(folder / "config.yaml")) and output.startswith("output=")


def test_what_stands_around_every_question_is_shown_once(tmp_path: Path) -> None:
    system = "<|system|>\nAnswer as briefly as you can.\n<|user|>\n"
    answers = [
        {"prompt": f"{system}{asked}\n<|assistant|>\n", "before": "b", "after": "c", "truth": "t"}
        for asked in ("One?", "Two?")
    ]
    page = report_of(folder_of(tmp_path / "run", json.dumps({**RESULT, "answers": answers}), written(STEPS))).page()
    (section,) = [section for section in page.sections if section.title == "Answers"]
    frame, samples = section.blocks
    assert isinstance(samples, Samples) and [sample.prompt.strip() for sample in samples.samples] == ["One?", "Two?"]
    assert isinstance(frame, Table) and frame.rows[0][1] == system
