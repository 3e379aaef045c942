"""Adapters whose answers tell them apart, and a worker that serves them."""

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltaw.adapter.algebra import scaled
from deltaw.adapter.attach import attach, detach, discard
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.generate.engine import generate
from deltaw.generate.sampling import Sampling
from deltaw.model import Model, open_model
from deltaw.serve.adapters import Adapters
from deltaw.serve.ask import Ask, Piece, Unknown
from deltaw.serve.worker import Worker
from tests.tiny import tiny_base

TOKENS = 8
PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4), (30, 31)]
LORA = AdapterSpec(rank=4, alpha=8)


@dataclass
class Canaries:
    """A base and adapters for it, by seed."""

    folder: Path
    _expected: dict[Any, dict[tuple[int, ...], str]] = field(default_factory=dict)

    @cached_property
    def base(self) -> Path:
        return tiny_base(self.folder / "base")

    def open(self) -> Model:
        return open_model(self.base, dtype="float32", device="cpu")

    @cached_property
    def model(self) -> Model:
        """What answers are compared with."""
        return self.open()

    def adapter(self, seed: int, spec: AdapterSpec = LORA, size: float = 0.3) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        attached = attach(self.model.base.model, spec, generator=generator)
        with torch.no_grad():
            for parameter in attached.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        return replace(detach(attached), base=self.model.id)

    def save(self, folder: Path, seed: int, spec: AdapterSpec = LORA, size: float = 0.3) -> Path:
        return self.adapter(seed, spec, size).save(folder)

    def expected(self, adapter: Adapter | None, prompt: tuple[int, ...] = PROMPTS[0], scale: float = 1.0) -> str:
        """What the base with this adapter alone answers."""
        return self.all_expected(adapter, scale)[prompt]

    def all_expected(self, adapter: Adapter | None, scale: float = 1.0) -> dict[tuple[int, ...], str]:
        """By prompt."""
        key = adapter and adapter.fingerprint, scale
        if key not in self._expected:
            scaled_to = adapter if adapter is None or scale == 1 else scaled(adapter, scale)
            self._expected[key] = dict(zip(PROMPTS, self.answers(scaled_to, PROMPTS), strict=True))
        return self._expected[key]

    def answers(self, adapter: Adapter | None, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        """To any prompts."""
        attached = None if adapter is None else attach(self.model.base.model, adapter)
        sampling, stops = Sampling(max_new_tokens=TOKENS), self.model.renderer.stop_ids
        rows = generate(self.model.base.model, prompts, sampling, stops)
        if attached is not None:
            discard(attached)
        return [self.model.renderer.decode(row) for row in rows]

    def answer(self, adapter: Adapter | None, prompt: tuple[int, ...]) -> str:
        return self.answers(adapter, [prompt])[0]


@contextmanager
def working(model: Model, folder: Path | None = None, *, memory: int = 1 << 30, **settings: Any) -> Iterator[Worker]:
    """A worker that runs inside the block."""
    worker = Worker(model, Adapters(model, folder, memory=memory), **settings)
    worker.start()
    try:
        yield worker
    finally:
        worker.close(20)
        assert not worker._thread.is_alive()


def ask(prompt: tuple[int, ...] = PROMPTS[0], adapter: str | None = None, *, most: int = TOKENS, **more: Any) -> Ask:
    return Ask(prompt, Sampling(max_new_tokens=most, **more.pop("sampling", {})), adapter=adapter, **more)


async def pieces(worker: Worker, ask: Ask) -> list[Piece]:
    return [piece async for piece in worker.submit(ask)]


async def text(worker: Worker, ask: Ask) -> str:
    return "".join(piece.text for piece in await pieces(worker, ask))


def run(work: Callable[[], Coroutine[Any, Any, Any]], seconds: float = 60.0) -> Any:
    """In an event loop of its own, within so many seconds."""

    async def bounded() -> Any:
        return await asyncio.wait_for(work(), seconds)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def swapped(source: Path, target: Path) -> None:
    """`target` becomes a copy of `source` at once."""
    shutil.copytree(source, target.with_name(".new"))
    if target.exists():
        target.rename(target.with_name(".old"))
    target.with_name(".new").rename(target)
    shutil.rmtree(target.with_name(".old"), ignore_errors=True)


def replaced_while_asked(canaries: Canaries, scratch: Path, count: int, seed: int = 0) -> None:
    """So many requests by eight clients, one of whom replaces adapters before it asks, in two ways, or takes one away.
    Each answer is that of a version that its name had meanwhile; raises AssertionError where one isn't."""
    versions = [canaries.adapter(seed) for seed in range(10, 14)]
    stored = [version.save(scratch / "stored" / str(n)) for n, version in enumerate(versions)]
    wanted = [canaries.all_expected(version) for version in versions]
    base = canaries.all_expected(None)
    assert len({text for one in (base, *wanted) for text in one.values()}) == 5 * len(PROMPTS)
    history: dict[str, list[int | None]] = {name: [0] for name in "abc"}  # which versions a name has had
    for name in history:
        swapped(stored[0], scratch / "live" / name)
    chance, wrong, asked, unknown = random.Random(seed), list[str](), 0, 0

    async def one(name: str | None, number: int) -> None:
        nonlocal unknown
        prompt, had = chance.choice(PROMPTS), 0 if name is None else len(history[name]) - 1
        try:
            answer = await text(worker, ask(prompt, name, client=str(number)))
        except (Unknown, InputError):  # all of it is gone, or the first of its files
            unknown += 1
            if name is None or None not in history[name][had:]:
                wrong.append(f"{name} is gone")
            return
        right = [base] if name is None else [wanted[n] for n in history[name][had:] if n is not None]
        if answer not in {each[prompt] for each in right}:
            wrong.append(f"{name} {prompt}: {answer!r}, not {right}")

    def replace_it(name: str) -> None:
        n = chance.randrange(len(versions)) if history[name][-1] is None else None
        if n is None and chance.random() < 0.15:
            shutil.rmtree(scratch / "live" / name)
            history[name].append(None)
            return
        n = (history[name][-1] or 0) + 1 if n is None else n
        n %= len(versions)
        if chance.random() < 0.5:
            swapped(stored[n], scratch / "live" / name)
        else:
            versions[n].save(scratch / "live" / name)
        history[name].append(n)

    async def client(number: int) -> None:
        nonlocal asked
        while asked < count:
            asked += 1
            name = chance.choice([*history, None])
            if number == 0 and name is not None:
                replace_it(name)
            await one(name, number)

    async def work() -> None:
        await asyncio.gather(*(client(number) for number in range(8)))

    memory = 4 * 4 * versions[0].parameters
    with working(canaries.open(), scratch / "live", slots=6, memory=memory) as worker:
        run(work, 1200)
        figures = worker.figures()
    assert not wrong, wrong[:3]
    assert figures.adapter_loads > 3 and figures.restarts == 0 and set(figures.ended) <= {"length", "stop", "error"}
    assert figures.ended.get("error", 0) <= unknown
    assert not worker.decoding.by_row and not worker.busy and not worker.adapters._requests
    assert asked - unknown <= sum(figures.ended.values()) <= asked and asked >= count
    assert sum(map(len, history.values())) > len(history)
