"""Generation by two trees, or by the two caches of this one, in turns: how many times as long the second takes.

    python benchmarks/generation.py                            slots of our own against transformers' caches
    python benchmarks/generation.py --old ../before            this tree against that one (with --adapter, an older one)
    python benchmarks/generation.py --adapter runs/demo        with that adapter instead of a fresh one

A batch of 128 prompts of 3 to 60 tokens, 16 new tokens each, and one prompt of 40 new tokens. Each side is a process of
its own, and they take turns, so that a machine that others share slows both. Figures are the processes' own seconds
(CPU time on one thread) beside wall time; what each side answered is compared, too: near ties may differ.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
ROUNDS = {"one stream": 5, "128 prompts": 3}
WORDS = ["hello", "there", "cat", "banana", "telephone", "window", "extraordinary", "mistake", "running", "thunder"]
BASE = "builtin:smollm2-135m"


def work(adapter: str, cache: str) -> None:
    """One side: opens the model, then does what standard input says, and answers with times."""
    from deltaw.model import open_model

    try:
        generation: Any = import_module("deltaw.base.generate")  # a tree from before there was an engine
        sampling: Any = generation.Sampling
    except ImportError:
        generation, sampling = (
            import_module("deltaw.generate.engine"),
            import_module("deltaw.generate.sampling").Sampling,
        )

    opened = open_model(adapter or BASE)
    model = opened.base.model
    if not adapter:
        from deltaw.adapter.attach import attach
        from deltaw.config import AdapterSpec

        attach(model, AdapterSpec(rank=16, alpha=32))
    if cache == "theirs":
        generation.Slots.hold = staticmethod(lambda model: False)
    texts = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(1 + i % 12)) for i in range(128)]
    prompts = [opened.renderer.prompt_ids(text) for text in texts]
    list(generation.stream(model, prompts[0], sampling(max_new_tokens=2), set()))
    print("ready", flush=True)
    for line in sys.stdin:
        began, used = time.perf_counter(), time.process_time()
        if line.strip() == "one stream":
            answers = [list(generation.stream(model, prompts[3], sampling(max_new_tokens=40), set()))]
        else:
            answers = generation.generate(model, prompts, sampling(max_new_tokens=16), set())
        seconds = time.perf_counter() - began, time.process_time() - used
        print(json.dumps([*seconds, hashlib.sha256(json.dumps(answers).encode()).hexdigest()]), flush=True)


def start(tree: Path, adapter: str, cache: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).resolve()), "--side", cache, "--adapter", adapter]
    there = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(command, cwd=tree, env=there, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(side: "subprocess.Popen[str]", what: str) -> list[Any]:
    assert side.stdin is not None and side.stdout is not None
    side.stdin.write(what + "\n")
    side.stdin.flush()
    answer: list[Any] = json.loads(side.stdout.readline())
    return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--old", default="")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--side", default="")
    given = parser.parse_args()
    if given.side:
        work(given.adapter, given.side)
        return
    adapter = str(Path(given.adapter).resolve()) if given.adapter else ""
    second = start(Path(given.old).resolve(), adapter, "ours") if given.old else start(HERE, adapter, "theirs")
    sides = [start(HERE, adapter, "ours"), second]
    for side in sides:
        while side.stdout is not None and "ready" not in side.stdout.readline():
            if side.poll() is not None:
                sys.exit("a side didn't start")
    print(f"this tree, slots; against {given.old or 'its other cache'}; seconds of CPU time (of wall time)")
    for what, rounds in ROUNDS.items():
        pairs = [[ask(side, what) for side in sides] for _ in range(rounds)]
        ours, theirs = ([statistics.median(pair[side][i] for pair in pairs) for i in (1, 0)] for side in (0, 1))
        ratio = statistics.median(pair[1][1] / pair[0][1] for pair in pairs)
        alike = "alike" if all(pair[0][2] == pair[1][2] for pair in pairs) else "NOT alike"
        print(
            f"{what:12} {ours[0]:6.2f} ({ours[1]:.2f}) against {theirs[0]:6.2f} ({theirs[1]:.2f}): "
            f"{ratio:.2f} times as long; answers {alike}",
            flush=True,
        )
    for side in sides:
        assert side.stdin is not None
        side.stdin.close()
        side.wait()


if __name__ == "__main__":
    main()
