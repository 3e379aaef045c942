"""`deltaw train` itself on one GPU: its steps against the clock, captured and not, killed and resumed.

    benchmarks/gpu.sh                                          after gpu.py, whose table it goes on
    python benchmarks/gpu_train.py --models 135m --steps 48
    python benchmarks/gpu_train.py --device cpu --toy          the same code on a tiny model, which measures nothing

A base of gpu.py's shapes with random weights and a tokenizer of words is made in a temporary folder, and rows from the
language reference that ships with Python, in documents of the lengths that gpu.py's have. Rows of the table (arm,
model, tokens per step, tokens/s):

    train              8,192 tokens per step, and then the run file's defaults: from the beginning of a step to that of
                       the next, over the later half of a run, with everything that lies between. Steps that met or
                       recorded a new size aren't counted; their number is in the note. No evaluation and no checkpoint
                       lies between these steps: they come every so many steps, as often as a run file asks for them
    loop               the same steps on the same batches in gpu.py's loop: passes, clip, update and nothing else
    profile            of five steps: the kernels' time and number against the clock's; the largest go to stdout
    train-exact        a captured pass against the pass itself on the same filled batch, to the bit
    train-killed       the default run by the command line, killed by SIGKILL half way and resumed, and the loss of its
                       last step beside that of the run that wasn't killed
    train-uncaptured   as it was before passes were captured: batches of 2,048 tokens, each operation launched by itself

One process does all but the command line: starting one takes a quarter of a minute on a slow host.
"""

import argparse
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
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import COLUMNS, conditions
from benchmarks.gpu_arms import Steps
from benchmarks.gpu_models import SHAPES, build_model, flops_per_token, free_memory, longest_of, reference
from benchmarks.gpu_timed import Clock, made_of
from deltaw.config import RunConfig, config_of, parse_config
from deltaw.show.progress import Display
from deltaw.training import run as running

Row = dict[str, Any]
CUDA = torch.cuda.is_available()


def make_base(shape: str, folder: Path, device: str, tokens: int) -> None:
    """A base with a tokenizer, and rows.jsonl of texts of so many tokens at least. A token of a text is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    build_model(shape, device).save_pretrained(folder / "base")
    free_memory()
    vocabulary = SHAPES[shape]["vocabulary"]
    words = {"<|end|>": 0, **{f"w{number}": number for number in range(1, vocabulary)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>").save_pretrained(folder / "base")
    texts, draw = reference(vocabulary, longest_of(shape)), random.Random(0)
    ids, rows = list(itertools.chain(*texts)), list[list[int]]()
    while sum(map(len, rows)) < tokens:  # pieces of the same lengths from elsewhere, so that no row is there twice
        for text in draw.sample(texts, len(texts)):
            start, length = draw.randrange(len(ids)), len(text) - 1  # and the end
            rows.append((ids + ids)[start : start + length])
    lines = (json.dumps({"text": " ".join(f"w{max(1, number)}" for number in row)}) + "\n" for row in rows)
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


class Mark(NamedTuple):
    """A step by the clock: seconds, tokens, loss; whether it met or recorded a new size of batches."""

    began: float
    ended: float
    tokens: int
    loss: float
    new: bool


class Clocked:
    """Steps of a run with the clock beside them; `profiled`: five of the last under PyTorch's profiler."""

    def __init__(self, steps: int, *, profiled: bool = False) -> None:
        self.marks: list[Mark] = []
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
            sizes, began = self.captured and self.captured.sizes, time.perf_counter()
            records = take(*args)
            ended, new = time.perf_counter(), bool(self.captured) and self.captured.sizes != sizes
            tokens = sum(len(batch.tokens_T) for batch in args[2])
            self.marks.append(Mark(began, ended, tokens, records[0].get("loss", float("nan")), new))
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

    def steady(self) -> list[tuple[Mark, float]]:
        """Of the later half, without what was profiled and without new sizes: each step, and the seconds from its
        beginning to that of the next."""
        half = self.marks[len(self.marks) // 2 : self._first]
        return [(one, after.began - one.began) for one, after in itertools.pairwise(half) if not one.new]


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
    free_memory()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with clock.around(capturing=capturing):
        running.train(config, replace=True, display=display)
    steady, new = clock.steady(), sum(mark.new for mark in clock.marks)
    tokens, seconds = sum(one.tokens for one, _ in steady), sum(gap for _, gap in steady)
    inside = statistics.median(one.ended - one.began for one, _ in steady)
    note = f"{len(steady)} steps, {1000 * inside:.1f} ms in each at the median and {1000 * seconds / len(steady):.1f} "
    note += f"from one to the next; {new} more met or recorded a size; loss {clock.marks[-1].loss:.5f} at last"
    note += "".join(f"; {line}" for line in display.lines if line.startswith(("batches of", "steps aren't", "updates")))
    settled = config_of(Path(config.output) / "config.yaml").train.step_tokens
    row: Row = {"tokens": settled, "tokens_per_s": tokens / seconds, "note": note}
    if CUDA:
        row["allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return row, clock


def loop_row(folder: Path, device: str, **train: Any) -> Row:
    """gpu.py's loop on the batches of a run's later half."""
    from deltaw.training.batch_size import sized
    from deltaw.training.opening import open_run

    free_memory()  # of the run before
    display = Lines()
    opened = sized(open_run(parse_config(run_file(folder, "loop", device=device, **train)), display), display)
    config = opened.config.train
    assert config.steps
    every = itertools.islice(opened.loader(opened.learner(display).state), config.steps)
    steps = [batches for batches, _ in every][config.steps // 2 :]
    one, clock = Steps(opened.model.forward, opened.attached, config.batch_tokens, opened.longest), Clock(device)
    one.meet(steps)
    marks = [clock.mark()]
    for batches, coming in itertools.pairwise([*steps, steps[0]]):
        loss = one.step(batches, coming)
        marks.append(clock.mark())
    seconds, tokens = sum(clock.gaps(marks)), sum(len(batch.tokens_T) for batches in steps for batch in batches)
    one.release()
    note = f"{len(steps)} steps, {1000 * seconds / len(steps):.1f} ms each; loss {loss:.5f} at last"
    note = "; ".join([note, *one.said])
    return {"tokens": config.tokens_per_step, "tokens_per_s": tokens / seconds, "note": note}


def exact_row(folder: Path, device: str) -> Row:
    """Steps on one batch: as it is, recorded, replayed. Of short rows, whose attention has one order of adding."""
    from deltaw.base.recorded import recorder_on
    from deltaw.training.batch_size import sized
    from deltaw.training.captured import Captured
    from deltaw.training.opening import open_run

    display, raw = Lines(), run_file(folder, "exact", steps=100, device=device)
    raw["data"] |= {"max_length": 100, "too_long": "truncate"}
    opened = sized(open_run(parse_config(raw), display), display)
    learner = opened.learner(display)
    given = (opened.model.forward, learner, opened.longest, display.say)
    captured = Captured(*given, recorder_on(opened.device))
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


def rows_of(shape: str, steps: int, device: str, folder: Path, _: Callable[[], float]) -> Iterator[tuple[str, Row]]:
    """(arm, row) of what a run is held to."""
    large = 8192 if shape != "toy" else 512
    make_base(shape, folder, device, (steps + 2) * large)
    given = {"steps": steps, "tokens_per_step": large}
    row, clock = timed(run_file(folder, "large", device=device, **given), profiled=CUDA)
    yield "train", row
    yield "loop", loop_row(folder, device, **given)
    if CUDA:
        usual = statistics.median(gap for _, gap in clock.steady())
        yield "profile", {"tokens": large, **made_of(clock.profile, CUDA, usual, 5)}


def more_of(shape: str, steps: int, device: str, folder: Path, left: Callable[[], float]) -> Iterator[tuple[str, Row]]:
    """(arm, row) of everything else, as long as time is left."""
    given = {"device": device}
    yield "train-exact", exact_row(folder, device)
    if left() < 20:
        return
    row, clock = timed(run_file(folder, "plain", steps=steps, **given))
    yield "train", row
    if left() > 60 and shape in ("135m", "toy"):
        yield "train-killed", killed_row(folder, steps, clock.marks[-1].loss, **given)
    if left() > 30:
        raw = run_file(folder, "before", steps=max(4, steps // 4), tokens_per_batch=2048, **given)
        yield "train-uncaptured", timed(raw, capturing=False)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=None, help="135m,1b")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a tiny model: tests this script, measures nothing")
    parser.add_argument("--budget", type=float, default=120, help="seconds for everything")
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
        shapes, failed = options.models or (["toy"] if options.toy else ["135m", "1b"]), set[str]()
        for rows, shape in itertools.product((rows_of, more_of), shapes):
            if shape in failed:
                continue
            if end - time.monotonic() < 20:
                print(f"{shape}: skipped, out of time")
                continue
            try:
                there = Path(folder) / shape
                for arm, row in rows(shape, options.steps, options.device, there, lambda: end - time.monotonic()):
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
                    print(*(f"    {line}\n" for line in row.get("kernels", ())), sep="", end="", flush=True)
            except Exception as error:
                failed.add(shape)
                traceback.print_exc()
                table.writerow({**fixed, "arm": "train", "model": shape, "note": f"error: {error!s:.200}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
