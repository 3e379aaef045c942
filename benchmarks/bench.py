"""The benchmark: correctness, then speed, then the page. `make bench`, at most fifteen minutes on two cores.

    python -m benchmarks.bench [--only dense,chats] [--dtype D] [--quick] [--minutes 15]

First the gates (gates.py): nothing is timed where deltaw is not right. Then arms in fresh processes, in turns, three
rounds, in the dtype that deltaw chooses on this machine; beside them what needs one process only (torch.compile takes
minutes), PEFT against deltaw in the other dtype, the real command's start, and deltaw without each of its techniques.

The jobs stand in order of importance. The first round always runs; after it a job is begun only if it is expected to
end within the time, and the page says what was left out. What a job takes is guessed at first, measured from then on.
Use an otherwise idle machine: another program on one core can cost any arm two thirds of its speed.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report, results
from benchmarks.results import Row
from deltaw.show.text import clock

ROOT = Path(__file__).parents[1]
TIMED = ("dense", "words", "chats")
PEER = {"dense": "peft", "words": "trl", "chats": "trl", "long": "peft"}
STEPS = {"dense": (1, 2), "words": (1, 2), "chats": (1, 2), "long": (1, 1)}  # warm, timed: the same for every arm
TECHNIQUES = ("packing", "loss", "norm", "attention", "mlp")
ROUNDS = 3
TRAIN = "deltaw train"
WITHOUT_ROWS = ("data.eval=null", "evaluate.metrics=[]", "train.sample_every=null")  # the demo's, and what needs them
# For the first guess of how long a job takes: tokens per step, tokens/s of an arm, seconds to get going.
TOKENS = {"dense": 2048, "words": 768, "chats": 860, "long": 3600}
RATES = {"deltaw": 400, "peft": 200, "peft-trainer": 190, "peft-compile": 280, "trl": 140, "trl-free": 140}
START, COMPILE, GATES = 8, 130, 100


@dataclass(frozen=True)
class Job:
    """One process to be. `must`: it runs however late it is."""

    arm: str
    workload: str
    dtype: str
    without: str = ""
    round: int = 1
    must: bool = False

    @property
    def name(self) -> str:
        tail = f" without {self.without}" if self.without else ""
        return f"{self.arm} on {self.workload}, {self.dtype}{tail}"

    def guess(self) -> float:
        """Seconds that it may take."""
        steps = sum(STEPS[self.workload]) * TOKENS[self.workload] / RATES.get(self.arm, 2000)
        steps *= 4 if self.without else 1  # more of them, and the whole beside it
        return START + steps * (1.5 if self.dtype == "float32" else 1) + COMPILE * (self.arm == "peft-compile")


def plan(only: Sequence[str], dtype: str, other: str | None, *, quick: bool = False) -> list[Job]:
    """The jobs in order of importance: all in `dtype`, and deltaw against PEFT in `other`, if it is any use."""
    main = [name for name in TIMED if name in only]

    def one_round(number: int) -> Iterable[Job]:
        for name in main:
            arms = ("gemm", "deltaw", PEER[name]) if name == "dense" or number == 1 else ("deltaw", PEER[name])
            yield from (Job(arm, name, dtype, round=number, must=number == 1) for arm in arms)

    jobs = list(one_round(1))
    if quick:
        return jobs
    pair = [Job(arm, "dense", other) for arm in ("deltaw", "peft", "gemm")] if other and "dense" in only else []
    jobs += pair if other == "float32" else []  # a figure to reach; bfloat16 where it is slow is not
    if "words" in only:
        jobs += [Job(TRAIN, "words", dtype, round=number) for number in (1, 2)]
    if "dense" in only:
        jobs.append(Job("peft-compile", "dense", dtype))
    for number in range(2, ROUNDS + 1):
        jobs += one_round(number)
    for name in ("chats", "dense"):
        jobs += [Job("deltaw", name, dtype, without) for without in TECHNIQUES if name in only]
    jobs += pair if other != "float32" else []
    jobs += [Job("trl-free", name, dtype) for name in ("words", "chats") if name in only]
    jobs += [Job("peft-trainer", "chats", dtype)] if "chats" in only else []
    return jobs + [Job(arm, "long", dtype) for arm in ("gemm", "deltaw", "peft") if "long" in only]


def run(jobs: Sequence[Job], seconds: float, *, quick: bool) -> tuple[list[Row], list[Job]]:
    """(one row per process, the jobs for which no time was left)."""
    began, rows, left_out = time.monotonic(), [], []
    taken: dict[Job, float] = {}
    machine, flags = results.cpu(), settings()

    def expected(job: Job) -> float:
        kind = (job.arm, job.workload, bool(job.without))
        like = [t for other, t in taken.items() if (other.arm, other.workload, bool(other.without)) == kind]
        return max(like) if like else job.guess()

    for number, job in enumerate(jobs):
        gone = time.monotonic() - began
        if not job.must and gone + expected(job) > seconds:
            left_out.append(job)
            continue
        rest = min(sum(map(expected, jobs[number:])), max(seconds - gone, expected(job)))
        print(f"[{number + 1}/{len(jobs)}] {job.name}; at most {clock(rest)} left", file=sys.stderr, flush=True)
        start = time.monotonic()
        figures = first_step(job) if job.arm == TRAIN else arm(job, quick)
        taken[job] = time.monotonic() - start
        date = datetime.date.today().isoformat()
        more = {"date": date, "machine": machine, "round": job.round, "flags": flags, "arm": job.arm}
        rows.append(results.flat(figures, workload=job.workload, dtype=job.dtype, without=job.without, **more))
    return rows, left_out


def arm(job: Job, quick: bool) -> dict[str, object]:
    """Run one process of arms.py; {"error": …} where it failed."""
    warm, steps = (0, 1) if quick else STEPS[job.workload]
    steps *= 2 if job.without else 1  # a smaller difference
    command = [sys.executable, "-m", "benchmarks.arms", job.arm, job.workload, "--dtype", job.dtype, "--json"]
    command += ["--warm", str(warm), "--steps", str(steps), *(["--without", job.without] if job.without else [])]
    with tempfile.TemporaryDirectory() as cache:  # nothing that an earlier run has compiled
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    figures: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return figures


def first_step(job: Job) -> dict[str, object]:
    """Seconds from starting `deltaw train` to the first line of metrics.jsonl: the demo's run without held-out rows."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        overrides = [*WITHOUT_ROWS, "train.steps=2", f"train.dtype={job.dtype}"]
        command = [str(Path(sys.executable).with_name("deltaw")), "train", "recipes/demo.yaml", f"output={output}"]
        began = time.monotonic()
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*command, *overrides, "--quiet"], cwd=ROOT, **pipes) as process:
            metrics, seen = output / "metrics.jsonl", 0.0
            while not seen and process.poll() is None:
                seen = time.monotonic() - began if metrics.is_file() and metrics.stat().st_size else 0.0
                time.sleep(0.02)
            _, said = process.communicate()
    if not seen or process.returncode:
        return {"error": (said.strip().splitlines() or ["no first step was seen"])[-1][:300]}
    return {"first_step_s": seen, "path": "recipes/demo.yaml without held-out rows"}


def dtypes() -> tuple[str, str | None]:
    """(the dtype that deltaw chooses on this machine, the other unless it is hopelessly slow here).

    Where bfloat16 is emulated, a product was measured to take up to 499 times as long: a step would take an hour.
    """
    import torch

    from deltaw.base.dtype import fast_dtype

    if fast_dtype() == torch.bfloat16:
        return "bfloat16", "float32"
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, two = (torch.ones(shape, dtype=dtype) for shape in ((8, 576), (576, 576)))
        one @ two
        began = time.perf_counter()
        one @ two
        times[dtype] = time.perf_counter() - began
    return "float32", "bfloat16" if times[torch.bfloat16] < 8 * times[torch.float32] else None


def settings() -> str:
    """Environment variables that change how fast a product runs."""
    wanted = ("OMP_", "GOMP_", "MKL_", "KMP_", "ONEDNN_", "DNNL_", "TORCHINDUCTOR_")
    return " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(wanted))


def show(rows: Sequence[Row], dtype: str) -> None:
    """The targets, as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "target", "measured", "met", "short by")
    for target in results.targets(results.figures(rows), dtype):
        table.add_row(*report.shown(target))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Correctness, speed, and the page.")
    parser.add_argument("--only", default="dense,words,chats,long", help="workloads, with commas between")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="the one deltaw chooses here without it")
    parser.add_argument("--minutes", type=float, default=15, help="begin nothing that would end later (gates included)")
    parser.add_argument("--quick", action="store_true", help="one round of one step each: to see that it runs")
    parser.add_argument("--out", type=Path, help="where benchmarks/ and docs/ are written; build/bench with --quick")
    asked = parser.parse_args()
    only = asked.only.split(",")
    if unknown := sorted(set(only) - set(STEPS)):
        parser.error(f"no workload {', '.join(unknown)}; there are: {', '.join(STEPS)}")
    began = time.monotonic()
    dtype, other = dtypes()
    if asked.dtype and asked.dtype != dtype:
        dtype, other = asked.dtype, dtype
    gated = [name for name in TIMED if name in only]
    print(f"gates on {', '.join(gated)}; about {clock(GATES)}", file=sys.stderr, flush=True)
    gates = [sys.executable, "-m", "benchmarks.gates", "--only", ",".join(gated)]
    gates += ["--dtype", dtype] if other is None else []
    if gated and subprocess.run(gates, cwd=ROOT).returncode:
        raise SystemExit("a gate failed: nothing was timed")
    jobs = plan(only, dtype, other, quick=asked.quick)
    rows, left_out = run(jobs, asked.minutes * 60 - (time.monotonic() - began), quick=asked.quick)
    rows += [_left_out(job) for job in left_out]
    out = asked.out or (ROOT / "build" / "bench" if asked.quick else ROOT)
    (out / "benchmarks").mkdir(parents=True, exist_ok=True)
    results.write_rows(out / "benchmarks" / "results.csv", rows)
    report.write(rows, out)
    show(rows, dtype)
    print(f"{clock(time.monotonic() - began)}; {out / 'benchmarks/results.csv'}, {out / 'docs/performance.md'}")


def _left_out(job: Job) -> Row:
    """A row that says so, for the page."""
    values = {"arm": job.arm, "workload": job.workload, "dtype": job.dtype, "without": job.without}
    return results.flat({}, **values, round=job.round, error=f"round {job.round}: no time was left for it")


if __name__ == "__main__":
    main()
