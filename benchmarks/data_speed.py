"""How fast rows become tokens: a file of short chats made up here, and `prepare` on it, in seconds and bytes.

    python -m benchmarks.data_speed [--rows 200000] [--base builtin:smollm2-135m] [--processes N] [--profile]

The chats have a system prompt and one to three turns each, about 560 bytes and 125 tokens; no two are alike, and their
words are an essay's, not a generator's (a tokenizer that remembers words would be too fast otherwise). CPU seconds are
those of all processes that were waited for; memory is the sum over this process and its children, sampled.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from deltaw.config import DataConfig

TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what
its about than into them can only other time new some could these two may first then do any like my now over
such our man even most made after also did many off before must well back through years much where your way
down should because long each just state those people too world still between life being under never day same
another know while last might us great old year come since against go came right used take three himself few
house use during without again place around however home small found thought went say part once general high
upon school every interpretation gradient photosynthesis bureaucracy asynchronous lighthouse marmalade
Reykjavik kilowatt-hours café naïve Łódź 東京 don't it's 3.14 1,024 HTTP/2 foo_bar() <br> e-mail C++ §12
“quoted” — (parenthesis)
"""
WORDS = TEXT.split()
SYSTEMS = (
    "You are a helpful assistant that answers briefly and in plain words.",
    "You are a careful tutor. Explain each step before you give the answer.",
)


def chat(number: int) -> dict[str, Any]:
    """The chat of this number, the same in every run."""
    draw = random.Random(number)

    def words(fewest: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(fewest, most))) + draw.choice(".?!")

    messages = [{"role": "system", "content": draw.choice(SYSTEMS)}]
    for _ in range(draw.choice((1, 2, 2, 3))):
        messages += [
            {"role": "user", "content": f"{draw.randrange(10**6)}: {words(4, 16)}"},
            {"role": "assistant", "content": words(6, 30)},
        ]
    return {"messages": messages}


def write(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(json.dumps(chat(number), ensure_ascii=False) + "\n")


class Peak:
    """The most memory that this process and its children had at once, in bytes: proportional sets, sampled."""

    def __enter__(self) -> "Peak":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(1.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            self.bytes = max(self.bytes, total)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(path: Path, base: str, profile: bool, record: bool) -> None:
    from deltaw.base.source import find_base
    from deltaw.data.opening import open_renderer
    from deltaw.data.prepare import prepare
    from deltaw.files import bounded

    renderer = open_renderer(find_base(base))
    config = DataConfig(train=str(path), eval=500)
    profiler = cProfile.Profile()
    with Peak() as peak:
        bounded.worker().stop()
        began, used = time.perf_counter(), cpu_seconds()
        if profile:
            profiler.enable()
        dataset = prepare(config, renderer)
        profiler.disable()
        seconds = time.perf_counter() - began
        bounded.worker().stop()  # whose seconds are known when it has ended
        cpu = cpu_seconds() - used
    fingerprint = dataset.fingerprint
    rows, tokens = dataset.report.rows_read, dataset.report.tokens
    print(f"{rows:,} rows, {tokens:,} tokens, {path.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores")
    print(
        f"prepared in {seconds:.1f} s ({rows / seconds:,.0f} rows/s), "
        f"{cpu:.1f} s of CPU ({cpu / rows * 1e6:.0f} µs/row)"
    )
    if record:
        from benchmarks.figures import Measured, note

        section, bound = "When it doesn't fit", 100.0 * rows / 1_000_000
        name = f"{rows:,} short chats, prepared for the first time"
        note(Measured(section, name, seconds, "s", bound, at_most=True))
    print(f"peak {peak.bytes / 1e6:,.0f} MB, fingerprint {fingerprint[:16]}, load {os.getloadavg()[0]:.1f}")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--profile", action="store_true", help="where this process's time goes")
    parser.add_argument("--file", type=Path, help="kept there, and used if it is there")
    parser.add_argument("--record", action="store_true", help="keep the figure for docs/performance.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = given.file or Path(scratch) / "chats.jsonl"
        if not path.exists():
            write(path, given.rows)
        measure(path, given.base, given.profile, given.record)


if __name__ == "__main__":
    main()
