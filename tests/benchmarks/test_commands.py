"""What is run, in which order, and what is refused; the verdicts of gates and curves on made-up numbers."""

from pathlib import Path

import pytest
import torch

from benchmarks import bench, curves
from benchmarks.arms import parse
from benchmarks.bench import ROOT, TRAIN, WITHOUT_ROWS, Job, plan
from benchmarks.gates import Gate, Seen, compare, cosine, worst
from deltaw.config import load_config

ALL = ("dense", "words", "chats", "long")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["peft", "dense", "--without", "loss"], "the arm must be deltaw"),
        (["deltaw", "dense", "--without", "luck"], "invalid choice"),
        (["trl", "long"], "steps of one number of rows"),
        (["peft-compile", "words"], "only dense"),
        (["deltaw", "dense", "--steps", "0"], "at least 1"),
        (["unsloth", "dense"], "invalid choice"),
        (["deltaw", "sparse"], "invalid choice"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_arms_take_turns_three_times() -> None:
    dense = [job for job in plan(ALL, "bfloat16", "float32") if job.workload == "dense" and job.dtype == "bfloat16"]
    turns = [(job.round, job.arm) for job in dense if not job.without and job.arm != "peft-compile"]
    assert turns == [(number, arm) for number in (1, 2, 3) for arm in ("gemm", "deltaw", "peft")]


def test_only_the_first_round_must_run() -> None:
    jobs = plan(ALL, "bfloat16", "float32")
    assert [job.must for job in jobs] == sorted((job.must for job in jobs), reverse=True)
    assert len(set(jobs)) == len(jobs)


def test_plan_keeps_to_what_was_asked() -> None:
    assert {job.workload for job in plan(["chats"], "float32", "bfloat16")} == {"chats"}
    assert {job.dtype for job in plan(ALL, "float32", None)} == {"float32"}
    assert [job.arm for job in plan(["words"], "float32", None, quick=True)] == ["gemm", "deltaw", "trl"]
    assert any(job.arm == TRAIN for job in plan(["words"], "float32", None))


def test_a_job_that_would_end_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "arm", lambda job, quick: {"arm": job.arm})
    must, later = Job("peft", "dense", "bfloat16", must=True), Job("deltaw", "dense", "bfloat16")
    rows, left_out = bench.run([must, later], seconds=0, quick=False)
    assert [row["arm"] for row in rows] == ["peft"]
    assert left_out == [later]
    assert "no time was left" in bench._left_out(later)["error"]


@pytest.mark.slow  # a process that imports all that an arm needs
def test_a_failing_arm_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROOT", Path("/"))  # where no package `benchmarks` is
    (row,), _ = bench.run([Job("peft", "dense", "bfloat16", must=True)], seconds=0, quick=True)
    assert "benchmarks" in row["error"] and not row["tokens_per_s"]


def seen(loss: float, a: list[float], b: list[float]) -> Seen:
    return Seen([loss], {"x.A": torch.tensor(a), "x.B": torch.tensor(b)})


def test_gates_pass_what_agrees_and_fail_what_does_not() -> None:
    truth = seen(2.0, [1.0, 2.0], [3.0, 4.0])
    assert all(gate.passed for gate in compare("dense", "float32", truth, truth, truth))
    wrong = seen(2.1, [2.0, -1.0], [3.0, 4.0])
    assert [gate.passed for gate in compare("dense", "float32", wrong, truth, truth)] == [False, False, True]


def test_bfloat16_gets_the_error_of_peft_as_its_budget() -> None:
    truth, peft = seen(2.0, [1.0], [1.0]), seen(2.01, [1.0], [1.0])
    for loss, passed in ((2.02, True), (1.98, True), (2.04, False)):
        assert compare("chats", "bfloat16", seen(loss, [1.0], [1.0]), peft, truth)[0].passed is passed


def test_a_gate_fails_on_nan() -> None:
    assert not Gate("dense", "float32", "loss", float("nan"), 1.0, at_most=True).passed
    assert not Gate("dense", "float32", "cosine", float("nan"), 0.9, at_most=False).passed


def test_cosines_are_over_all_tensors_of_one_half() -> None:
    truth = {"x.A": torch.tensor([1.0, 0.0]), "y.A": torch.tensor([10.0]), "x.B": torch.tensor([1.0])}
    ours = {"x.A": torch.tensor([0.0, 1.0]), "y.A": torch.tensor([10.0]), "x.B": torch.tensor([-1.0])}
    assert cosine(ours, truth, "A") == pytest.approx(100 / 101)
    assert cosine(ours, truth, "B") == -1
    assert worst(ours, truth) == (-1, "x.B")


def test_a_curve_is_held_to_the_band() -> None:
    peft = [[1.0] * 60, [1.2] * 60, [1.4] * 60]
    inside = curves.judge(peft, [[0.7] * 60, [1.2] * 60, [1.7] * 60])
    assert inside.tolerance == pytest.approx(0.4) and inside.outside == 0
    assert inside.distance == pytest.approx(0.3)
    outside = curves.judge(peft, [[0.9] * 60, [1.2] * 60, [1.9] * 60])
    assert outside.outside == 41 and outside.points == 3 * 41  # every smoothed step of one curve


def test_deltaw_may_leave_the_band_as_often_as_peft_does() -> None:
    peft = [[1.0] * 60, [1.0] * 60, [1.4] * 60]  # two bands of width 0.4, one of no width that the third curve leaves
    verdict = curves.judge(peft, [[1.9] * 60, [1.0] * 60, [1.0] * 60])
    assert (verdict.outside, verdict.own, verdict.inside) == (41, 41, True)
    assert not curves.judge(peft, [[1.9] * 60, [1.9] * 60, [1.0] * 60]).inside


def test_curves_come_back_from_their_file(tmp_path: Path) -> None:
    made = {(arm, seed): [1.0, 0.5 + seed] for seed in curves.SEEDS for arm in ("peft", "deltaw")}
    curves.write(tmp_path / "curves.csv", made)
    assert curves.read(tmp_path / "curves.csv") == made


def test_smoothing_is_a_running_mean() -> None:
    assert curves.smooth([1.0, 2.0, 3.0, 4.0], window=2) == [1.5, 2.5, 3.5]


def test_curves_are_written_a_column_a_run(tmp_path: Path) -> None:
    curves.write(tmp_path / "curves.csv", {("peft", 0): [1.0, 0.5], ("deltaw", 0): [1.0, 0.25]})
    assert (tmp_path / "curves.csv").read_text().splitlines() == [
        "step,peft seed 0,deltaw seed 0",
        "1,1.00000,1.00000",
        "2,0.50000,0.25000",
    ]


def test_the_run_whose_first_step_is_timed_is_accepted() -> None:
    assert load_config(ROOT / "recipes" / "demo.yaml", WITHOUT_ROWS).data.eval is None
