"""Prefixes computed once: training steps of deltaw with and without, in turns, on one adapted base.

    python -m benchmarks.shared_prefix [--record] [--steps 6] [system chats words trl sweep]

    system   16 chats a step: a system prompt of 200 tokens, the same for all, and 40 tokens of their own
    chats    the benchmark's chats (workloads.py): headlines behind one template
    words    the demo's rows, which share nothing: what looking for prefixes costs
    trl      the first of these beside TRL's SFTTrainer with PEFT (trainers.py), from the same factors on the same rows,
             each in a process of its own, in turns; the first losses are compared before anything is shown
    sweep    what a prefix saves by its length: a prefix of 8 to 64 tokens before 30 of a row's own

Seconds are those of this process's CPU where `--cpu` is given, for a machine that others use; else of the clock. A step
is packing, forward, backward and update. Tokens are those of the rows, whether computed or not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Measured, note
from benchmarks.workloads import BASE, Step, tokens, workload
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import open_base
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.config.train import PLAIN_BATCH
from deltaw.data import sharing
from deltaw.data.example import Example
from deltaw.data.loader import fill
from deltaw.data.pack import pack
from deltaw.data.sharing import Shared
from deltaw.training.optim import make_optimizer

SECTION = "Prefixes computed once"
WANTED, FASTER = {"system": 3.0, "chats": 1.3}, 6.0
CLOSE = 0.01  # of the first losses, between two stacks in one dtype
NAMES = {
    "system": "chats of 40 tokens behind a system prompt of 200, with against without",
    "chats": "the benchmark's chats, with against without",
    "words": "the demo's words, which share nothing, with against without",
}


def unshared(step: Step) -> list[Batch]:
    """A step as it is where nothing is shared."""
    lengths = [len(example.tokens) for example in step]
    return [pack([step[n] for n in group]) for group in fill(range(len(step)), lengths, PLAIN_BATCH)]


def shared(step: Step) -> list[Batch]:
    """A step as a run takes it."""
    found = Shared.of(step)
    return [part.pack() for part in found.batches(PLAIN_BATCH)] if found else unshared(step)


def behind(prefix: int, own: int, rows: int, seed: int = 0) -> Step:
    """Rows of random tokens that begin alike; half of a row's own tokens are trained."""
    random = np.random.RandomState(seed)
    alike = random.randint(100, 40_000, prefix)
    mask = np.arange(prefix + own) >= prefix + own // 2
    rows_of = [np.concatenate([alike, random.randint(100, 40_000, own)]).astype(np.int32) for _ in range(rows)]
    return [Example(row, mask, f"row:{number}") for number, row in enumerate(rows_of)]


class Arms:
    """One adapted base, on which steps are taken both ways in turns."""

    def __init__(self, clock: Callable[[], float], factors: Path | None = None) -> None:
        self.forward: Forward = plan_forward(open_base(BASE).model)
        attached = attach(self.forward.model, Adapter.load(factors) if factors else AdapterSpec(rank=16, alpha=32))
        self.optimizer, self._clock, self.losses = make_optimizer(attached, TrainConfig()), clock, list[float]()

    def seconds(self, step: Step, batches: Callable[[Step], list[Batch]]) -> float:
        """Of one step."""
        began, laid, total = self._clock(), batches(step), 0.0
        count = sum(batch.supervised for batch in laid)
        for batch in laid:
            loss = self.forward.loss(batch)[0] / max(1, count)
            loss.backward()
            total += float(loss.detach())
        self.losses.append(total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._clock() - began

    def ratio(self, steps: list[Step]) -> tuple[float, float, float]:
        """(how many times as fast with, tokens/s with, tokens/s without), by the median over the steps."""
        rates: dict[str, list[float]] = {"with": [], "without": []}
        ways = {"with": shared, "without": unshared}
        for number, step in enumerate(steps):
            for name in sorted(ways, reverse=bool(number % 2)):
                taken = self.seconds(step, ways[name])
                if number:  # the first warms up
                    rates[name].append(tokens(step) / taken)
        fast, slow = (statistics.median(rates[name]) for name in ("with", "without"))
        return fast / slow, fast, slow


def one_arm(arm: str, factors: Path, count: int) -> dict[str, Any]:
    """An arm in this process: the seconds of its steps, and its first loss."""
    steps = [behind(200, 40, 16, seed) for seed in range(count)]
    if arm == "deltaw":
        arms = Arms(time.perf_counter, factors)
        return {"seconds": [arms.seconds(step, shared) for step in steps], "loss": arms.losses[0]}
    from benchmarks.trainers import Clock, train
    from deltaw.base.dtype import fast_dtype

    clock = Clock(lambda: None, lambda: None)
    loss = train("trl", factors, fast_dtype(), steps, clock)
    return {"seconds": clock.seconds, "loss": loss}


def beside_trl(count: int, rounds: int, record: bool) -> None:
    """Both arms, in turns."""
    from benchmarks.loops import save_factors

    told: dict[str, list[dict[str, Any]]] = {"deltaw": [], "trl": []}
    with tempfile.TemporaryDirectory() as made:
        factors = save_factors(Path(made) / "factors")
        for _ in range(rounds):
            for arm, runs in told.items():
                call = [sys.executable, "-m", "benchmarks.shared_prefix", "--steps", str(count - 1)]
                done = subprocess.run(
                    [*call, "--one", arm, str(factors)], stdout=subprocess.PIPE, text=True, check=True
                )
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    losses = {arm: runs[0]["loss"] for arm, runs in told.items()}
    assert abs(losses["deltaw"] - losses["trl"]) < CLOSE * losses["trl"], losses
    rates = {
        arm: 16 * 240 / statistics.median(second for run in runs for second in run["seconds"][1:])
        for arm, runs in told.items()
    }
    ratio = rates["deltaw"] / rates["trl"]
    print(
        f"beside TRL: {ratio:.2f} x, {rates['deltaw']:.0f} against {rates['trl']:.0f} tokens/s; first losses {losses}"
    )
    if record:
        name = "chats of 40 tokens behind a system prompt of 200, tokens per second of TRL's"
        note(Measured(SECTION, name, round(ratio, 2), bound=FASTER))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("what", nargs="*", default=["system", "chats", "words", "trl"])
    asked.add_argument("--steps", type=int, default=6)
    asked.add_argument("--cpu", action="store_true", help="seconds of this process's CPU")
    asked.add_argument("--rounds", type=int, default=2, help="turns of each arm beside TRL")
    asked.add_argument("--record", action="store_true")
    asked.add_argument("--one", nargs=2, metavar=("ARM", "FACTORS"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.one:
        print(json.dumps(one_arm(options.one[0], Path(options.one[1]), options.steps + 1)))
        return
    if "trl" in options.what:
        beside_trl(options.steps + 1, options.rounds, options.record)
        options.what.remove("trl")
    arms = Arms(time.process_time if options.cpu else time.perf_counter) if options.what else None
    for what in options.what:
        assert arms is not None
        if what == "sweep":
            sharing.LEAST, sharing.WORTH = 4, 0.0
            for prefix in (6, 8, 12, 16, 32):
                steps = [behind(prefix, 30, 32, seed) for seed in range(options.steps + 1)]
                ratio, fast, slow = arms.ratio(steps)
                saved = 31 * prefix / (32 * (prefix + 30))
                print(f"prefix {prefix}: {saved:.0%} saved, {ratio:.2f} x, {fast:.0f} against {slow:.0f} tokens/s")
            continue
        count = options.steps + 1
        steps = [behind(200, 40, 16, n) for n in range(count)] if what == "system" else workload(what, count)
        ratio, fast, slow = arms.ratio(steps)
        print(f"{what}: {ratio:.2f} x, {fast:.0f} against {slow:.0f} tokens/s", flush=True)
        if options.record:
            note(Measured(SECTION, NAMES[what], round(ratio, 2), bound=WANTED.get(what)))


if __name__ == "__main__":
    main()
