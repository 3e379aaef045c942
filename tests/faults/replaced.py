"""A server's adapters change under it: one that is broken is asked for (59), they are replaced and deleted while they
answer (60)."""

import asyncio
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from deltaw.adapter.file import Adapter
from tests.faults.broken import BROKEN, CONFIG, WEIGHTS
from tests.faults.fault import expect, fault
from tests.faults.fuzz import mutated
from tests.faults.served import ADAPTERS, TEXT, adapters_folder, serve
from tests.serve.canaries import PROMPTS, TOKENS, replaced_while_asked

BAD = "bad"
AT_ONCE = 100  # answers of a try


@cache
def own() -> tuple[Any, dict[tuple[int, ...], str]]:
    """A server with a folder of its own, where broken adapters come and go, and what its good one answers."""
    canaries, _ = adapters_folder()
    folder = canaries.folder / "changing"
    canaries.save(folder / "good", 7)
    return serve(canaries, folder, slots=8), canaries.all_expected(Adapter.load(folder / "good"))


def harm(n: int, folder: Path) -> str:
    """Break an adapter; in what way."""
    if n % 3 == 0:
        name, break_it, _ = BROKEN[n // 3 % len(BROKEN)]
        break_it(folder)
        return name
    file = folder / (WEIGHTS if n % 3 == 1 else CONFIG)
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if n % 3 == 1 else len(data)
    file.write_bytes(mutated(data, n, header))
    return f"{file.name} mutated"


@fault(
    59,
    "an adapter that is broken in one of 18 ways, or by one to four mutations, is loaded and asked for at runtime: 400 "
    "(or it can be read), the answers that others are given meanwhile are right to the letter, and it can be put right",
    tries=1_500,
    sample=24,
    at_once=375,
)
def bad_adapter(n: int, scratch: Path) -> None:
    server, right = own()
    good, bad = server.folder / "good", server.folder / BAD
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    how = harm(n, bad)

    def asking(model: str, prompt: tuple[int, ...]) -> Any:
        asked = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
        return server.ask("POST", TEXT, json.dumps(asked).encode())

    async def all_of_them() -> list[Any]:
        loading = server.ask("POST", ADAPTERS, json.dumps({"name": BAD}).encode())
        others = [asking("good", prompt) for prompt in PROMPTS]
        return list(await asyncio.gather(loading, asking(BAD, PROMPTS[0]), *others, asking(BAD, PROMPTS[1])))

    loaded, first, *others, last = server.run(all_of_them())
    for prompt, answer in zip(PROMPTS, others, strict=True):
        expect(answer.status == 200, f"{how}: others got {answer.body[:200]!r}")
        expect(answer.value["choices"][0]["text"] == right[prompt], f"{how}: a wrong answer to others")
    for answer in (loaded, first, last):
        if answer.status != 200:  # 404: without its files it isn't an adapter; 500: its numbers come to no logits
            answer.refused(400, 404, *(() if answer is loaded else (500,)))
    expect(n % 3 or loaded.status in (400, 404), f"{how}: it was loaded")
    expect(server.worker.figures().restarts == 0, f"{how}: the engine was started anew")
    if n % 50 == 0:
        shutil.rmtree(bad)
        shutil.copytree(good, bad)
        expect(server.post(ADAPTERS, name=BAD).status == 200, "it can't be put right")
    server.at_rest()


@fault(
    60,
    f"adapters are swapped, written over, deleted and put back while eight clients ask, {AT_ONCE} answers in a try: "
    "each is that of a version its name had meanwhile, those that were begun end on the old weights: none of 10,000 "
    "is another's",
    tries=100,
    sample=1,
    at_once=10,
)
def replaced_adapter(n: int, scratch: Path) -> None:
    canaries, _ = adapters_folder()
    replaced_while_asked(canaries, scratch / str(n), AT_ONCE, seed=n)
