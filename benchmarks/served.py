"""The server itself: how long a first token takes, and what 1,000 adapters do to it (what it costs over its engine:
server.py).

    python -m benchmarks.served [first] [adapters] [--count 1000] [--threads 2] [--record]

`deltaw serve` runs in a process of its own, on the builtin in float32, and is asked as clients ask it, by streams.

    first     while 15 streams go on, a prompt of 1,000 tokens comes: seconds to its first token, beside those on an
              idle server, and the longest time for which one of the 15 waited for a token, beside their median
    adapters  `--count` of rank 16 on all linear layers in one folder (16 different ones under many names, as links):
              seconds to the first answer beside a folder of 16, memory, and the time of an answer of one token of an
              adapter that isn't on the model yet (a miss) and of one that is (a hit)

To be run on an idle machine, where it takes some three minutes. `--record` notes the figures.
"""

import argparse
import contextlib
import http.client
import os
import statistics
import threading
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import Measured, note
from benchmarks.server_process import Server
from benchmarks.serving import PROMPT, STREAMS, make_adapters

SECTION = "Serving"
LONG = 1000  # tokens of a prompt
GOING_ON = 400  # of the streams beside it, which aren't waited for


def prompts(count: int, length: int = PROMPT) -> list[list[int]]:
    """Random ids, other ones in each call."""
    import torch

    return torch.randint(1000, 40_000, (count, length)).tolist()  # type: ignore[no-any-return]


def first(asked: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Times of a long prompt's first token, and of the others'."""
    with Server(None, asked.threads) as server:
        alone = _first_token(server)
        times: list[list[float]] = [[] for _ in range(STREAMS - 1)]

        def follow(number: int, prompt: list[int]) -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # of the server's end
                for at in server.ask(server.base, prompt, GOING_ON):
                    times[number].append(at)

        for each in enumerate(prompts(STREAMS - 1)):
            threading.Thread(target=follow, args=each, daemon=True).start()
        while min(map(len, times)) < 8:
            time.sleep(0.01)
        began = time.perf_counter()
        beside = _first_token(server)
        ended = time.perf_counter()
        waits = [(b - a, b) for one in list(map(list, times)) for a, b in pairwise(one)]
        return {
            f"first token of {LONG:,} tokens, idle server": (alone, "s"),
            f"first token of {LONG:,} tokens beside 15 streams": (beside, "s"),
            "a stream's longest wait for a token meanwhile": (
                max(wait for wait, at in waits if began < at < ended),
                "s",
            ),
            "a stream's median wait before": (statistics.median(wait for wait, at in waits if at < began), "s"),
        }


def _first_token(server: Server) -> float:
    began = time.perf_counter()
    return next(server.ask(server.base, prompts(1, LONG)[0], 1)) - began


def adapters(asked: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Start, memory, misses and hits with a folder of many."""
    with TemporaryDirectory() as folder:
        made = make_adapters(Path(folder), STREAMS)
        few, many = Path(folder) / "few", Path(folder) / "many"
        for root, count in ((few, STREAMS), (many, asked.count)):
            for number in range(count):
                own = root / f"adapter-{number:04}"
                own.mkdir(parents=True)
                for file in made[number % STREAMS].iterdir():
                    os.link(file, own / file.name)
        with Server(few, asked.threads) as server:
            started = server.seconds
        with Server(many, asked.threads) as server:
            before, used = server.memory, min(64, asked.count)
            misses, hits = (
                [_answer(server, f"adapter-{number:04}") for number in range(used)] for _ in ("miss", "hit")
            )
            held = server.memory - before
            print(f"{used} of {asked.count:,} adapters used: {held:.2f} GB more, {before:.2f} GB before", flush=True)
            return {
                f"start with {asked.count:,} adapters over one with {STREAMS}": (server.seconds - started, "s"),
                f"memory with {asked.count:,} adapters of rank 16 registered": (before, "GB"),
                f"memory of an adapter that is used, of {used}": (held / used, "GB"),
                "an answer of one token, adapter not on the model yet": (statistics.median(misses[1:]), "s"),
                "an answer of one token, adapter on the model": (statistics.median(hits), "s"),
            }


def _answer(server: Server, name: str) -> float:
    prompt = prompts(1)[0]
    began = time.perf_counter()
    list(server.ask(name, prompt, 1))
    return time.perf_counter() - began


PARTS = {"first": first, "adapters": adapters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; both where none is named")
    parser.add_argument("--count", type=int, default=1000, help="adapters in the folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/performance.md")
    asked: Any = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    for part in asked.parts or PARTS:
        for name, (value, unit) in PARTS[part](asked).items():
            print(f"{name}: {value:.3g} {unit}", flush=True)
            if asked.record:
                note(Measured(SECTION, name, value, unit, at_most=True))


if __name__ == "__main__":
    main()
