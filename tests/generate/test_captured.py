"""Captured steps of decoding are the steps themselves: recorded and replayed on a CPU (tests/tape.py)."""

import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from deltaw.adapter.attach import attach
from deltaw.adapter.layer import AdaptedLinear, LoRAUpdate
from deltaw.adapter.ready import Ready
from deltaw.config import AdapterSpec
from deltaw.generate import captured, engine, shelf, slots
from deltaw.generate.cache import BASE, Row, evaluating
from deltaw.generate.captured import Captured
from deltaw.generate.engine import Engine
from deltaw.generate.sampling import Sampling
from deltaw.generate.slots import Slots
from tests.generate.test_prefixes import moved
from tests.generate.test_slots import LONG, adapted
from tests.generate.test_together import NEW, PROMPTS, STOP
from tests.tape import Recorder, recording


class Straight(Recorder):
    """A recording that is the work itself; where updates have changed, a replay's result is of no use."""

    ready: Ready

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        place = work().clone()
        return lambda: place.copy_(work()) if self.ready.current else None, place


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    """Sizes that a test meets all of."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(slots, "DOUBLING_FROM", 8)
        patched.setattr(captured, "OFTEN", 2)
        patched.setattr(captured, "say", lambda line: pytest.fail(line))
        yield


class Side:
    """Slots of one kind, and rows in them."""

    def __init__(self, model: nn.Module, record: Any = None) -> None:
        self.slots, self.rows = Slots(model, piece=64, record=record), dict[int, Row]()
        if isinstance(record, Recorder):
            record.changed = lambda: [t for shelf in self.slots.shelves.values() for t in shelf.stored.values()]
        if isinstance(record, Straight):
            assert self.slots.ready is not None
            record.ready = self.slots.ready
        if self.slots.captured:
            self.slots.captured._say = lambda line: pytest.fail(line)

    @property
    def captured(self) -> Captured:
        assert self.slots.captured is not None
        return self.slots.captured

    def join(self, id: int, prompt: list[int], update: int | None) -> None:
        self.rows[id] = row = Row(id, tuple(prompt), Sampling(), set(), id, 64, update, key=b"%d" % (update or 0))
        self.slots.join([row])

    def fill(self) -> dict[int, Tensor]:
        return {
            row.id: logits for rows, logits_RV in self.slots.fill() for row, logits in zip(rows, logits_RV, strict=True)
        }

    def step(self) -> dict[int, Tensor]:
        """Logits by row, of all that are whole."""
        found = {}
        with recording():
            for rows, logits_RV in self.slots.steps():
                found |= {row.id: logits.clone() for row, logits in zip(rows, logits_RV, strict=True)}
        return found

    def leave(self, id: int) -> None:
        self.slots.leave(self.rows.pop(id))

    def go_on(self, steps: int) -> None:
        """Greedily."""
        for _ in range(steps):
            for run in (self.step, self.fill):
                for id, logits_V in run().items():
                    self.rows[id].new.append(int(logits_V.argmax()))


def another(model: nn.Module, rank: int) -> int:
    """The number of one more update that matters."""
    with torch.inference_mode(False):
        attached = attach(model, AdapterSpec(rank=rank, targets="all-linear"))
        for number, layer in enumerate(attached.layers.values()):
            assert isinstance(layer, LoRAUpdate)
            nn.init.normal_(layer.lora_b, std=0.2, generator=torch.Generator().manual_seed(number))
        model.double()
    return attached.number


def first_layer(model: nn.Module, number: int) -> LoRAUpdate:
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    update = layer.update(number)
    assert isinstance(update, LoRAUpdate)
    return update


@settings(max_examples=5, deadline=None, phases=[Phase.generate])
@given(st.sampled_from(["llama", "mistral", "gemma2", "qwen3"]), st.sampled_from([30, 10_000]), st.integers(0, 2**32))
def test_whatever_happens_each_row_gets_the_same_logits(name: str, small: int, seed: int) -> None:
    """Replayed as not captured, and to the bit as by the work that was recorded. On shelves of which some are large."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shelf, "SMALL", small)
        live(name, random.Random(seed))


def live(name: str, draw: random.Random) -> None:
    model = adapted(name, max_position_embeddings=256)
    updates, recorder = [0, another(model, 1), another(model, 5)], Recorder()
    with evaluating(model):
        replayed, plain, worked = Side(model, recorder), Side(model), Side(model, Straight())
        for number in range(12):
            what = draw.choices(["join", "leave", "trained", "scaled", "nothing"], [8, 2, 1, 1, 4])[0]
            update = draw.choice(updates)
            if what == "trained":
                first_layer(model, update).lora_b.mul_(1.5)
            elif what == "scaled":
                first_layer(model, update).scale *= 0.5
            leaving = draw.sample(sorted(plain.rows), 1) if what == "leave" and plain.rows else []
            prompt, taken = [draw.randint(3, 96) for _ in range(draw.randint(1, 20))], draw.choice([update, BASE])
            for side in (replayed, plain, worked):
                for id in leaving:
                    side.leave(id)
                if what == "join" or not side.rows:
                    side.join(number, prompt, taken)
            for _ in range(draw.randint(1, 6)):
                for run in (Side.step, Side.fill):
                    mine, own, work = (run(side) for side in (replayed, plain, worked))
                    assert mine.keys() == own.keys() == work.keys()
                    for id, logits_V in own.items():
                        torch.testing.assert_close(mine[id], logits_V, rtol=1e-8, atol=1e-8)
                        assert torch.equal(mine[id], work[id])
                        for side in (replayed, plain, worked):
                            side.rows[id].new.append(int(logits_V.argmax()))
    assert recorder.replayed >= recorder.recorded
    for size in replayed.captured.graphs:
        counts = [*(size.updates if size.spread else ()), *(count for one, _, count in size.shelves if one.small)]
        assert all(count & (count - 1) == 0 for count in counts), "powers of two"


def test_an_engine_gives_what_it_gives_without() -> None:
    """Rows that come and end at any time, sampled, told of, of two updates and of none."""
    model = adapted(max_position_embeddings=128)
    updates, recorder = [0, moved(model, 7).number, BASE], Recorder()

    def answered(record: Any) -> dict[int, list[Any]]:
        one = Engine(model, batch_size=4, piece=50, record=record)
        got: dict[int, list[Any]] = {}
        sampling = [Sampling(max_new_tokens=NEW), Sampling(max_new_tokens=2 * NEW, temperature=1.2, top_k=20, seed=3)]
        for step in range(90):
            if step % 3 == 0 and len(got) < 12:
                n = len(got)
                asked = {"update": updates[n % 3], "key": b"%d" % (n % 3), "logprobs": 1, "number": n}
                got[one.add(LONG[n % len(LONG)], sampling[n % 2], STOP if n > 6 else set(), **asked)] = []
            with recording():
                for event in one.step():
                    got[event.id].append(event.token)
        assert not one.busy
        one.close()
        return got

    assert answered(recorder) == answered(None)
    assert recorder.replayed > 2 * recorder.recorded > 4


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were used last."""
    monkeypatch.setattr(captured, "GRAPHS", 3)
    monkeypatch.setattr(slots, "DOUBLING_FROM", 64)
    model, recorder = adapted(), Recorder()
    with evaluating(model):
        side, sizes = Side(model, recorder), list[list[int]]()
        for update in (0, BASE):
            for number in range(4):
                side.join(number, [5 + number] * 2, update)
            for number in range(4):
                side.go_on(3)
                sizes.append([size.rows for size in side.captured.graphs])
                side.leave(number)
    assert sizes == [[4], [4], [4, 2], [4, 2, 1], [2, 1, 4], [2, 1, 4], [1, 4, 2], [4, 2, 1]]
    assert {size.updates for size in side.captured.graphs} == {(0, 0)}


def test_updates_in_wider_stacks_are_read_there() -> None:
    """A row of a higher rank comes and goes; what the others read has moved, and then changes."""
    model = adapted()
    wide = another(model, 5)
    with evaluating(model):
        side, plain = Side(model, Recorder()), Side(model)
        for one in (side, plain):
            one.join(0, [5, 6], 0)
            one.join(2, [5, 6], 0)
            one.go_on(1)
            one.leave(2)  # a slot stays, or the shelf would grow
            one.go_on(3)
        (graph,) = side.captured.graphs.values()
        for one in (side, plain):
            one.join(1, [7, 8], wide)
            one.go_on(1)
            one.leave(1)
        first_layer(model, 0).lora_b.neg_()
        for one in (side, plain):
            one.go_on(5)
        assert graph not in side.captured.graphs.values()
        assert side.rows[0].new == plain.rows[0].new


def test_what_has_moved_goes() -> None:
    model, recorder = adapted(max_position_embeddings=256), Recorder()

    with evaluating(model):
        side = Side(model, recorder)
        for number in range(8):
            side.join(number, [5 + number] * 4, 0)
            side.go_on(4)
        graphs = side.captured.graphs
        assert graphs and all(one.moves == moves for size in graphs for one, moves, _ in size.shelves)
        for number in range(8):
            side.leave(number)
        side.join(9, [7] * 3, 0)
        side.go_on(3)
        kept, before = [*graphs], recorder.recorded
        side.leave(9)
        assert any(not one.rows for one in side.slots.shelves.values()), "an empty shelf that is small stays"
        side.join(10, [8] * 2, 0)
        side.go_on(4)
        assert recorder.recorded == before and [*graphs] == kept, "nothing was recorded again"
        side.leave(10)
        side.join(11, [8] * 2, another(model, 5))
        side.go_on(5)
        assert graphs and not any(size in kept for size in graphs), "the layers' stand-ins are new, and so is all else"
        side.slots.clear()
        assert not graphs


def test_empty_shelves_that_are_large_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "SMALL", 16)
    model = adapted()
    with evaluating(model):
        side = Side(model, Recorder())
        side.join(0, [5] * 20, 0)
        side.go_on(4)
        assert side.captured.graphs
        (large,) = map(weakref.ref, side.slots.shelves.values())
        side.leave(0)
        assert not side.slots.shelves and large() is None, "nothing holds its memory"
        side.join(1, [5] * 3, 0)
        side.go_on(2)
        assert all(one.capacity == 8 for size in side.captured.graphs for one, *_ in size.shelves)


def test_one_updates_broken_factors_are_no_others_rows_affair() -> None:
    model = adapted()
    broken = moved(model, 7).number
    with evaluating(model):
        side, plain = Side(model, Recorder()), Side(model)
        first_layer(model, broken).lora_b[0, 0] = torch.nan
        for one in (side, plain):
            one.join(0, [5, 6], 0)
            one.join(1, [7, 8], BASE)
            one.join(2, [7, 8], broken)
            one.go_on(5)
        for id in (0, 1):
            assert side.rows[id].new == plain.rows[id].new


class Waits(Recorder):
    """A device on which nothing can be recorded."""

    def __call__(self, work: Any) -> Any:
        raise RuntimeError("the work waits\nfor the device")


def wrong(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    place = work() * (1 + 1e-15)
    return (lambda: None), place


@pytest.mark.parametrize(
    ("name", "record", "why"),
    [
        ("llama", Waits(), "the work waits"),
        ("llama", wrong, "isn't the step"),
        ("qwen3_moe", Recorder(), "wait"),
        ("dynamic", Recorder(), "wait"),
        ("dora", Recorder(), "updates otherwise"),
    ],
)
def test_what_can_not_be_recorded_runs_as_it_is_and_is_said_once(name: str, record: Any, why: str) -> None:
    model, said = adapted("llama" if name == "dora" else name), list[str]()
    if name == "dora":
        attach(model, AdapterSpec(rank=2, targets="all-linear", magnitude=True))
        model.double()
    update = 1 if name == "dora" else 0
    with evaluating(model):
        side, plain = Side(model, record), Side(model)
        side.captured._say = said.append
        for one in (side, plain):
            one.join(0, PROMPTS[0], update)
            one.join(1, PROMPTS[3], update)
            one.go_on(8)
    assert len(said) == 1 and why in said[0] and "\n" not in said[0] and not side.captured.graphs
    assert [row.new for row in side.rows.values()] == [row.new for row in plain.rows.values()]


def test_a_step_that_does_not_look_like_its_work_is_found() -> None:
    """What is recorded is compared with the step as it is taken without, too."""
    model, said = adapted(), list[str]()
    with evaluating(model):
        side = Side(model, Recorder())
        side.captured._say = said.append
        run = side.captured._run
        side.captured._run = lambda this, ids, at: run(this, ids, at) * 1.01
        side.join(0, PROMPTS[0], 0)
        side.go_on(5)
    assert len(said) == 1 and "isn't the step" in said[0]


@pytest.mark.parametrize(("name", "why"), [("falcon_h1", "slots"), ("llama", "come and go")])
def test_models_without_recorded_steps_are_named(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, model = list[str](), adapted(name)
    monkeypatch.setattr(engine, "say", said.append)
    monkeypatch.setattr(slots, "InParts", nn.Linear)
    assert answered(Engine(model, record=Recorder())) == answered(Engine(model))
    assert len(said) == 1 and why in said[0]


def answered(one: Engine) -> list[int | None]:
    one.add(PROMPTS[0], Sampling(max_new_tokens=5))
    return [event.token for _ in range(8) for event in one.step()]


def test_without_a_recorder_nothing_is_otherwise() -> None:
    model = adapted()
    own = Engine(model)._slots
    assert own is not None and own.captured is None
    assert own._capacity(1) == slots.SMALLEST and own.ready is not None and not own.ready.doubling
