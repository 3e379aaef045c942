"""Runs of every start and of DoRA: they learn, stop and go on to the same bits, and leave what any tool can load."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.files.safetensors import load_safetensors
from deltaw.kinds import DoRA
from deltaw.model import open_model
from deltaw.training import measuring, opening
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.tiny import run_file, tiny_base, words
from tests.training.test_loop import QUIET, changed, digest, stop_at

R = 4
KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "lora-ga": {"init": "lora-ga"},
    "eva": {"init": "eva"},
    "dora": {"magnitude": True},
    "dora from eva": {"magnitude": True, "init": "eva"},
    "pissa, rslora": {"init": "pissa", "scaling": "rslora", "dropout": 0.3},
    "dora, dropout": {"magnitude": True, "dropout": 0.3},
}


def run(folder: Path, kind: str, **changes: Any) -> Adapter:
    adapter = {"rank": R, "alpha": 8, **KINDS[kind]}
    fields = {"adapter": adapter, "evaluate": {"general": None, "report": False, "samples": 0}, **changes}
    return train(parse_config(run_file(folder, **fields)), display=QUIET)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows, for the runs that several tests look at."""
    folder = tmp_path_factory.mktemp("starts")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    return folder


def whole(shared: Path, kind: str) -> Path:
    """A finished run of this kind, taken once. Read only."""
    folder = shared / kind
    if not folder.exists():
        run(shared, kind, output=str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_a_resumed_run_has_the_same_bits(
    shared: Path, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    straight, cut = whole(shared, kind), tmp_path / "cut"
    adapter = Adapter.load(straight)
    result = json.loads((straight / "result.json").read_text())
    assert result["eval"]["after"]["loss"] < result["eval"]["before"]["loss"]
    moved = KINDS[kind].get("init") in ("pissa", "olora", "lora-ga")
    assert adapter.spec.init == "lora" and adapter.spec.rank == (2 * R if moved else R)
    stop_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        run(shared, kind, output=str(cut))
    monkeypatch.undo()

    def again(*args: Any) -> None:
        raise AssertionError("the start is in the checkpoint")

    monkeypatch.setattr(opening, "start_from_data", again)
    resume(cut, display=QUIET)
    assert digest(cut) == digest(straight)


@pytest.mark.parametrize("kind", ["pissa", "lora-ga", "eva", "dora"])
def test_what_a_run_leaves_has_the_loss_that_the_run_measured(shared: Path, kind: str) -> None:
    from deltaw.data.opening import open_dataset
    from deltaw.evaluation.held_out import held_out_loss

    straight = whole(shared, kind)
    result = json.loads((straight / "result.json").read_text())
    model = open_model(straight)
    assert model.attached is not None and model.attached.spec.init == "lora"
    _, _, dataset = open_dataset(parse_config(run_file(shared)), QUIET)
    loss, _ = held_out_loss(model.forward, dataset.eval)
    assert loss == pytest.approx(result["eval"]["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["pissa", "pissa, rslora", "dora"])
def test_the_best_step_comes_back_onto_the_layers(folder: Path, monkeypatch: Any, kind: str) -> None:
    """Of held-out losses that only rise, the first is the best; what is saved are its bytes."""
    losses = iter(range(1, 99))
    monkeypatch.setattr(measuring, "held_out_loss", lambda *args: (float(next(losses)), 1))
    adapter = run(folder, kind, **changed(folder, steps=4, eval_every=1))
    assert json.loads((folder / "run/result.json").read_text())["best_step"] == 1
    best = load_safetensors(folder / "run/checkpoints/step-000001/factors.safetensors")
    last = load_safetensors(folder / "run/checkpoints/step-000004/factors.safetensors")
    for path, update in adapter.factors.items():
        low = update.low if isinstance(update, DoRA) else update
        assert isinstance(low, LowRank)
        a_RN = best[f"{path}.a"]
        # Where the start is taken off again, the factors are put together anew, and only A's first rows are recognised.
        assert torch.equal(low.a_RN[:R], a_RN) and not torch.equal(low.a_RN[:R], last[f"{path}.a"])


def test_a_checkpoint_holds_the_start(folder: Path, monkeypatch: Any) -> None:
    stop_at(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        run(folder, "pissa")
    factors = load_safetensors(folder / "run/checkpoints/step-000002/factors.safetensors")
    names = {name.rpartition(".")[2] for name in factors}
    assert names == {"a", "b", "initial_a", "initial_b"}
    start = factors["model.layers.0.self_attn.q_proj.initial_b"]
    change = factors["model.layers.0.self_attn.q_proj.b"]
    assert 0 < change.norm() < start.norm()
    (folder / "run/config.yaml").write_text((folder / "run/config.yaml").read_text().replace("pissa", "lora"))
    with pytest.raises(InputError, match=r"adapter.init: pissa -> lora"):
        resume(folder / "run", display=QUIET)


def test_data_gives_the_start_and_the_seed_its_order(folder: Path) -> None:
    """Two rows of data or another order of them, another start; the learning rate is next to nothing."""
    still = {"steps": 1, "lr": 1e-12, "warmup_steps": 0}
    first = run(folder, "eva", **changed(folder, **still))
    other = run(folder, "eva", output=str(folder / "other"), **changed(folder, **still, seed=1))
    assert not any(torch.allclose(u.a_RN, other.factors[path].a_RN, atol=1e-3) for path, u in first.factors.items())
