"""Layers that run again in the backward give the same bits, keep no more than their input, and are chosen when they
have to be."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.adapter.attach import attach, detach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.objective import sft
from deltaw.base.recompute import Recompute, blocks_of
from deltaw.config import AdapterSpec, parse_config
from deltaw.data.loader import LoaderState
from deltaw.errors import InputError
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.training import recomputing
from deltaw.training.captured import captured_on
from deltaw.training.changes import check_changes
from deltaw.training.fit import Point
from deltaw.training.opening import Opened, open_run
from deltaw.training.plan import plan
from deltaw.training.preflight import work_of
from deltaw.training.recomputing import Choice, choose, same_gradient
from deltaw.training.run import train
from deltaw.training.shortage import explain
from deltaw.training.step import step
from tests.architectures import PACKED, PADDED, tiny
from tests.faults.common import child
from tests.tape import Recorder
from tests.tiny import Said, run_file, tiny_base
from tests.training import test_captured as captured
from tests.training.test_step import batch, documents, learner, shared

SPEC = AdapterSpec(rank=2, alpha=6.0)
MIB = 1 << 20


def drawn(model: Any, spec: AdapterSpec) -> Any:
    attached = attach(model, spec)
    with torch.no_grad():
        for number, parameter in enumerate(attached.parameters):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    for layer in attached.layers.values():
        layer.train()
    return attached


def gradients(forward: Forward, attached: Any, given: Batch) -> list[Tensor | None]:
    """The loss and its gradients, from one state of the generator; nothing stays."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss, _ = forward.loss(given)
        loss.backward()
    grads = [parameter.grad for parameter in attached.parameters]
    for parameter in attached.parameters:
        parameter.grad = None
    return [loss.detach(), *grads]


def same(some: list[Tensor | None], others: list[Tensor | None]) -> bool:
    pairs = list(zip(some, others, strict=True))
    assert any(a is not None and a.any() for a, _ in pairs[1:])
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_every_architecture_has_the_same_gradient_to_the_bit(name: str, offload: bool) -> None:
    model = tiny(name)
    forward = plan_forward(model)
    attached = drawn(model, SPEC.model_copy(update={"dropout": 0.3 * offload}))
    given, modules = batch(documents((9, 1, 14, 6), 0)), dict(model.named_modules())
    plain = gradients(forward, attached, given)
    blocks = blocks_of(model, attached.paths)
    assert len(blocks) == 2
    again = Recompute(model, blocks, draws=offload, offload=offload)
    assert same(plain, gradients(forward, attached, given))
    assert dict(model.named_modules()).keys() == modules.keys()
    for layer in attached.layers.values():
        layer.eval()
    with torch.no_grad():
        told = forward.loss(given)[0]
    again.remove()
    assert torch.equal(told, forward.loss(given)[0].detach())
    assert all(module is modules[path] for path, module in model.named_modules())


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.4},
        {"magnitude": True},
        {"magnitude": True, "dropout": 0.4},
        {"init": "pissa", "scaling": "rslora"},
        {"full": True},
        {"targets": ("layers.1",)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_kind_of_update_has_the_same_gradient_to_the_bit(changes: dict[str, Any]) -> None:
    model = tiny("llama", torch.bfloat16)
    forward, attached = plan_forward(model), drawn(model, SPEC.model_copy(update=changes))
    given = batch(documents((9, 1, 14, 6), 0))
    plain = gradients(forward, attached, given)
    Recompute(model, blocks_of(model, attached.paths), draws=bool(attached.spec.dropout))
    assert same(plain, gradients(forward, attached, given))
    detach(attached)
    assert type(model.get_submodule("model.layers.1.self_attn.q_proj")) is torch.nn.Linear


@pytest.mark.parametrize("way", ["packed", "apart"])
def test_learners_of_one_batch_take_the_same_step_to_the_bit(way: str) -> None:
    """Each row's update is in the Pass, which is over when the backward comes."""
    taken = []
    for recompute in (False, True):
        forward = plan_forward(tiny("llama" if way == "packed" else "bloom"))
        learners = [learner(forward.model, number, dropout=0.2) for number in (0, 1)]
        if recompute:
            Recompute(forward.model, blocks_of(forward.model, learners[0].attached.paths), draws=True)
        records = step(forward, learners, shared(), LoaderState(0, 2))
        for record in records:
            del record["seconds"]
        taken.append((records, [one.gradient for one in learners]))
    (records, mine), (theirs, its) = taken
    assert records == theirs
    assert all(torch.equal(a, b) for one, other in zip(mine, its, strict=True) for a, b in zip(one, other, strict=True))


def test_a_layer_keeps_its_input_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left for the backward, by size, where the model's own layers keep much more."""
    model = tiny("llama")
    forward, attached = plan_forward(model), drawn(model, SPEC)
    given, moved = batch(documents((40, 24), 0)), list[int]()

    def kept() -> int:
        seen: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forward.loss(given)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(x.untyped_storage().nbytes() for at, x in seen.items() if at not in own)

    plain = kept()
    again = Recompute(model, blocks_of(model, attached.paths), draws=False)
    inputs = 2 * len(given.tokens_T) * 32 * 4
    assert kept() < plain / 2
    again.remove()

    class Moving(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory, "this model is on a CPU"
            super().__init__(lambda x: moved.append(x.nbytes) or x, lambda x: x)  # type: ignore[func-returns-value]

    monkeypatch.setattr("deltaw.base.recompute.save_on_cpu", Moving)
    Recompute(model, blocks_of(model, attached.paths), draws=False, offload=True)
    forward.loss(given)[0].backward()
    assert sum(moved) == inputs, "the input of each layer, and no more, goes to the machine's memory"


def test_a_recorded_pass_recomputes_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed by tests/tape.py: everything that the second run of a layer does is part of the recording."""
    made = captured.learner

    def recomputed_learner(forward: Forward, *args: Any, **options: Any) -> Any:
        one = made(forward, *args, **options)
        Recompute(forward.model, blocks_of(forward.model, one.attached.paths), draws=False)
        return one

    plain = captured.plainly()
    monkeypatch.setattr(captured, "learner", recomputed_learner)
    recorder = Recorder()
    records, factors = captured.run(recorder)
    assert recorder.replayed > recorder.recorded >= 3 and records == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(factors, plain[1], strict=True))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose activations outweigh its process, and long rows."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_base(folder / "base", hidden_size=192, intermediate_size=768, num_hidden_layers=3, max_position_embeddings=512)
    rows = [json.dumps({"prompt": f"say {n} ", "completion": "ab" * (40 + n % 60)}) for n in range(200)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return folder


SMALL = {"steps": 2, "tokens_per_step": 256, "tokens_per_batch": 256}


@pytest.fixture(scope="module")
def opened(wide: Path) -> Opened:
    """Of a run whose largest batch has 4,096 tokens. Read only."""
    return open_run(config(wide), QUIET)


def config(folder: Path, output: str = "run", **options: Any) -> Any:
    fields = run_file(folder, data={"train": str(folder / "train.jsonl")}, output=str(folder / output))
    large = {"steps": 3, "tokens_per_step": 4096, "tokens_per_batch": 4096, "save_every": 100, "eval_every": None}
    fields["evaluate"] = {"general": None, "report": False, "samples": 0}
    return parse_config({**fields, "train": {**fields["train"], **large, **options}})


def by_hand(
    forward: Forward, learner: Any, examples: Any, sizes: Sequence[int], *, accumulating: bool
) -> Iterator[Point]:
    """What `measure` would say of a base of 500 MiB, a token of which takes 100 KiB, or 20 where layers run again."""
    token = (20 if forward.recompute is not None else 100) << 10
    for size in sorted(sizes):
        yield Point(size, size, 500 * MIB + token * size, 1.4 if forward.recompute is not None else 1.0)


def test_layers_are_recomputed_where_memory_is_short_and_only_there(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, said = opened.learner(QUIET), Said()
    work = work_of(opened, learner)
    monkeypatch.setattr(recomputing, "measure", by_hand)
    monkeypatch.setattr(recomputing, "held_memory", lambda device: 500 * MIB)
    takes = 100 * work.longest_tokens / 1024  # MiB, about 400; a tenth of all and the kernels come on top
    for free, way in ((3 * takes, "none"), (takes + 120, "none"), (takes - 20, "blocks"), (10, "blocks")):
        monkeypatch.setattr(recomputing, "free_memory", lambda device, free=free: int(free * MIB))
        now, choice = choose(opened, learner, work, said)
        assert now.checkpointing == choice.way == way and bool(said.lines) == (way != "none")
        assert choice.way == "none" or (choice.peak and choice.instead_of and choice.line() == said.lines[-1])
        assert choice.way == "none" or choice.slower == pytest.approx(0.4)
        if choice.peak and choice.instead_of:
            assert choice.instead_of - choice.peak == pytest.approx(0.8 * takes * MIB, rel=0.05)
        if now.model.forward.recompute is not None:
            assert "3 layers recomputed" in now.model.describe()
            now.model.forward.recompute.remove()


def test_a_run_ends_with_the_same_bits_and_a_resumed_one_may_change_how(wide: Path) -> None:
    ways = ("none", "blocks")
    for way in ways:
        train(config(wide, way, checkpointing=way, **SMALL), display=QUIET)
    kept, again = (json.loads((wide / way / "result.json").read_text()) for way in ways)
    assert (kept["checkpointing"], again["checkpointing"]) == ways and "3 layers recomputed" in again["forward"]
    adapters = [(wide / way / "adapter/adapter_model.safetensors").read_bytes() for way in ways]
    assert adapters[0] == adapters[1]
    before, after = (config(wide, checkpointing=way) for way in ways)
    with pytest.raises(InputError):
        check_changes(before, after, allow=False, run="run")
    assert check_changes(before, after, allow=True, run="run")


@pytest.mark.slow
def test_the_peak_with_recomputed_layers_is_the_runs_within_a_tenth(wide: Path) -> None:
    settings = config(wide, "peak", checkpointing="blocks", steps=2)

    def planned() -> None:
        found = plan(settings, QUIET)
        print(json.dumps([found.to_json(), found.text()]))

    foretold, ran = child(planned), child(lambda: train(settings, display=QUIET))
    assert ran.code == foretold.code == 0, ran.output + foretold.output
    said, text = json.loads(foretold.output)
    real = json.loads((wide / "peak/result.json").read_text())["peak_memory_bytes"]
    assert said["peak_memory_bytes"] == pytest.approx(real, rel=0.1)
    assert said["checkpointing"] == "blocks" and "recomputed by block" in text


def test_too_little_memory_names_recomputation_which_a_run_resumes_with(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaw.training.shortage.measure", by_hand)
    monkeypatch.setattr("deltaw.training.shortage.held_memory", lambda device: 500 * MIB)
    monkeypatch.setattr("deltaw.training.shortage.free_memory", lambda device: 200 * MIB)
    said = str(explain(MemoryError(), opened, opened.learner(QUIET), Run(tmp_path / "run"), fix="-")).splitlines()
    assert any("train.checkpointing=blocks" in line for line in said[1:4])


def test_a_base_that_can_not_run_again_is_refused_or_left_alone(
    wide: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, said, runs = opened.learner(QUIET), Said(), list[int]()
    work = work_of(opened, learner)
    assert same_gradient(opened, learner, "blocks")

    def drifting(module: Any, args: Any, out: Tensor) -> Tensor:
        runs.append(0)
        return out * len(runs)

    hook = opened.model.base.model.get_submodule("model.layers.1").register_forward_hook(drifting)
    try:
        assert not same_gradient(opened, learner, "blocks")
        asked = replace(opened, config=config(wide, checkpointing="blocks"))
        with pytest.raises(InputError):
            choose(asked, learner, work, QUIET)
        monkeypatch.setattr(recomputing, "_chosen", lambda *args: Choice("blocks", 1, 2, 0.1))
        assert choose(opened, learner, work, said) == (opened, Choice()) and said.lines[0].startswith("warning")
    finally:
        hook.remove()


@pytest.mark.parametrize("way", ["offload", "sometimes", True])
def test_what_can_not_be_is_refused_before_weights_are_loaded(
    wide: Path, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    monkeypatch.setattr("deltaw.training.opening.open_base", None)
    with pytest.raises(InputError) as caught:
        open_run(config(wide, checkpointing=way), QUIET)
    assert "train.checkpointing" in str(caught.value) and "blocks" in str(caught.value)


def test_offloaded_inputs_are_not_captured_and_it_is_said() -> None:
    class Elsewhere:
        type = "cuda"

    forward = plan_forward(tiny("llama"))
    attached = attach(forward.model, SPEC)
    plain = SimpleNamespace(objective=sft, config=SimpleNamespace(retain=None), attached=attached)
    blocks = blocks_of(forward.model, attached.paths)
    for draws, offload in ((False, True), (True, False)):
        said: list[str] = []
        again = Recompute(forward.model, blocks, draws=draws, offload=offload)
        one = replace(forward, recompute=again)
        assert captured_on(Elsewhere(), one, plain, 1, said.append, list) is None and len(said) == 1  # type: ignore[arg-type]
        again.remove()
