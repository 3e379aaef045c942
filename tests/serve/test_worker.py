"""The worker answers each request as the base with its adapter alone does, whatever else happens meanwhile."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.errors import InputError, RunError
from deltaw.generate.engine import Engine
from deltaw.serve.ask import Busy, Unknown
from deltaw.serve.worker import Worker
from tests.serve.canaries import (
    PROMPTS,
    Canaries,
    ask,
    pieces,
    replaced_while_asked,
    run,
    swapped,
    text,
    until,
    working,
)


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    return Canaries(tmp_path_factory.mktemp("canaries"))


@pytest.fixture(scope="module")
def folder(canaries: Canaries) -> Path:
    folder = canaries.folder / "adapters"
    for seed in (1, 2, 3):
        canaries.save(folder / f"lora{seed}", seed)
    canaries.save(folder / "dora", 4, AdapterSpec(rank=3, alpha=6, magnitude=True), size=0.1)
    return folder


@pytest.fixture(scope="module")
def worker(canaries: Canaries, folder: Path) -> Iterator[Worker]:
    with working(canaries.open(), folder, slots=4) as worker:
        yield worker


def test_rows_of_many_adapters_get_what_they_get_alone(canaries: Canaries, folder: Path, worker: Worker) -> None:
    asks = [ask(prompt, name) for prompt in PROMPTS for name in (None, "lora1", "lora2", "lora3")]

    async def work() -> list[str]:
        return await asyncio.gather(*(text(worker, each) for each in asks))

    adapters = {name: Adapter.load(folder / name) for name in ("lora1", "lora2", "lora3")}
    wanted = [canaries.expected(adapters.get(each.adapter or ""), each.prompt) for each in asks]
    assert len(set(wanted)) == len(wanted)
    assert run(work) == wanted


def test_one_of_another_kind_is_served_beside_them(canaries: Canaries, folder: Path) -> None:
    """It waits until nothing runs, and nobody else overtakes it."""
    names = ["lora1", None, "dora", "lora2", "dora", None, "lora1"]

    async def work() -> list[str]:
        return await asyncio.gather(*(text(worker, ask(adapter=name)) for name in names))

    adapters = {name: Adapter.load(folder / name) for name in ("lora1", "lora2", "dora")}
    with working(canaries.open(), folder, slots=2) as worker:
        for _ in range(2):
            assert run(work) == [canaries.expected(adapters.get(name or "")) for name in names]
        assert worker.figures().restarts == 0


def test_each_request_has_its_scale(canaries: Canaries, folder: Path, worker: Worker) -> None:
    scales = (0, 0.25, 1, 1.5)

    async def work() -> list[str]:
        return await asyncio.gather(*(text(worker, ask(adapter="lora1", scale=scale)) for scale in scales))

    adapter = Adapter.load(folder / "lora1")
    wanted = [canaries.expected(adapter, PROMPTS[0], scale) for scale in scales[1:]]
    assert run(work) == [canaries.expected(None, PROMPTS[0]), *wanted]
    assert len(worker.adapters._live["lora1"].scaled) == 2


def test_an_answer_is_its_pieces_and_each_token_has_its_logprobs(worker: Worker) -> None:
    async def work() -> Any:
        return await pieces(worker, ask(logprobs=2, n=3, sampling={"temperature": 1.0, "seed": 7}))

    for index in range(3):
        own = [piece for piece in run(work) if piece.index == index]
        tokens = [token for piece in own for token in piece.tokens]
        logprobs = [one for piece in own for one in piece.logprobs]
        assert worker.model.renderer.decode(tokens) == "".join(piece.text for piece in own)
        assert len(logprobs) == len(tokens) and all(len(one.top) == 2 for one in logprobs)
        assert [piece.finish for piece in own if piece.finish] == [own[-1].finish]
    again = [piece.tokens for piece in run(work)]
    assert again == [piece.tokens for piece in run(work)]  # the seed


def test_echo_gives_the_prompt_and_what_the_model_says_of_it(worker: Worker) -> None:
    prompt = PROMPTS[1]
    (first, *_) = run(lambda: pieces(worker, ask(prompt, "lora1", echo=True, logprobs=1)))
    alone = run(lambda: pieces(worker, ask(prompt, "lora1", echo=True, logprobs=1, answer=False)))
    other = run(lambda: pieces(worker, ask(prompt, "lora2", echo=True, logprobs=1, answer=False)))
    assert first == alone[0] and first.echoed and first.tokens == prompt
    assert first.logprobs[0] is None and len(first.logprobs) == len(prompt)
    assert [piece.finish for piece in alone] == [None, "length"]
    assert first.logprobs[-1].token != other[0].logprobs[-1].token


def test_it_stops_at_a_text(canaries: Canaries, worker: Worker) -> None:
    whole = canaries.expected(None, PROMPTS[0])
    stop = whole[3:5]
    answer = run(lambda: pieces(worker, ask(stop=(stop, "never comes"), most=200)))
    assert not worker.decoding.engine.busy  # type: ignore[union-attr]
    assert "".join(piece.text for piece in answer) == whole[: whole.index(stop)]
    assert answer[-1].finish == "stop"
    assert run(lambda: pieces(worker, ask(stop=("never comes",))))[-1].finish == "length"


def test_a_client_that_leaves_frees_its_slot(worker: Worker) -> None:
    async def work() -> int:
        answering = worker.submit(ask(most=200))
        await anext(answering)
        before = worker.figures().generation_tokens
        await answering.aclose()
        await until(lambda: not worker.decoding.running)
        assert not worker.decoding.engine.busy  # type: ignore[union-attr]
        with pytest.raises(StopAsyncIteration):
            while True:
                await anext(answering)
        return worker.figures().generation_tokens - before

    cancelled = worker.figures().ended.get("cancelled", 0)
    assert run(work) <= 3
    assert worker.figures().ended["cancelled"] == cancelled + 1


def test_one_that_leaves_the_line_is_never_begun(worker: Worker) -> None:
    async def work() -> None:
        running = [worker.submit(ask(most=200, client="a")) for _ in range(4)]
        await asyncio.gather(*(each.begun() for each in running))
        waiting = worker.submit(ask(client="a"))
        waiting.cancel()
        assert [piece async for piece in waiting] == []
        for each in running:
            each.cancel()
        await until(lambda: not worker.decoding.running)
        assert not len(worker._line)

    run(work)


def test_the_queue_is_bounded_and_says_when_to_come_again(canaries: Canaries, folder: Path) -> None:
    async def work() -> None:
        asks = [ask(most=60, client=str(i % 3)) for i in range(20)]
        answerings, refused = [], []
        for each in asks:
            try:
                answerings.append(worker.submit(each))
            except Busy as busy:
                refused.append(busy.retry_after)
        assert refused and all(1 <= seconds <= 600 for seconds in refused)
        assert len(answerings) <= 3 + 3 + 1
        for answering in answerings:
            assert [piece async for piece in answering][-1].finish == "length"
        assert worker.figures().refused == len(refused)

    with working(canaries.open(), folder, slots=2, queue=3) as worker:
        run(work)


def test_clients_take_turns(worker: Worker) -> None:
    ended: list[str] = []

    async def one(client: str) -> None:
        await pieces(worker, ask(client=client, most=12))
        ended.append(client)

    async def work() -> None:
        many = [asyncio.ensure_future(one("many")) for _ in range(20)]
        await until(lambda: len(worker.decoding.running) == 4)
        await asyncio.gather(one("few"), one("other"), *many)

    run(work)
    assert {"few", "other"} <= set(ended[:10])


def test_what_is_asked_wrongly_is_said_at_once(worker: Worker) -> None:
    async def work() -> None:
        for wrong in (
            ask(()),
            ask(tuple(range(300))),
            ask((10_000,)),
            ask(n=0),
            ask(n=5),
            ask(adapter="lora1", scale=-1),
            ask(adapter="lora1", scale=math.nan),
            ask(bias={5: math.inf}),
        ):
            with pytest.raises(InputError):
                worker.submit(wrong)
        with pytest.raises(Unknown):
            worker.submit(ask(adapter="nobody"))

    run(work)


@pytest.mark.parametrize("token", [0, 2])
def test_a_request_whose_logits_are_not_finite_ends_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    poison = (1, 2, 3)
    chosen = Engine._chosen

    def broken(self: Engine, rows: Any, logits_RV: torch.Tensor) -> list[int]:
        for at, row in enumerate(rows):
            if tuple(row.prompt) == poison and len(row.new) == token:
                logits_RV = logits_RV.clone()
                logits_RV[at] = math.nan
        return chosen(self, rows, logits_RV)

    async def work() -> list[Any]:
        asks = [ask(), ask(poison), ask(PROMPTS[1]), ask(PROMPTS[2], "lora1")]
        return await asyncio.gather(*(text(worker, each) for each in asks), return_exceptions=True)

    wanted = [run(lambda each=each: text(worker, each)) for each in (ask(), ask(PROMPTS[1]), ask(PROMPTS[2], "lora1"))]
    monkeypatch.setattr(Engine, "_chosen", broken)
    first, failed, *rest = run(work)
    assert isinstance(failed, RunError)
    assert [first, *rest] == wanted


def test_the_engine_fails_and_the_worker_goes_on(
    worker: Worker, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> list[Any]:
        asks = [ask(), ask(PROMPTS[1], "lora1")]
        return await asyncio.gather(*(text(worker, each) for each in asks), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", lambda self: 1 / 0)
        assert [type(error) for error in run(work)] == [RunError, RunError]
    assert worker.figures().restarts >= 1 and worker.alive
    assert run(work)[0] == canaries.expected(None, PROMPTS[0])
    assert not any(version.running for version in worker.adapters._live.values())


def test_a_beginning_is_shared_by_what_acts_and_not_by_name(canaries: Canaries, folder: Path, tmp_path: Path) -> None:
    """Long prompts, asked again with the same weights, others under the same name, and the base."""
    prompt = tuple(range(40, 80))
    live, seeds = tmp_path / "a", (1, 2, 1)
    wanted = {seed: canaries.answer(Adapter.load(folder / f"lora{seed}"), prompt) for seed in seeds}
    with working(canaries.open(), tmp_path, slots=2) as worker:
        for turn, seed in enumerate(seeds):
            swapped(folder / f"lora{seed}", live)
            for _ in range(2):
                assert run(lambda: text(worker, ask(prompt, "a"))) == wanted[seed]
            assert run(lambda: text(worker, ask(prompt))) == canaries.answer(None, prompt)
            assert worker.figures().prefix_tokens > turn * len(prompt) // 2


def test_closing_ends_all_within_its_time(canaries: Canaries, folder: Path) -> None:
    async def work() -> list[Any]:
        asks = [pieces(worker, ask(most=200, adapter="lora1")) for _ in range(8)]
        answers = asyncio.gather(*asks, return_exceptions=True)
        await until(lambda: bool(worker.decoding.running))
        await asyncio.to_thread(worker.close)
        assert not worker.alive
        with pytest.raises(Busy):
            worker.submit(ask())
        return list(await answers)

    with working(canaries.open(), folder, slots=2) as worker:
        assert all(isinstance(error, RunError) for error in run(work))


def test_no_request_gets_another_adapters_answer(canaries: Canaries, tmp_path: Path) -> None:
    replaced_while_asked(canaries, tmp_path, 200)
