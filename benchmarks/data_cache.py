"""How long prepared rows take to open again: made-up ones are written to the cache and opened, in new processes.

    python benchmarks/data_cache.py [--rows 1000000]

The rows are as many and as long as data_speed.py's chats (about 125 tokens); only their tokens are random numbers, so
that what is measured is the cache and not the tokenizer. `open` is the checksums, the mapping and the report; `loader`
the first step's batches; memory is the process's own beyond what it had before, page cache not counted.
"""

import argparse
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(dir=os.environ.get("DELTAW_CACHE")) as folder:
        os.environ["DELTAW_CACHE"] = folder
        for work in (_write, _open, _open):
            child = os.fork()
            if not child:
                work(rows)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise SystemExit(1)


def _key():  # type: ignore[no-untyped-def]
    from deltaw.data.cache import Key

    return Key("0" * 32, {}, "made up")


def _write(rows: int) -> None:
    from deltaw.base.source import find_base
    from deltaw.config import DataConfig
    from deltaw.data import cache
    from deltaw.data.examples import Columns, Examples, Kind
    from deltaw.data.opening import open_renderer
    from deltaw.data.prepare import prepare

    draw = np.random.default_rng(0)
    lengths = draw.integers(60, 190, rows)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draw.integers(0, 49152, int(starts[-1]), dtype=np.int32)
    none = np.zeros(rows, np.int8)
    columns = Columns(
        tokens, tokens % 3 > 0, starts, none, np.arange(1, rows + 1, dtype=np.int32), none, none, none,
        ("chats.jsonl",), (Kind(),),
    )  # fmt: skip
    small = prepare(DataConfig(train="builtin:general"), open_renderer(find_base("builtin:smollm2-135m")))
    numbers = np.arange(rows)
    dataset = replace(small, train=Examples(columns, numbers[500:]), eval=Examples(columns, numbers[:500]))
    begin = time.perf_counter()
    assert dataset.fingerprint
    printed = time.perf_counter()
    cache.rows_folder().mkdir(parents=True)
    assert cache.store(_key(), dataset, print)
    size = cache.kept_rows()[0].size
    print(f"{rows:,} rows, {len(tokens):,} tokens: {size / 1e6:,.0f} MB, {size / len(tokens):.2f} bytes per token")
    print(f"fingerprint {printed - begin:.2f} s, writing {time.perf_counter() - printed:.2f} s")


def _open(rows: int) -> None:
    from deltaw.data import cache
    from deltaw.data.loader import Loader

    before, begin = _own(), time.perf_counter()
    dataset = cache.load(_key(), lambda _: None)
    opened = time.perf_counter()
    assert dataset is not None and len(dataset.rows) == rows
    loader = Loader(dataset.train, 4096, 4096, 0)
    next(iter(loader))
    steps = time.perf_counter()
    most = _own() - before
    tokens = int(dataset.rows.lengths.sum())
    print(
        f"open {opened - begin:.2f} s, loader {steps - opened:.2f} s, {most / 1e6:.0f} MB of its own "
        f"({most / tokens:.2f} bytes per token), at most "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )


def _own() -> int:
    """Bytes of this process that no file is behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    main()
