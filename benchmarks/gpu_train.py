"""`deltaw train` itself on one GPU: its steps against the clock, captured and not, killed and resumed.

    benchmarks/gpu.sh                                          after gpu.py, whose table it goes on
    python benchmarks/gpu_train.py --models 135m --steps 60
    python benchmarks/gpu_train.py --device cpu --toy          the same code on a tiny model, which measures nothing

A base of gpu.py's shapes with random weights and a byte-level tokenizer is made in a temporary folder, and rows from
the language reference that ships with Python. Rows of the table (arm, model, tokens per step, tokens/s over the later
half of a run, with everything that lies between its steps):

    train              the run file's defaults, then 8,192 tokens per step
    train-uncaptured   as it was before passes were captured: batches of 2,048 tokens, each operation launched by itself
    train-exact        a captured pass against the pass itself on the same filled batch, to the bit
    train-killed       the default run by the command line, killed by SIGKILL half way and resumed, and the loss of its
                       last step beside that of the run that wasn't killed
    profile            of five steps: the kernels' time and number against the clock's; the largest go to stdout

One process does all but the command line: starting one takes a quarter of a minute on a slow host.
"""

import argparse
import collections
import contextlib
import csv
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from benchmarks.gpu import COLUMNS, conditions
from benchmarks.gpu_models import build_model, flops_per_token
from deltaw.config import RunConfig, parse_config
from deltaw.show.progress import Display
from deltaw.training import run as running

Row = dict[str, Any]
CUDA = torch.cuda.is_available()


def make_base(shape: str, folder: Path, device: str) -> None:
    """A base with a tokenizer, and rows.jsonl of texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    build_model(shape, device).save_pretrained(folder / "base")
    texts = [text for _, text in sorted(topics.items())]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet, size = pre_tokenizers.ByteLevel.alphabet(), 500 if shape == "toy" else 8192
    options: dict[str, Any] = {"special_tokens": ["<|end|>"], "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>").save_pretrained(folder / "base")
    draw, rows = random.Random(0), []
    for text in texts:
        while text:
            length = int(min(4000, 60 + draw.expovariate(1 / 700)))
            rows.append(text[:length])
            text = text[length:]
    draw.shuffle(rows)
    lines = (json.dumps({"text": row}) + "\n" for row in rows if row.strip())
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")


def run_file(folder: Path, name: str, **train: Any) -> Row:
    """A run with the defaults of everything but `train`."""
    return {
        "base": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl")},
        "train": train,
        "evaluate": {"general": None, "report": False},
        "output": str(folder / name),
    }


class Clocked:
    """Steps of a run with the clock beside them; `profiled`: five of the last under PyTorch's profiler."""

    def __init__(self, steps: int, *, profiled: bool = False) -> None:
        self.marks: list[tuple[float, float, int, float]] = []  # began, ended, tokens, loss
        self.captured: Any = None
        self._first = steps - 7 if profiled else None
        self.profile: Any = None

    @contextlib.contextmanager
    def around(self, *, capturing: bool) -> Iterator[None]:
        """Inside, `train` takes its steps by the clock."""
        take, capture = running.step, running.captured_on

        def captured_on(*args: Any) -> Any:
            self.captured = capture(*args) if capturing else None
            return self.captured

        def step(*args: Any) -> Any:
            if len(self.marks) == self._first:
                self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profile.__enter__()
            began = time.perf_counter()
            records = take(*args)
            tokens = sum(len(batch.tokens_T) for batch in args[2])
            self.marks.append((began, time.perf_counter(), tokens, records[0].get("loss", float("nan"))))
            if self.profile is not None and len(self.marks) == (self._first or 0) + 5:
                torch.cuda.synchronize()
                self.profile.__exit__(None, None, None)
            return records

        setattr(running, "step", step)  # noqa: B010
        setattr(running, "captured_on", captured_on)  # noqa: B010
        try:
            yield
        finally:
            setattr(running, "step", take)  # noqa: B010
            setattr(running, "captured_on", capture)  # noqa: B010

    def later_half(self) -> list[tuple[float, float, int, float]]:
        """Without what was profiled."""
        return self.marks[len(self.marks) // 2 : self._first]


class Lines(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str = "") -> None:
        self.lines.append(text)


def timed(raw: Mapping[str, Any], *, capturing: bool = True, profiled: bool = False) -> tuple[Row, Clocked]:
    """A row of a run, and its clock."""
    config: RunConfig = parse_config(raw)
    assert config.train.steps
    clock, display = Clocked(config.train.steps, profiled=profiled), Lines()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with clock.around(capturing=capturing):
        running.train(config, replace=True, display=display)
    half = clock.later_half()
    tokens, seconds = sum(mark[2] for mark in half), half[-1][1] - half[0][0]
    inside = statistics.median(ended - began for began, ended, _, _ in half)
    note = f"{len(half)} steps, {1000 * inside:.1f} ms in each at the median; loss {clock.marks[-1][3]:.5f} at last"
    note += "".join(f"; {line}" for line in display.lines if line.startswith(("batches of", "steps aren't", "updates")))
    row: Row = {"tokens": config.train.tokens_per_step, "tokens_per_s": tokens / seconds, "note": note}
    if CUDA:
        row["allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return row, clock


def profile_row(clock: Clocked) -> Row:
    """What five steps were made of."""
    events = [e for e in clock.profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        kinds[event.name[:80]].append(event.device_time / 1000)
    for name, times in sorted(kinds.items(), key=lambda kind: -sum(kind[1]))[:16]:
        print(f"    {sum(times) / 5:8.2f} ms {len(times) // 5:6d}  {name}")
    marks = clock.later_half()
    usual = statistics.median(after[0] - before[0] for before, after in itertools.pairwise(marks))
    busy = sum(map(sum, kinds.values())) / 5
    return {
        "note": f"per step {busy:.1f} ms of kernels in {len(events) // 5} launches; {1000 * usual:.1f} ms by the clock"
    }


def exact_row(folder: Path, device: str) -> Row:
    """Steps on one batch: as it is, recorded, replayed. Of short rows, whose attention has one order of adding."""
    from deltaw.training.batch_size import sized
    from deltaw.training.captured import Captured, Recorder
    from deltaw.training.opening import open_run

    display, raw = Lines(), run_file(folder, "exact", steps=100, device=device)
    raw["data"] |= {"max_length": 100, "too_long": "truncate"}
    opened = sized(open_run(parse_config(raw), display), display)
    learner = opened.learner(display)
    captured = Captured(
        opened.model.forward, learner, opened.longest, display.say, Recorder() if device == "cuda" else None
    )
    batches, _ = next(iter(opened.loader(learner.state)))
    seen = []
    for _ in range(4):
        ran = captured.run(batches, sum(batch.supervised for batch in batches))
        if ran is None:
            return {"note": f"NOT CAPTURED: {captured.why_not}"}
        seen.append((ran.losses, ran.norm, [gradient.clone() for gradient in captured.gradients]))
    captured.release()
    first, *others = seen
    same = [losses == first[0] and norm == first[1] for losses, norm, _ in others]
    gradients = [all(map(torch.equal, gradient, first[2])) for _, _, gradient in others]
    verdict = "the same to the bit" if all(same) and all(gradients) else "NOT THE SAME"
    return {"note": f"{verdict}: losses and norm {same}, gradients {gradients}"}


def killed_row(folder: Path, steps: int, loss: float, **train: Any) -> Row:
    """By the command line: begun, killed, resumed."""
    raw = run_file(folder, "killed", steps=steps, save_every=max(1, steps // 6), **train)
    file, output = folder / "killed.yaml", Path(raw["output"])
    file.write_text(json.dumps(raw), encoding="utf-8")

    def command(*arguments: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", "from deltaw.cli import main; main()", "train", *arguments]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    metrics, began = output / "metrics.jsonl", time.monotonic()
    first = command(str(file), "--replace")
    while first.poll() is None and time.monotonic() - began < 90:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps // 2:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    at = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    second = command(str(output))
    said, _ = second.communicate(timeout=120)
    if second.returncode:
        return {"note": f"RESUMING FAILED: {said[-200:]}"}
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    return {
        "note": f"killed after step {at}, resumed to {last['step']}: loss {last['loss']:.5f}, not killed {loss:.5f}"
    }


def rows_of(shape: str, steps: int, device: str, folder: Path, left: Callable[[], float]) -> Iterator[tuple[str, Row]]:
    """(arm, row) of everything about one shape, as long as time is left."""
    make_base(shape, folder, device)
    large = 8192 if shape != "toy" else 1024
    given = {"device": device}
    yield "train-exact", exact_row(folder, device)
    row, clock = timed(run_file(folder, "plain", steps=steps, **given), profiled=CUDA)
    yield "train", row
    if CUDA:
        yield "profile", profile_row(clock)
    yield "train", timed(run_file(folder, "large", steps=steps, tokens_per_step=large, **given))[0]
    if left() > 30:
        before = {**given, "tokens_per_batch": 2048}
        yield (
            "train-uncaptured",
            timed(run_file(folder, "before", steps=max(4, steps // 4), **before), capturing=False)[0],
        )
    if left() > 75 and shape in ("135m", "toy"):
        yield "train-killed", killed_row(folder, steps, clock.marks[-1][3], **given)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=None, help="135m,1b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a tiny model: tests this script, measures nothing")
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not CUDA:
        print("no GPU here: nothing was measured (--device cpu --toy tests the script)", file=sys.stderr)
        return 2
    end = time.monotonic() + options.budget
    path = Path(os.environ.get("OUT") or Path(__file__).parent) / "gpu.csv"
    new = not path.exists()
    fixed = conditions(options.device)
    with path.open("a", newline="", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        if new:
            table.writeheader()
        for shape in options.models or (["toy"] if options.toy else ["135m", "1b"]):
            if end - time.monotonic() < 45:
                print(f"{shape}: skipped, out of time")
                continue
            try:
                there = Path(folder) / shape
                for arm, row in rows_of(shape, options.steps, options.device, there, lambda: end - time.monotonic()):
                    speed = row.get("tokens_per_s")
                    shown = {"tokens_per_s": "" if speed is None else f"{speed:.1f}"}
                    table.writerow({**row, **fixed, "arm": arm, "model": shape, **shown})
                    file.flush()
                    rate = (
                        ""
                        if speed is None
                        else f"{speed:,.0f} tokens/s, {speed * flops_per_token(shape) / 1e12:.1f} TFLOP/s  "
                    )
                    print(f"{arm:17} {shape:5} {row.get('tokens', ''):>6}  {rate}{row['note']}", flush=True)
            except Exception as error:
                traceback.print_exc()
                table.writerow({**fixed, "arm": "train", "model": shape, "note": f"error: {error!s:.200}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
