"""benchmarks/gpu.py on a CPU with a tiny model: its logic, not its figures."""

import csv
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_arms, gpu_models, gpu_timed, gpu_train
from benchmarks.gpu_arms import Arm
from benchmarks.gpu_models import SHAPES, TOY, Batch, Row
from deltaw.training.captured import Captured

SCRIPT = Path(gpu.__file__)


def here(arguments: list[str], seconds: float) -> tuple[list[Row], str]:
    """What a process of the script would print, without the process."""
    rows = list(gpu.child(gpu.parse(arguments)))
    return json.loads(json.dumps(rows)), ""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, spawn: Any = here) -> list[Row]:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--device", "cpu", "--toy", *arguments], spawn) == 0
    with (tmp_path / "out" / "gpu.csv").open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames or ()) == gpu.COLUMNS
        return list(table)


def test_deltaw_and_peft_pass_the_gate_and_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    rows = run(tmp_path, monkeypatch, "--arms", "deltaw,peft,peft-bf16,deltaw-uncaptured")
    assert all(row["torch"] == torch.__version__ and row["date"] and row["gpu"] for row in rows)
    assert "TFLOP/s" in rows[0]["note"] and rows[0]["arm"] == "gemm"
    for arm in ("deltaw", "peft", "peft-bf16", "deltaw-uncaptured"):
        gate, *timed = [row for row in rows if row["arm"] == arm]
        assert gate["note"].startswith("gate passed") and not gate["tokens_per_s"]
        assert [int(row["tokens"]) for row in timed] == list(TOY.sizes)
        assert all(float(row["tokens_per_s"]) > 0 and float(row["share_of_gemm"]) > 0 for row in timed)
        assert not any("DIFFERS" in row["note"] for row in timed)
    profiles = [row for row in rows if row["arm"] == "profile"]
    assert [int(row["tokens"]) for row in profiles] == list(TOY.sizes), "of deltaw alone"
    assert all("launches" in row["note"] and not row["tokens_per_s"] for row in profiles)


def test_what_cannot_run_has_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.NEEDS, "unsloth", "a_package_that_nobody_has")
    rows = run(tmp_path, monkeypatch, "--arms", "unsloth")
    assert rows[-1]["note"] == "skip: a_package_that_nobody_has is not installed"


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Arm], None]) -> None:
    right = gpu_arms.deltaw_arm

    def wrong(*arguments: str) -> Arm:
        arm = right(*arguments)
        change(arm)
        return arm

    monkeypatch.setitem(gpu_arms.ARMS, "deltaw", (wrong, ""))


def test_an_arm_that_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(arm: Arm) -> None:
        passed = arm.passed
        arm.passed = lambda batch: passed(batch) * 1.001

    changed(monkeypatch, change)
    rows = [row for row in run(tmp_path, monkeypatch, "--arms", "deltaw") if row["arm"] == "deltaw"]
    assert len(rows) == 1 and rows[0]["note"].startswith("gate FAILED")


def test_the_gate_is_of_gradients_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(arm: Arm) -> None:
        passed = arm.passed

        def other(batch: Batch) -> Any:
            loss = passed(batch)
            for name, parameter in arm.parameters.items():
                if name.endswith(".A") and parameter.grad is not None:
                    parameter.grad[0].zero_()
            return loss

        arm.passed = other

    changed(monkeypatch, change)
    rows = [row for row in run(tmp_path, monkeypatch, "--arms", "deltaw") if row["arm"] == "deltaw"]
    assert len(rows) == 1 and rows[0]["note"].startswith("gate FAILED")


def test_an_error_at_one_size_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(arm: Arm) -> None:
        step = arm.step

        def limited(batch: Batch, coming: Batch) -> Any:
            if len(batch.tokens_T) == TOY.sizes[0]:
                raise torch.OutOfMemoryError("tried to allocate\nmuch")
            return step(batch, coming)

        arm.step = limited

    changed(monkeypatch, change)
    first, second, profile = gpu_timed.run_arm("deltaw", "toy", TOY, "cpu", None)
    assert first["note"] == "out of memory: tried to allocate" and "tokens_per_s" not in first
    assert second["tokens_per_s"] > 0 and profile["arm"] == "profile"


def test_a_step_that_is_not_captured_says_so() -> None:
    arm = gpu_arms.deltaw_arm("toy", "cpu")
    some = gpu_models.batches("toy", 64, 2, "cpu")
    arm.prepare(some)
    before = {name: parameter.detach().clone() for name, parameter in arm.parameters.items()}
    assert float(arm.step(some[0], some[1])) > 0
    assert not all(torch.equal(before[name], parameter) for name, parameter in arm.parameters.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Captured, "filled", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="steps aren't captured: division by zero"):
            arm.step(some[1], some[0])


def test_documents_of_one_length() -> None:
    for batch in gpu_models.batches("8b-4k", 8192, 4, "cpu"):
        assert batch.starts_S.tolist() == [0, 4096, 8192] and int(batch.tokens_T.max()) < 128256


def of_arms(answers: dict[str, tuple[list[Row], str]], asked: list[list[str]]) -> Any:
    """A stand-in for the processes: one answer per arm; timed rows a thousand tokens per second."""

    def spawn(arguments: list[str], seconds: float) -> tuple[list[Row], str]:
        asked.append(arguments)
        options = gpu.parse(arguments)
        if options.arm == "gemm":
            return [{"model": "8192^3", "tokens": 8192, "rate": 1e15}, {"arm": "truth", "passed": True}], ""
        gate = [{"arm": options.arm, "note": "gate passed", "passed": True}] if options.truth else []
        row = {"arm": options.arm, "tokens_per_s": 1000.0, "first_loss": 10.0, "note": ""}
        timed = [{**row, "model": model, "tokens": size} for model in options.models for size in options.sizes]
        return answers.get(options.arm, (gate + timed, ""))

    return spawn


def test_order_gates_and_shares() -> None:
    asked: list[list[str]] = []
    rows: list[Row] = []
    options = gpu.parse(["--models", "1b,8b,8b-4k", "--arms", "deltaw,peft,deltaw-uncaptured", "--sizes", "2048"])
    failed = {"peft": ([{"arm": "peft", "note": "gate FAILED", "passed": False}], "")}
    gpu.run_all(options, rows.append, of_arms(failed, asked))
    runs = [(each.arm, each.models, each.sizes, bool(each.truth)) for each in map(gpu.parse, asked)]
    assert runs == [
        ("gemm", ("1b", "8b", "8b-4k"), (2048,), True),
        ("deltaw", ("1b",), (2048,), True),
        ("deltaw", ("8b", "8b-4k"), (2048,), False),
        ("peft", ("1b",), (2048,), True),
        ("deltaw-uncaptured", ("1b",), (2048,), True),
        ("deltaw-uncaptured", ("8b",), (2048,), False),
    ]
    timed = [row for row in rows if row.get("tokens_per_s")]
    assert timed[0]["share"] == pytest.approx(1000 * gpu_models.flops_per_token("1b") / 1e15)
    assert {"arm": "peft", "model": "8b", "note": "skip: its gate was not passed"} in rows


def test_a_model_that_was_not_asked_for_is_gated_alone() -> None:
    options = ["--device", "cpu", "--toy", "--arm", "deltaw", "--models", "small", "--sizes", "64"]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(SHAPES, "small", SHAPES["toy"])
        truth = ["--truth", str(Path(folder) / "truth")]
        last = list(gpu.child(gpu.parse([*options, *truth, "--arm", "gemm"])))[-1]
        rows = list(gpu.child(gpu.parse([*options, *truth])))
    assert last == {"arm": "truth", "passed": True}
    assert [(row["arm"], row["model"], row.get("tokens")) for row in rows] == [
        ("deltaw", "toy", None),
        ("deltaw", "small", 64),
        ("profile", "small", 64),
    ]


def test_a_first_loss_unlike_the_first_arms_is_marked() -> None:
    rows: list[Row] = []
    other = [{"note": "gate passed", "passed": True}]
    other += [{"arm": "peft", "model": "135m", "tokens": 64, "tokens_per_s": 1.0, "first_loss": 10.01, "note": "so"}]
    options = gpu.parse(["--models", "135m", "--arms", "deltaw,peft", "--sizes", "64"])
    gpu.run_all(options, rows.append, of_arms({"peft": (other, "")}, []))
    assert rows[-1]["note"] == "LOSS DIFFERS from deltaw's 10.00000: so"


def test_what_there_is_no_time_for_is_said() -> None:
    rows: list[Row] = []
    asked: list[list[str]] = []
    options = gpu.parse(["--arms", "deltaw", "--models", "135m"])
    options.budget = 30

    def slow(arguments: list[str], seconds: float) -> tuple[list[Row], str]:
        quick = gpu.parse(arguments).arm == "gemm"
        return of_arms({}, asked)(arguments, seconds) if quick else ([], f"stopped after {seconds:.0f} s")

    gpu.run_all(options, rows.append, slow)
    assert rows[-1]["note"] == "stopped after 30 s"
    options.budget = -1
    gpu.run_all(options, rows.append, slow)
    assert rows[-1]["note"] == "skip: out of time"


@pytest.mark.parametrize(("shape", "size"), [("toy", 64), ("135m", 2048), ("1b", 16384)])
def test_batches_have_the_tokens_asked_for_and_little_padding(shape: str, size: int) -> None:
    for batch in gpu_models.batches(shape, size, 4, "cpu"):
        starts = batch.starts_S.tolist()
        assert len(batch.tokens_T) == size == starts[-1] and batch.ids_BL.numel() < 1.6 * size
        assert len(starts) > 2 and int(batch.tokens_T.max()) < SHAPES[shape]["vocabulary"]
        assert int((batch.labels_T != gpu_models.IGNORE).sum()) == batch.count == size - len(starts) + 1
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            document = batch.tokens_T[start:end]
            assert torch.equal(batch.labels_T[start : end - 1], document[1:])
            assert torch.equal(batch.positions_T[start:end], torch.arange(end - start))
            assert torch.equal(batch.ids_BL[row, : end - start], document)
            assert torch.equal(batch.padded_BL[row, : end - start], document)
            assert bool((batch.padded_BL[row, end - start :] == gpu_models.IGNORE).all())


@pytest.mark.parametrize(("shape", "millions"), [("135m", 134.5), ("1b", 1235.7), ("8b", 7504.7)])
def test_the_arithmetic_counts_these_models_weights(shape: str, millions: float) -> None:
    assert gpu_models.flops_per_token(shape) / 4e6 == pytest.approx(millions, abs=0.1)


def test_every_process_makes_the_same_model() -> None:
    one, two = gpu_models.build_model("toy", "cpu"), gpu_models.build_model("toy", "cpu")
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.bfloat16 and not a.requires_grad, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_exits_2() -> None:
    command = ["sh", str(SCRIPT.with_suffix(".sh"))]
    done = subprocess.run(
        command, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("no GPU here")


def test_a_process_prints_rows_and_its_end_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('noise'); print('ROW {\"a\": 1}'); sys.exit('it broke')")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.spawn([], 60) == ([{"a": 1}], "error: it broke")
    script.write_text("import time; print('ROW {\"a\": 1}', flush=True); time.sleep(60)")
    assert gpu.spawn([], 2) == ([{"a": 1}], "stopped after 2 s")


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--arms", "deltaw,nobody", "--models", "9b"])
    assert "unknown: nobody, 9b" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_on_a_gpu_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_train.main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU here")


def test_train_and_the_loop_take_the_same_batches(tmp_path: Path) -> None:
    given = {"steps": 6, "tokens_per_step": 128, "warmup_steps": 0}
    gpu_train.make_base("toy", tmp_path, "cpu", 1024)
    row, clock = gpu_train.timed(gpu_train.run_file(tmp_path, "large", device="cpu", **given))
    assert row["tokens"] == 128 and row["tokens_per_s"] > 0 and len(clock.marks) == 6
    seen: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        take = gpu_arms.Steps.step
        patch.setattr(
            gpu_arms.Steps,
            "step",
            lambda self, batches, coming: (
                seen.append([len(b.tokens_T) for b in batches]) or take(self, batches, coming)
            ),
        )
        row = gpu_train.loop_row(tmp_path, "cpu", **given)
    assert row["tokens"] == 128 and row["tokens_per_s"] > 0 and "3 steps" in row["note"]
    assert [sum(each) for each in seen[-3:]] == [mark.tokens for mark in clock.marks[3:]]


def test_steps_that_record_and_those_under_a_profiler_are_not_counted() -> None:
    clock = gpu_train.Clocked(20, profiled=True)
    clock.marks = [gpu_train.Mark(float(n), n + 0.5, 10, 1.0, n == 11) for n in range(20)]
    assert [one.began for one, _ in clock.steady()] == [10.0], "of 10, 11 and 12; none is known to follow the last"
    clock.marks[14] = clock.marks[14]._replace(began=99.0)
    assert all(gap == 1.0 for _, gap in clock.steady())
