"""Right before fast: what must hold before anything is timed.

    python -m benchmarks.gates [--only dense,chats] [--dtype D] [--without TECHNIQUE]    exits 1 when a gate fails

The truth is PEFT in float32. On the first step of each workload:

    float32     |loss − truth| ≤ 1e-5 truth                   cosine of all dA, and of all dB, with the truth's > 0.999
    bfloat16    |loss − truth| ≤ 1e-3 + 3 |PEFT − truth|      the same, or above PEFT's own where that is lower

One bfloat16 implementation can't be held to another within 1e-3: PEFT itself is off the truth by 0.002 (dense, 2044
labels) to 0.1 nats (chats, 32 labels, two kinds of token: their errors are one draw, not 32). So deltaw gets PEFT's own
error as its budget, both as root mean squares over `STEPS` steps, three times, since a draw may be small by luck: over
four seeds of chats the ratio of the two errors went from 0.8 to 2. Where the arithmetic is wrong, float32 shows it.

The worst single tensor's cosine is printed, beside PEFT's own worst; small gradients of a few tensors are mostly
rounding in either.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loops import TECHNIQUES, Loop, deltaw_loop, peft_loop, save_factors
from benchmarks.workloads import workload

STEPS = {"dense": 1, "words": 3, "chats": 3}  # whose losses are compared
COSINE, EXACT, ROUNDED, BUDGET = 0.999, 1e-5, 1e-3, 3


@dataclass(frozen=True)
class Seen:
    """What a loop gives before any update: the losses of the steps, and the gradients of the first."""

    losses: list[float]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Gate:
    """One comparison: `value` must be `at_most` or `at_least` the bound."""

    workload: str
    dtype: str
    what: str
    value: float
    bound: float
    at_most: bool
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound  # NaN passes neither


def cosine(one: Mapping[str, Tensor], two: Mapping[str, Tensor], half: str) -> float:
    """The cosine of all dA ("A") or all dB ("B") laid end to end, in float64."""
    names = [name for name in two if name.endswith("." + half)]
    a, b = (torch.cat([side[name].double().flatten() for name in names]) for side in (one, two))
    return float(a @ b / (a.norm() * b.norm()))


def worst(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> tuple[float, str]:
    """The lowest cosine of a single tensor, and its name."""
    pairs = ((one[name].double().flatten(), two[name].double().flatten(), name) for name in two)
    return min((float(a @ b / (a.norm() * b.norm())), name) for a, b, name in pairs)


def off(seen: Seen, truth: Seen) -> float:
    """Root mean square of the losses' differences."""
    squares = [(a - b) ** 2 for a, b in zip(seen.losses, truth.losses, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def compare(name: str, dtype: str, deltaw: Seen, peft: Seen, truth: Seen) -> list[Gate]:
    """The gates of one workload in one dtype; in float32 `peft` is the truth."""
    budget = EXACT * max(truth.losses) if peft is truth else ROUNDED + BUDGET * off(peft, truth)
    note = "" if peft is truth else f"PEFT's own: {off(peft, truth):.4f}"
    gates = [Gate(name, dtype, "loss off by", off(deltaw, truth), budget, True, note)]
    for half in ("A", "B"):
        value = cosine(deltaw.gradients, truth.gradients, half)
        own = cosine(peft.gradients, truth.gradients, half)
        notes = [] if peft is truth else [f"PEFT's own: {own:.7f}"]
        for who, seen in (("worst", deltaw), ("PEFT's", peft)):
            if seen is not truth:
                lowest, tensor = worst(
                    {k: v for k, v in seen.gradients.items() if k.endswith(half)},
                    {k: v for k, v in truth.gradients.items() if k.endswith(half)},
                )
                notes.append(f"{who} {lowest:.4f} {tensor.removeprefix('model.layers.')}")
        gates.append(Gate(name, dtype, f"cosine of d{half}", value, min(COSINE, own), False, ", ".join(notes)))
    return gates


def look(loop: Loop, names: Sequence[str]) -> dict[str, Seen]:
    """Run `loop` on each workload without updating it."""
    found = {}
    for name in names:
        first, *rest = workload(name, STEPS[name])
        losses = [loop.backward(first)]
        gradients = loop.gradients()
        loop.optimizer.zero_grad()
        found[name] = Seen([*losses, *map(loop.evaluate, rest)], gradients)
    return found


def run(
    names: Sequence[str], dtypes: Sequence[str] = ("float32", "bfloat16"), without: str | None = None
) -> list[Gate]:
    """Every gate of the workloads in the dtypes; `without` a technique to see what it costs in digits."""
    gates = []
    with tempfile.TemporaryDirectory() as folder:
        factors = save_factors(Path(folder))
        truth = look(peft_loop(factors, torch.float32), names)
        for dtype in dtypes:
            number = getattr(torch, dtype)
            peft = truth if dtype == "float32" else look(peft_loop(factors, number), names)
            deltaw = look(deltaw_loop(factors, number, without=without), names)
            for name in names:
                gates += compare(name, dtype, deltaw[name], peft[name], truth[name])
    return gates


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description="Correctness before timing.")
    parser.add_argument("--only", default=",".join(STEPS), help="workloads, with commas between")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one dtype; both without it")
    parser.add_argument("--without", choices=TECHNIQUES, help="deltaw without this technique")
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := sorted(set(names) - set(STEPS)):
        parser.error(f"no gate for {', '.join(unknown)}; there are: {', '.join(STEPS)}")
    dtypes = (asked.dtype,) if asked.dtype else ("float32", "bfloat16")
    gates = run(names, dtypes, asked.without)
    for gate in gates:
        sign, verdict = ("≤" if gate.at_most else "≥"), "passed" if gate.passed else "FAILED"
        figures = f"{gate.value:.7f} {sign} {gate.bound:.7f}"
        print(f"{verdict} {gate.workload:6} {gate.dtype:9} {gate.what:12} {figures}  {gate.note}", flush=True)
    raise SystemExit(not all(gate.passed for gate in gates))


if __name__ == "__main__":
    main()
