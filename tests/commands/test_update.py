"""inspect, compare, resize, combine, extract, scale and decompose from the command line, on a tiny run."""

import json
from pathlib import Path

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.files.lock import new_folder
from tests.test_cli import call


def ranks(path: Path) -> set[int]:
    return {update.rank for update in Adapter.load(path).factors.values()}


def test_inspect(folder: Path) -> None:
    code, out, err = call("inspect", folder / "one")
    assert code == 0 and "14 modules" in out and "page: " in out and "measuring" in err
    assert (folder / "one/report.html").is_file()
    code, out, err = call("inspect", folder / "one", "--json", "-o", folder / "page.html")
    assert code == 0 and json.loads(out)["summary"]["modules"] == 14 and err == ""
    assert (folder / "page.html").is_file()
    assert call("inspect", folder / "base")[0] == 2


def test_compare(folder: Path) -> None:
    code, out, _ = call("compare", folder / "one", folder / "two", "-o", folder / "c.html", "--json")
    assert code == 0 and -1 <= json.loads(out)["cosine"] <= 1 and (folder / "c.html").is_file()


@pytest.mark.parametrize(
    "verb", [["resize", "one", "--rank", 2], ["combine", "one", "two"], ["extract", "full", "--rank", 2],
             ["scale", "one", "--to", 0.5]]
)  # fmt: skip
def test_a_target_that_another_command_is_writing_is_refused(folder: Path, tmp_path: Path, verb: list) -> None:
    command = [folder / part if part in ("one", "two", "full") else part for part in verb]
    with new_folder(tmp_path / "out") as claimed:
        code, _, err = call(*command, "-o", tmp_path / "out")
        assert code == 2 and "in use by process" in err
        (claimed / "mine").write_text("mine")
    assert call(*command, "-o", tmp_path / "out")[0] == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert call(*command, "-o", tmp_path / "other")[0] == 0
    assert {path.name for path in (tmp_path / "other").glob(".*")} == set()


def test_a_run_does_not_start_where_another_command_is_writing(folder: Path, tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        code, _, err = call("train", folder / "run.yaml", f"output={tmp_path / 'out'}")
    assert code == 2 and "in use by process" in err and not (tmp_path / "out").exists()


def test_resize_to_a_rank_and_to_an_energy(folder: Path, tmp_path: Path) -> None:
    code, out, _ = call("resize", folder / "one", "-o", tmp_path / "small", "--rank", 2)
    assert code == 0 and "rank 2" in out and ranks(tmp_path / "small") == {2}
    code, out, _ = call("resize", folder / "one", "-o", tmp_path / "energy", "--energy", 0.9, "--json")
    result = json.loads(out)
    assert code == 0 and result["parameters"] < result["parameters_before"]
    assert max(loss["relative_error"] for loss in result["losses"]) <= 0.1**0.5 + 1e-6


def test_resize_to_a_loss_uses_the_runs_own_rows(folder: Path, tmp_path: Path) -> None:
    code, out, _ = call("resize", folder / "one", "-o", tmp_path / "a", "--max-loss-increase", "0.5%", "--json")
    trials = json.loads(out)["trials"]
    assert code == 0 and trials[0]["energy"] == 1.0 and len(trials) > 1
    code, _, err = call("resize", folder / "one/adapter", "-o", tmp_path / "b", "--max-loss-increase", "0.005")
    assert code == 2 and "name a data file" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one of --rank"),
        (("--rank", "2", "--energy", "0.5"), "give one of --rank"),
        (("--rank", "5"), "above the adapter's own 4"),
        (("--rank", "0"), "at least 1"),
        (("--energy", "1.5"), "at most 1"),
        (("--max-loss-increase", "much"), "isn't a share"),
    ],
)
def test_resize_refuses(folder: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    code, _, err = call("resize", folder / "one", "-o", tmp_path / "x", *options)
    assert code == 2 and said in err and not (tmp_path / "x").exists()


def test_nothing_is_written_over(folder: Path) -> None:
    code, _, err = call("resize", folder / "one", "-o", folder / "two", "--rank", 2)
    assert code == 2 and "exists already" in err


def test_combine_is_the_exact_sum(folder: Path, tmp_path: Path) -> None:
    weights = "0.75,-0.5"
    code, _, _ = call("combine", folder / "one", folder / "two", "-o", tmp_path / "sum", "--weights", weights)
    assert code == 0
    one, two, both = (
        Adapter.load(p).factors for p in (folder / "one/adapter", folder / "two/adapter", tmp_path / "sum")
    )
    for path, update in both.items():
        wanted = 0.75 * one[path].dense() - 0.5 * two[path].dense()
        assert (update.dense() - wanted).norm() <= 1e-5 * wanted.norm()
    code, _, err = call("combine", folder / "one", folder / "two", "-o", tmp_path / "x", "--weights", "1")
    assert code == 2 and "1 weight" in err
    code, _, err = call("combine", folder / "one", "-o", tmp_path / "x", "--method", "magic")
    assert code == 2 and "linear, ties, dare" in err


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_combine_by_entries(folder: Path, tmp_path: Path, method: str) -> None:
    arguments = ("combine", folder / "one", folder / "two", "--method", method, "--rank", 3, "--json")
    code, out, _ = call(*arguments, "-o", tmp_path / "sum")
    assert code == 0 and json.loads(out)["relative_error"]["largest"] > 0 and ranks(tmp_path / "sum") == {3}


def test_extract_from_a_full_run(folder: Path, tmp_path: Path) -> None:
    code, out, _ = call("extract", folder / "full", "-o", tmp_path / "lora", "--rank", 16, "--json")
    assert code == 0 and json.loads(out)["modules"] == 14
    full, lora = Adapter.load(folder / "full/adapter").factors, Adapter.load(tmp_path / "lora").factors
    exact = [path for path, update in full.items() if min(update.shape) == 16]
    assert exact and all(torch.allclose(lora[p].dense(), full[p].dense(), atol=1e-6) for p in exact)
    assert call("extract", folder / "one", "-o", tmp_path / "x", "--rank", 2)[0] == 2
    code, _, err = call("extract", folder / "base", "-o", tmp_path / "x", "--rank", 2)
    assert code == 2 and "--base" in err


def test_scale_measures_and_writes(folder: Path, tmp_path: Path) -> None:
    code, out, _ = call("scale", folder / "one", "--factors", "0,1", "--json")
    points = json.loads(out)["points"]
    assert code == 0 and [p["factor"] for p in points] == [0, 1] and points[1]["task_loss"] < points[0]["task_loss"]
    code, _, _ = call("scale", folder / "one", "--to", "0.5", "-o", tmp_path / "half")
    assert code == 0
    whole, half = Adapter.load(folder / "one/adapter").factors, Adapter.load(tmp_path / "half").factors
    assert all(torch.equal(half[p].dense(), 0.5 * whole[p].dense()) for p in whole)
    assert "--output" in call("scale", folder / "one", "--to", "0.5")[2]
    assert call("scale", folder / "one", "--factors", "a,b")[0] == 2


@pytest.mark.parametrize("options", [("-o", "out"), ("--to", "0.5", "-o", "out", "--factors", "1")])
def test_scale_refuses_what_it_would_ignore(folder: Path, options: tuple[str, ...]) -> None:
    code, out, err = call("scale", folder / "one", *options)
    assert code == 2 and not out and "--to" in err


def test_decompose(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("1,2\n2,4\n")
    code, out, _ = call("decompose", tmp_path / "m.csv")
    assert code == 0 and "rank" in out
    code, out, _ = call("decompose", f"{folder / 'base'}:model.layers.0.mlp.up_proj", "--json")
    assert code == 0 and json.loads(out)["rank"] == 32
    assert call("decompose", tmp_path / "none.npy")[0] == 2


def test_study_without_a_name_lists_them() -> None:
    code, out, _ = call("study", "--json")
    assert code == 0 and [claim["name"] for claim in json.loads(out)["studies"]][:2] == ["rank", "lr10"]
    assert call("study", "nothing")[0] == 2
