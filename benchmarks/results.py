"""What was measured, as rows: one per process, in benchmarks/results.csv, and the arithmetic on them.

A row is flat text, so that the file can be read by eye and by any other tool; the rate of every timed step is in it
(`rates`), so medians, quartiles and the slowest steps are worked out here and nowhere else. Rounds are pooled: a
`Figure` is one arm on one workload over all its processes.

    share of the limit = tokens/s / (GEMM rate / 4 (N_blocks + f N_head))

is a plain ratio here, since the arm `gemm` reports the limit in tokens/s.
"""

import csv
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]
PACKAGES = ("python", "torch", "transformers", "peft", "trl", "deltaw")
COLUMNS = (
    "date", "machine", "threads", "round", "arm", "workload", "dtype", "without", "warm",
    "tokens_per_s", "supervised_per_s", "p95_step_s", "first_step_s", "compile_s", "peak_bytes", "grown_bytes",
    "loss", "gflops", "of_whole", "rates", "step_s", "path", *PACKAGES, "flags", "error",
)  # fmt: skip


def flat(figures: Mapping[str, Any], **more: Any) -> Row:
    """A process's figures (arms.py) as a row; `more` is what only the caller knows (date, machine, round)."""
    warm = figures.get("warm", 0)
    rates, seconds = figures.get("tokens_per_s", []), figures.get("seconds", [])[warm:]
    values = {**figures, **more, "rates": " ".join(f"{rate:.2f}" for rate in rates)}
    values["step_s"] = " ".join(f"{second:.4f}" for second in seconds)
    values["tokens_per_s"] = statistics.median(rates) if rates else ""
    values["of_whole"] = statistics.median(figures["of_whole"]) if figures.get("of_whole") else ""
    if seconds:
        values["supervised_per_s"] = sum(figures["supervised"][warm:]) / sum(seconds)
        values["p95_step_s"] = p95(seconds)
    values["loss"] = figures["losses"][0] if figures.get("losses") else ""
    return {name: _text(values.get(name)) for name in COLUMNS}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The whole file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Key:
    """What is compared: one arm on one workload."""

    arm: str
    workload: str
    dtype: str
    without: str = ""


@dataclass(frozen=True)
class Figure:
    """One arm on one workload, pooled over `processes`. Rates in non-padding tokens/s; 0 where there is none.

    `of_whole`: its rate over that of the whole deltaw, which took the same steps in turns in the same process.
    """

    processes: int
    low: float
    middle: float
    high: float
    supervised: float
    p95: float
    peak: float
    first_step: float
    compile: float
    loss: float
    gflops: float
    of_whole: float


def figures(rows: Sequence[Row]) -> dict[Key, Figure]:
    """The rows that worked, pooled."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if not row["error"]:
            found.setdefault(Key(row["arm"], row["workload"], row["dtype"], row["without"]), []).append(row)
    return {key: _pool(group) for key, group in found.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value, itself three times."""
    if len(values) < 2:
        return (values[0],) * 3 if values else (0.0,) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def p95(seconds: Sequence[float]) -> float:
    """The 95th percentile; of few values, close to the largest."""
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]


def _pool(rows: Sequence[Row]) -> Figure:
    def pooled(name: str) -> list[float]:
        return [float(word) for row in rows for word in row[name].split()]

    def middle(name: str) -> float:
        values = pooled(name)
        return statistics.median(values) if values else 0.0

    seconds = pooled("step_s")
    return Figure(
        len(rows),
        *quartiles(pooled("rates")),
        middle("supervised_per_s"),
        p95(seconds) if seconds else 0.0,
        middle("peak_bytes"),
        middle("first_step_s"),
        middle("compile_s"),
        middle("loss"),
        middle("gflops"),
        middle("of_whole"),
    )


@dataclass(frozen=True)
class Target:
    """A figure to reach. `measured` is None where an arm it needs is missing."""

    name: str
    bound: float
    measured: float | None
    at_most: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def shortfall(self) -> str:
        """How far from the bound, in percent of it; empty where it is met or was not measured."""
        return "" if self.met is not False else f"{abs(self.measured / self.bound - 1):.0%}"  # type: ignore[operator]


def targets(found: Mapping[Key, Figure], dtype: str) -> list[Target]:
    """The figures that issue 3 names, from what was measured; `dtype` is the one that deltaw chose here."""

    def ratio(one: Key, others: Sequence[Key], value: Callable[[Figure], float]) -> float | None:
        have = [value(found[other]) for other in others if other in found]
        return value(found[one]) / max(have) if one in found and have and max(have) else None

    def rate(figure: Figure) -> float:
        return figure.middle

    dense = Key("deltaw", "dense", dtype)
    train = found.get(Key("deltaw train", "words", dtype))
    listed = [
        Target("dense, against PEFT eager", 2.5, ratio(dense, [Key("peft", "dense", dtype)], rate)),
        Target("dense, against PEFT compiled", 1.8, ratio(dense, [Key("peft-compile", "dense", dtype)], rate)),
        Target("dense, share of the GEMM limit", 0.65, ratio(dense, [Key("gemm", "dense", dtype)], rate), unit="%"),
    ]
    for name in ("words", "chats"):
        peers = [Key("trl", name, dtype), Key("trl-free", name, dtype)]  # the stronger one counts
        listed.append(Target(f"{name}, against TRL + PEFT", 4.0, ratio(Key("deltaw", name, dtype), peers, rate)))
    memory = ratio(dense, [Key("peft", "dense", dtype)], lambda figure: figure.peak)
    # A figure for machines where float32 is the choice; elsewhere both arms stand in the table of arms.
    wide = [Target("dense in float32, against PEFT", 1.5, listed[0].measured)] if dtype == "float32" else []
    return [
        *listed,
        Target("dense, peak memory of PEFT's", 0.5, memory, at_most=True),
        Target("deltaw train, start to first step", 10.0, train.first_step if train else None, at_most=True, unit="s"),
        *wide,
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def cpu() -> str:
    """The machine's name, as far as it may be printed."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
