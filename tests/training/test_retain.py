"""train.retain: a step's gradient is the task's and the KL's, which text it takes is a function of the step, and a run
with it is as exact, resumable and parallel as one without."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.limits import Limits
from deltaw.config import AdapterSpec, parse_config
from deltaw.config.retain import RetainConfig
from deltaw.data.examples import Examples
from deltaw.data.loader import LoaderState
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.training import frozen_layers
from deltaw.training import retain as module
from deltaw.training.captured import captured_on
from deltaw.training.checkpoint import TrainState
from deltaw.training.learner import Learner
from deltaw.training.plan import plan
from deltaw.training.retain import Retain, Schedule, Text, informed, retained_text
from deltaw.training.run import train
from deltaw.training.step import step
from deltaw.training.verify import verify_resume
from tests.architectures import tiny
from tests.data.toys import toy
from tests.tiny import Said, run_file, tiny_base, words
from tests.training.processes import together
from tests.training.test_distributed import same_run
from tests.training.test_step import CONFIG, LENGTHS, batch, documents

LORA = AdapterSpec(rank=3, alpha=6.0)
END = LoaderState(0, 1)
WEIGHT = 2.5


def text(seed: int = 9, lengths: tuple[int, ...] = (7, 3, 11, 5, 2, 9), quota: float = 14.0) -> Text:
    pieces = Examples.of(documents(lengths, seed))
    return Text(pieces, Schedule(pieces.lengths, quota, 3), WEIGHT)


def learner(forward: Forward, spec: AdapterSpec = LORA, **changes: Any) -> Learner:
    """On the model, begun where ΔW isn't zero."""
    config = CONFIG.model_copy(update=changes)
    made = Learner(attach(forward.model, spec), config, 100, TrainState(), lambda line: None)
    with torch.no_grad():
        for n, parameter in enumerate(made.attached.parameters):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
    return made


def batches() -> list[Batch]:
    return [batch(documents(lengths, seed)) for seed, lengths in enumerate(LENGTHS)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.floats(0.5, 200, allow_nan=False),
    st.integers(0, 2**63 - 1),
)
def test_steps_take_every_piece_in_turn_and_their_share_on_average(lengths: list[int], quota: float, seed: int) -> None:
    schedule = Schedule(lengths, quota, seed)
    places = [place for number in range(30) for place in schedule.of_step(number)]
    assert places == [n % len(lengths) for n in range(len(places))]
    assert sorted(schedule.order) == list(range(len(lengths)))
    sizes = np.asarray(lengths)[schedule.order]
    for steps in (1, 7, 30):
        taken = sum(int(sizes[place]) for number in range(steps) for place in schedule.of_step(number))
        assert schedule.tokens(steps) == taken and 0 <= taken - steps * quota + 1e-6 <= max(lengths) + 1e-6


def expected(forward: Forward, one: Learner, given_batches: list[Batch], pieces: Text) -> tuple[list[Tensor], float]:
    """Gradients and KL by autograd, from whole logits: the formula of retain.py as it is written."""
    supervised = sum(each.supervised for each in given_batches)
    rows = pieces.at(pieces.schedule.of_step(0))
    total = torch.zeros(())
    for each in given_batches:
        total = total + forward.loss(each)[0] / supervised
    kl, count = torch.zeros(()), sum(len(row.tokens) for row in rows)
    for row in rows:
        alone = batch([row])
        tuned = forward.logits(alone).log_softmax(1)
        with one.attached.disabled(), torch.no_grad():
            base = forward.logits(alone).log_softmax(1)
        kl = kl + (base.exp() * (base - tuned)).sum()
    (total + WEIGHT * kl / count).backward()
    gradients = [parameter.grad.clone() for parameter in one.attached.parameters if parameter.grad is not None]
    one.optimizer.zero_grad()
    return gradients, float(kl.detach()) / count


@pytest.mark.parametrize(
    ("name", "spec", "dtype"),
    [
        ("llama", LORA, "float32"),
        ("llama", LORA, "float16"),  # the sum goes backward, and is divided
        ("llama", LORA.model_copy(update={"magnitude": True}), "float32"),
        ("llama", AdapterSpec(full=True), "float32"),
        ("gemma2", LORA, "float32"),  # a soft cap
        ("bloom", LORA, "float32"),  # padded batches
        ("gpt_oss", LORA, "float32"),
    ],
)
def test_a_step_has_the_gradient_of_the_task_and_of_the_divergence(name: str, spec: AdapterSpec, dtype: str) -> None:
    forward = plan_forward(tiny(name, torch.float32))
    one = learner(forward, spec, dtype=dtype)
    wanted, kl = expected(forward, one, batches(), text())
    taken: list[Tensor] = []
    before = one.update

    def update(loss: float, *more: Any) -> float:
        taken.extend(parameter.grad.clone() for parameter in one.attached.parameters if parameter.grad is not None)
        return before(loss, *more)

    one.update = update  # type: ignore[method-assign]
    plain = sum(float(forward.loss(each)[0].detach()) for each in batches()) / sum(
        each.supervised for each in batches()
    )
    keeping = Retain(text(), forward, one.attached, 64)
    ((step_batches, _),) = list(keeping.beside([(batches(), END)], 0))
    assert any(each.retained for each in step_batches[:2]) if forward.packed else step_batches[2].retained
    (record,) = step(forward, [one], step_batches, END, retains={0: keeping})
    assert len(taken) == len(wanted) > 0
    for got, its in zip(taken, wanted, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-3, atol=5e-5 * float(its.abs().max()))
    assert record["retain_kl"] == pytest.approx(kl, rel=1e-4) and kl > 0
    assert record["loss"] == pytest.approx(plain, rel=1e-5), "the task's alone"
    assert record["tokens"] == sum(map(sum, LENGTHS)) and record["supervised_tokens"] == sum(
        each.supervised for each in batches()
    )


def test_the_base_is_asked_once_where_its_answer_is_kept_and_in_the_same_passes_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it is kept, and at which step a run begins, changes no bit."""
    forward = plan_forward(tiny("llama", torch.float32))
    one = learner(forward)
    monkeypatch.setattr(module, "CHAPTER", 12)

    def bases(begin: int) -> tuple[list[Tensor], int]:
        asked: list[int] = []

        class Counted(Retain):
            def ask(self, number: int) -> list[Tensor]:
                asked.append(number)
                return super().ask(number)

        keeping, rows = Counted(text(), forward, one.attached, 64), []
        for number in range(begin, 6):
            bases = [
                informed(each, {0: keeping}) for each in keeping._joined(batches(), text().schedule.of_step(number))
            ]
            rows.append(torch.cat([each.retained.base_RX for each in bases if each.retained]))  # type: ignore[misc]
        return rows, len(asked)

    kept, once = bases(0)
    monkeypatch.setattr(module, "KEPT", 0)
    again, often = bases(0)
    later, _ = bases(3)
    assert once < often
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[3:], later, strict=True))
    assert not any(rows.requires_grad for rows in kept)


def test_a_divergence_that_is_no_number_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = plan_forward(tiny("llama", torch.float32))
    one = learner(forward, skip_nonfinite=1)
    before = [parameter.detach().clone() for parameter in one.attached.parameters]
    keeping = Retain(text(), forward, one.attached, 64)
    ((step_batches, _),) = list(keeping.beside([(batches(), END)], 0))
    with_base = [informed(each, {0: keeping}) for each in step_batches]
    broken = [not_a_number(each) for each in with_base]
    (record,) = step(forward, [one], broken, END, retains={0: keeping})
    assert "KL" in record["skipped"] and "loss" not in record
    assert all(torch.equal(a, b) for a, b in zip(before, one.attached.parameters, strict=True))


def not_a_number(given_batch: Batch) -> Batch:
    retained = given_batch.retained
    if retained is None or retained.base_RX is None:
        return given_batch
    return replace(given_batch, retained=replace(retained, base_RX=retained.base_RX * math.nan))


def test_several_learners_are_each_held_by_their_own_text() -> None:
    """In one pass, of other text and another weight, as each would be alone."""
    forward, other = (plan_forward(tiny("llama", torch.float32)) for _ in range(2))
    learners, same = ([learner(way), learner(way)] for way in (forward, other))
    texts = [text(), replace(text(4, (5, 12, 3)), weight=0.5)]
    keeping = {
        n: Retain(own, forward, one.attached, 64) for n, (own, one) in enumerate(zip(texts, learners, strict=True))
    }
    own = [[each.owned(n) for each in keeping[n]._joined(batches(), [0, 1])] for n in keeping]
    joined = [Batch.joined(pair) for pair in zip(*own, strict=True)]
    records = step(forward, learners, joined, END, retains=keeping)
    for number, one in enumerate(same):
        held = {number: Retain(texts[number], other, one.attached, 64)}
        (alone,) = step(other, [one], own[number], END, retains=held)
        for name in ("loss", "retain_kl", "tokens", "grad_norm"):
            assert records[number][name] == pytest.approx(alone[name], rel=1e-4), name
        for name, tensor in one.saved().factors.items():
            torch.testing.assert_close(learners[number].saved().factors[name], tensor, rtol=1e-3, atol=1e-6)
    assert records[0]["retain_kl"] != pytest.approx(records[1]["retain_kl"], rel=1e-2)


def test_a_step_that_is_to_retain_text_is_given_some() -> None:
    forward = plan_forward(tiny("llama", torch.float32))
    one = learner(forward, retain=RetainConfig())
    with pytest.raises(ValueError, match="retain"):
        step(forward, [one], batches(), END)
    assert one.state.step == 0


def test_a_run_with_it_is_not_recorded_and_says_why() -> None:
    forward, lines = plan_forward(tiny("llama", torch.float32)), list[str]()
    one = learner(forward, retain=RetainConfig())
    assert captured_on(torch.device("cuda"), forward, one, 9, lines.append, list) is None
    assert len(lines) == 1 and "train.retain" in lines[0]
    detach(one.attached)


def base_file(**train_: Any) -> dict[str, Any]:
    return {"base": "b", "data": {"train": "t"}, "output": "o", "train": train_}


def test_a_name_is_short_for_a_section_and_what_cannot_be_is_refused() -> None:
    short, long = (
        parse_config(base_file(retain=given_as)).train.retain for given_as in ("a.txt", {"data": "a.txt", "share": 0.1})
    )
    assert short == long and short is not None and short.weight == 1.0
    assert parse_config(base_file()).train.retain is None
    for wrong in ({"weight": 0}, {"share": 1.5}, {"share": 0}, {"weights": 1}, {"data": ""}, 3):
        with pytest.raises(InputError, match=r"retain"):
            parse_config(base_file(retain=wrong))
    with pytest.raises(InputError, match="weight, share"):
        parse_config(base_file(retain={"kl": 1}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, other rows, and the run `one` that holds itself to the base."""
    folder = tmp_path_factory.mktemp("retaining")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    rows = [{"text": f"Passage {n} of general text, {'and so on ' * (n % 4)}to its end."} for n in range(12)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(fields(folder, "one"), display=QUIET)
    return folder


def fields(place: Path, name: str, retain: Any = "", **train_: Any) -> dict[str, Any]:
    made = run_file(place, output=str(place / name))
    made["evaluate"] = {"samples": 0, "general": None, "report": False}
    asked = {"data": str(place / "general.jsonl"), "share": 0.3, "weight": 2.0} if retain == "" else retain
    made["train"] |= {"steps": 4, "retain": asked, **train_}
    return made


def kls(run: Path) -> list[float]:
    return [line["retain_kl"] for line in Run(run).read_metrics() if "retain_kl" in line]


def test_a_run_says_what_it_took_and_kept(place: Path) -> None:
    result = json.loads((place / "one/result.json").read_text())
    assert len(kls(place / "one")) == 4 and kls(place / "one")[-1] > 0
    assert result["retain"]["kl"] == pytest.approx(np.mean(kls(place / "one")))
    assert 0.2 < result["retain"]["tokens"] / result["tokens"] < 0.6 and 0.1 < result["retain"]["time_share"] < 0.5
    said = Said()
    found = plan(parse_config(fields(place, "planned")), said)
    assert found.retained is not None and found.retained.tokens == result["retain"]["tokens"]
    assert found.tokens == result["tokens"] and 0 < found.retained.seconds < found.retained.training
    assert "retain" in found.text() and json.loads(json.dumps(found.to_json()))["retained"]["tokens"]


def test_it_resumes_to_the_bit(place: Path) -> None:
    assert verify_resume(parse_config(fields(place, "verified")), 4, QUIET).exact


@pytest.mark.parametrize("way", ["blocks", "tokens_per_batch", "frozen"])
def test_how_a_step_is_computed_changes_no_number(place: Path, way: str) -> None:
    """Layers that run again; batches of another size; frozen layers below, of which the outputs are kept."""
    changes: dict[str, dict[str, Any]] = {
        "blocks": {"checkpointing": "blocks"},
        "tokens_per_batch": {"tokens_per_batch": 128},
        "frozen": {"steps": 12, "eval_every": None},
    }
    made, one = fields(place, way, **changes[way]), place / "one"
    if way == "frozen":
        made["adapter"] = {"rank": 4, "alpha": 8, "targets": ["layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]}
        made["data"] = {"train": str(place / "train.jsonl"), "limit": 20}
        one, said = place / "from-below", Said()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frozen_layers, "FROZEN_SHARE", 0.0)
            train({**made, "output": str(one)}, display=said)
        assert not any("computed once" in line for line in said.lines)
    train(made, display=(said := Said()))
    assert any("computed once" in line for line in said.lines) == (way == "frozen")
    same_run(place / way, one)
    assert kls(place / way) == pytest.approx(kls(one), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("shard", ["never", "always"])
def test_two_processes_train_what_one_trains(place: Path, shard: str) -> None:
    name = f"by-two-{shard}"
    ended = together(2, lambda rank: train(fields(place, name, shard=shard), display=QUIET))
    assert [rank.code for rank in ended] == [0, 0], ended
    same_run(place / name, place / "one")
    assert kls(place / name) == pytest.approx(kls(place / "one"), rel=1e-3, abs=1e-6)


def test_what_forgetting_is_measured_on_is_not_trained_on(place: Path) -> None:
    made = fields(place, "both")
    made["evaluate"]["general"] = str(place / "general.jsonl")
    with pytest.raises(InputError, match=r"train\.retain\.data"):
        train(made, display=QUIET)
    assert not (place / "both/metrics.jsonl").exists(), "refused before a step is taken"
    made["evaluate"]["general"] = "builtin:general"
    made["train"]["retain"] = "builtin:general-train"
    train(made | {"train": made["train"] | {"steps": 1}}, display=QUIET)


def test_what_is_to_be_learnt_is_not_held_fast(place: Path) -> None:
    with pytest.raises(InputError, match="what is trained on"):
        train(fields(place, "own", retain=str(place / "train.jsonl")), display=QUIET)


def test_text_that_is_not_there_is_named(place: Path) -> None:
    with pytest.raises(InputError, match=r"train\.retain\.data: .*nowhere\.txt"):
        train(fields(place, "nowhere", retain=str(place / "nowhere.txt")), display=QUIET)


LONG = "and so on " * 40
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"{n} {LONG}"} for n in range(3)],
    "chat": [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": LONG}]}
             for n in range(3)],
    "long prompt": [{"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": f"{n}"}]}
                    for n in range(3)],
    "completion": [{"prompt": f"{n} ", "completion": LONG} for n in range(3)],
    "alpaca": [{"instruction": f"{n}", "output": "Yes."} for n in range(3)],
}  # fmt: skip


@pytest.mark.parametrize("form", ROWS)
def test_the_text_may_be_in_any_form_of_data(place: Path, form: str) -> None:
    """Rows of answers aren't torn apart, and none is lost that is longer than a step takes."""
    file = place / f"{form}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[form]))
    made = parse_config(fields(place, form, retain={"data": str(file), "share": 0.3}))
    pieces = retained_text(made, Renderer(toy("chatml")), Limits(context=256), QUIET)
    rows = {piece.origin.partition(" (")[0].rpartition(":")[2] for piece in pieces}
    assert rows == {"1", "2", "3"} and max(pieces.lengths) <= 256
    assert (len(pieces) > 3) == (form == "text")


def test_text_that_is_too_short_is_warned_of(place: Path) -> None:
    (place / "short.txt").write_text("Hi.")
    for data in ("short.txt", "general.jsonl"):
        said = Said()
        plan(parse_config(fields(place, "short", retain={"data": str(place / data), "share": 0.05})), said)
        assert any("learnt by heart" in line for line in said.lines) == (data == "short.txt")


def test_it_forgets_less(place: Path) -> None:
    """On text that it has seen on neither side."""
    lost = {}
    for name, retain in (
        ("free", None),
        ("bound", {"data": str(place / "general.jsonl"), "share": 1.0, "weight": 50.0}),
    ):
        made = fields(place, name, retain=retain, steps=20)
        made["evaluate"]["general"] = "builtin:general"
        train(made, display=QUIET)
        lost[name] = json.loads((place / name / "result.json").read_text())["forgetting"]["kl"]
    assert lost["bound"] < 0.8 * lost["free"]
    assert Adapter.load(place / "bound").fingerprint != Adapter.load(place / "free").fingerprint
