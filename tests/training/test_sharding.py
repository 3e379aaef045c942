"""A base that is sharded over the ranks trains what a whole one trains; each rank has its part."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter
from deltaw.base import packed
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.load import Base, open_skeleton
from deltaw.base.packed import pack_modules
from deltaw.base.source import find_base
from deltaw.config import AdapterSpec, config_of
from deltaw.errors import InputError
from deltaw.kernels.packed import CastWeight
from deltaw.model import Model
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.training import run as loop
from deltaw.training import sharding
from deltaw.training.run import train
from deltaw.training.sharding import base_bytes, first_pass, is_wanted, shard
from deltaw.training.world import World
from tests.bases import KINDS
from tests.faults.common import command
from tests.tiny import run_file, tiny_base, words
from tests.training.processes import checkpoints, in_step, together
from tests.training.test_distributed import same_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_base(folder / "base")
    words(folder / "train.jsonl", 40)
    return folder


def fields(place: Path, name: str, **train_: Any) -> dict[str, Any]:
    made = run_file(place, output=str(place / name))
    made["evaluate"] = {"metrics": ["exact_match"], "samples": 2, "max_new_tokens": 3, "general": None, "report": False}
    made["train"] |= {"sample_every": 4, "shard": "always", "steps": 4, **train_}
    return made


def held(model: torch.nn.Module, adapter: list[torch.nn.Parameter]) -> int:
    """Bytes of the base's tensors in this process."""
    ours = {id(parameter) for parameter in adapter}
    parts: list[torch.Tensor] = [
        getattr(p, "to_local", lambda p=p: p)() for p in model.parameters() if id(p) not in ours
    ]
    return sum(part.nbytes for part in parts)


def opened(kind: str, as_parts: bool) -> Model:
    model: PreTrainedModel = KINDS[kind]().requires_grad_(False)
    if as_parts:
        model = model.bfloat16()
        pack_modules(model, lambda _, w_MN: CastWeight(w_MN, torch.float32))
        model = model.float()
    forward, attached = plan_forward(model), attach(model, AdapterSpec(rank=3, targets="all-linear"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return Model(Base(model, None, torch.float32, CPU, ""), None, forward, attached)  # type: ignore[arg-type]


def gradients(model: Model) -> list[torch.Tensor]:
    """Of a loss, which is the first."""
    assert model.attached is not None
    tokens_T = torch.arange(20) * 7 % 97
    loss, _ = model.forward.loss(Batch.of(tokens_T, [0, 8, 20], torch.roll(tokens_T, -1)))
    for parameter in model.attached.parameters:
        parameter.grad = None
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.attached.parameters if parameter.grad is not None)]


@pytest.mark.parametrize(
    "bases",
    [
        [("llama", False), ("tied llama", True)],
        pytest.param([("gpt2", False), ("gpt2", True), ("llama", True)], marks=pytest.mark.slow),
    ],
)
def test_a_pass_gives_the_same_bits_and_each_rank_holds_its_part(
    bases: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five ranks, which divide none of the sizes."""
    monkeypatch.setattr(packed, "LEAST", 1)

    def work(rank: int) -> None:
        world = World.of_environment()
        with world.joined():
            world.start(CPU)
            for kind, as_parts in bases:
                before, model = gradients(opened(kind, as_parts)), opened(kind, as_parts)
                base, adapter = model.base.model, model.attached.parameters  # type: ignore[union-attr]
                ends = [base.get_input_embeddings(), base.get_output_embeddings()]  # type: ignore[operator]
                tied = set(ends[0].parameters()) & set(ends[1].parameters())
                whole = sum(p.nbytes for p in tied) + 4 * 48 * 16 * (kind == "gpt2") + 1000
                size = held(base, adapter)
                model, shards = shard(model, CPU, world)
                first_pass(model)
                assert shards and held(base, adapter) < (size - whole) / 3 * 1.15 + whole, kind
                for _ in range(2):
                    for one, other in zip(gradients(model), before, strict=True):
                        torch.testing.assert_close(
                            one, other, rtol=0, atol=0 if kind != "gpt2" or not as_parts else 1e-5
                        )
                assert held(base, adapter) < (size - whole) / 3 * 1.15 + whole, "it stays so after a backward"

    ended = together(3, work)
    assert [rank.code for rank in ended] == [0] * 3, "\n".join(rank.output for rank in ended)


@pytest.mark.slow
def test_a_sharded_run_is_that_of_one_process_and_goes_on_unsharded(place: Path) -> None:
    """Two ranks measure, train, ask and evaluate; both are stopped in step 3; one goes on, with the whole base."""
    train(fields(place, "whole"), display=QUIET)
    file = place / "run.yaml"
    file.write_text(json.dumps(fields(place, "run")))

    def work(rank: int) -> None:
        with in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None):
            command("train", file, "--quiet")()

    ended = together(2, work)
    assert [rank.code for rank in ended] == [143, 143], "\n".join(rank.output for rank in ended)
    assert checkpoints(place / "run")[-1] == "step-000003"
    assert together(1, lambda rank: command("train", place / "run", "--quiet")())[0].code == 0
    same_run(place / "run", place / "whole")


@pytest.mark.slow
def test_rank_0_measures_with_the_others_and_all_end_with_its_adapter(place: Path) -> None:
    """Losses, answers and samples of a base of which rank 0 has half."""
    train(fields(place, "alone"), display=QUIET)

    def work(rank: int) -> None:
        adapter = train(fields(place, "two"), display=QUIET)
        (place / f"two.{rank}.txt").write_text(adapter.fingerprint)

    ended = together(2, work)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.output for rank in ended)
    same_run(place / "two", place / "alone")
    prints = {(place / f"two.{rank}.txt").read_text() for rank in range(2)}
    assert prints == {Adapter.load(place / "two").fingerprint}
    one, two = (json.loads((place / name / "result.json").read_text()) for name in ("alone", "two"))
    assert one["answers"] == two["answers"] and not two["failed"]
    assert one["eval"]["after"]["loss"] == pytest.approx(two["eval"]["after"]["loss"], rel=1e-6)


class Three(World):
    """Three ranks, of which this is one and the others have as much memory."""

    def __init__(self) -> None:
        super().__init__(0, 3, 0, 3)

    def gathered(self, value: Any, what: str) -> list[Any]:
        return [value] * 3


def wanted(place: Path, wish: str, free: int, monkeypatch: pytest.MonkeyPatch, world: World) -> tuple[bool, list[str]]:
    config, source, lines = config_of(fields(place, "plan", shard=wish)), find_base(str(place / "base")), list[str]()
    monkeypatch.setattr(sharding, "free_memory", lambda device: free)
    return is_wanted(config, source, open_skeleton(source), CPU, world, lines.append), lines


def test_auto_shards_a_base_that_does_not_fit_and_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_base(str(place / "base"))
    size = base_bytes(config_of(fields(place, "plan")), source, open_skeleton(source))
    assert size == sum(p.nbytes for p in open_skeleton(source).parameters())
    for wish, free, answer in [
        ("auto", 6 * size, False),
        ("auto", 4 * size, True),
        ("never", 4 * size, False),
        ("always", 99 * size, True),
    ]:
        yes, lines = wanted(place, wish, free, monkeypatch, Three())
        assert yes is answer and len(lines) == answer, (wish, free)
    with pytest.raises(InputError):
        wanted(place, "auto", size // 2, monkeypatch, Three())
    assert wanted(place, "always", size, monkeypatch, World()) == (
        False,
        ["train.shard: always does nothing in one process"],
    )
    assert wanted(place, "auto", 1, monkeypatch, World()) == (False, [])


def five(place: Path, name: str) -> Path:
    """A run over five rows, four of them in the first step."""
    words(place / "five.jsonl", 5)
    made = fields(place, name, tokens_per_step=52, tokens_per_batch=26, steps=2, sample_every=None, eval_every=None)
    made["data"] = {"train": str(place / "five.jsonl")}
    made["evaluate"] = {"samples": 0, "general": None, "report": False}
    file = place / f"{name}.yaml"
    file.write_text(json.dumps(made))
    return file


def test_a_rank_without_a_batch_passes_one_for_nothing(place: Path) -> None:
    """The last step of the epoch has one row."""
    ended = together(2, lambda rank: command("train", five(place, "five"), "--quiet")(), timeout=10.0)
    assert [rank.code for rank in ended] == [0, 0], ended
    train(five(place, "five-alone"), display=QUIET)
    same_run(place / "five", place / "five-alone")
    counts = [line["tokens"] for line in Run(place / "five").read_metrics()]
    assert counts[1] - counts[0] < 0.7 * counts[0]


def test_a_loss_that_is_no_number_on_one_rank_ends_all(place: Path) -> None:
    def work(rank: int) -> None:
        original: Any = loop.step

        def stepping(forward: Any, learners: Any, *more: Any, **named: Any) -> Any:
            if rank == 1:
                with torch.no_grad():
                    learners[0].attached.parameters[0].fill_(float("nan"))
            return original(forward, learners, *more, **named)

        loop.step = stepping
        command("train", five(place, "nan"), "--quiet")()

    ended = together(2, work, timeout=10.0)
    assert [rank.code for rank in ended] == [1, 1] and "rank 1" in ended[0].output, ended
    assert len(ended[0].output.strip().splitlines()) <= 5 and not ended[1].output, ended
