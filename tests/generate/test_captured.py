"""Captured steps of decoding are the steps themselves: recorded and replayed on a CPU by the same code (tape.py)."""

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from deltaw.adapter.attach import attach, detach
from deltaw.config import AdapterSpec
from deltaw.generate import captured, slots
from deltaw.generate.cache import BASE, Row, evaluating
from deltaw.generate.captured import Captured
from deltaw.generate.sampling import Sampling
from deltaw.generate.slots import Slots
from tests.generate.test_prefixes import moved
from tests.generate.test_slots import adapted
from tests.tape import Recorder, recording


def straight(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A recording that is the work itself."""
    place = work().clone()
    return lambda: place.copy_(work()), place


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
        if self.slots.captured:
            self.slots.captured._say = lambda line: pytest.fail(line)

    @property
    def captured(self) -> Captured:
        assert self.slots.captured is not None
        return self.slots.captured

    def join(self, id: int, prompt: tuple[int, ...], update: int | None) -> None:
        self.rows[id] = row = Row(id, prompt, Sampling(), set(), id, 64, update, key=b"%d" % (update or 0))
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


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 20), st.integers(0, 3)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("steps"), st.integers(1, 4)),
        st.tuples(st.just("trained"), st.integers(0, 1)),
        st.tuples(st.just("scaled"), st.integers(0, 1)),
        st.tuples(st.just("another"), st.integers(1, 3)),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.sampled_from(["llama", "mistral", "gemma2", "qwen3"]), EVENTS)
def test_whatever_happens_each_row_gets_the_same_logits(name: str, events: list[tuple[Any, ...]]) -> None:
    """Replayed as not captured, and to the bit as by the work that was recorded."""
    model = adapted(name, max_position_embeddings=256)
    updates, recorder, number, third = [0, moved(model, 7).number], Recorder(), 0, None
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        replayed, plain, worked = Side(model, recorder), Side(model), Side(model, straight)
        sides, changed = (replayed, plain, worked), False

        for what, *given_ in [*events, ("steps", 3)]:
            changed |= what in ("trained", "scaled", "another")
            if what == "join":
                length, which = given_
                update = [*updates, BASE, updates[0]][which]
                for side in sides:
                    side.join(number, tuple((7 * number + 3 * n) % 90 + 3 for n in range(length)), update)
                number += 1
            elif what == "leave" and given_[0] in plain.rows:
                for side in sides:
                    side.leave(given_[0])
            elif what == "trained":
                layer = next(m for m in model.modules() if type(m).__name__ == "AdaptedLinear")
                layer.update(updates[given_[0]]).lora_b.mul_(1.5)  # type: ignore[operator, union-attr]
            elif what == "scaled":
                layer = next(m for m in model.modules() if type(m).__name__ == "AdaptedLinear")
                layer.update(updates[given_[0]]).scale *= 0.5  # type: ignore[operator, union-attr]
            elif what == "another":
                if third is not None:
                    detach(third)
                third = attach(model, AdapterSpec(rank=given_[0] + 1, targets="all-linear"))
                model.double()
            for _ in range(given_[0] if what == "steps" else 0):
                for first in ([side.step() for side in sides], [side.fill() for side in sides]):
                    mine, own, work = first
                    assert mine.keys() == own.keys() == work.keys()
                    for id in own:
                        torch.testing.assert_close(mine[id], own[id], rtol=1e-8, atol=1e-8)
                        assert changed or torch.equal(mine[id], work[id])
                        for side in sides:
                            side.rows[id].new.append(int(own[id].argmax()))
                changed = False  # a step after a change is taken as it is
        assert len(replayed.captured.graphs) <= captured.GRAPHS and not replayed.captured.why_not
