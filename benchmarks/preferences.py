"""DPO by deltaw and by TRL's DPOTrainer with PEFT, in turns: pairs a second, memory, and whether the losses are equal.

    python -m benchmarks.preferences [--record] [--steps 8] [--rounds 2] [--arms deltaw trl trl-once]

Prompts of about 92 tokens with two answers of about 20, eight pairs a step; words of CMUdict and how they are said, so
that every letter is a token. The arms begin with the same factors (rank 16, all linear layers), take the same pairs in
the same order at the same rate, and each is a process of its own.

    deltaw      step.py as a run takes it: the prompt of a pair computed once, the reference of each answer once, before
                the first step; its seconds are charged to the steps
    trl         DPOTrainer as documented: the reference in every step. Made strong as in trainers.py: base in the fast
                dtype, no gradient checkpointing, fused AdamW, one batch per step, no logging that costs
    trl-once    the same with precompute_ref_log_probs, charged alike
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.arms import memory
from benchmarks.figures import Measured, note
from benchmarks.workloads import BASE

SECTION = "Preferences"
PAIRS, PROMPT, ANSWER, RATE = 8, 92, 20, 1e-4
ARMS = ("deltaw", "trl", "trl-once")
FASTER, SMALLER = 3.5, 0.4


def rows(count: int) -> list[dict[str, str]]:
    """Pairs of about these lengths, from words that stand next to one another in the dictionary."""
    from deltaw.data.builtin import misheard, read_builtin, spoken

    words, made = read_builtin("cmudict"), list[dict[str, str]]()
    while len(made) < count:
        letters, phonemes = list[str](), list[str]()
        while len(letters) < PROMPT - 2 or len(phonemes) < ANSWER - 2:
            value = next(words).value
            if len(letters) < PROMPT - 2:
                letters += value["prompt"].split()[:-1]
            if len(phonemes) < ANSWER - 2:
                phonemes += value["completion"].split()
        right = phonemes[: ANSWER - 2]
        prompt = " ".join(letters[: PROMPT - 2]) + " ->"
        made.append({"prompt": prompt, "chosen": spoken(right), "rejected": spoken(misheard(right))})
    return made


def of_deltaw(folder: Path, steps: int) -> dict[str, Any]:
    """Seconds of every step and of the reference, and the losses."""
    import torch

    from deltaw.adapter.attach import attach
    from deltaw.adapter.file import Adapter
    from deltaw.base.forward import plan_forward
    from deltaw.base.load import open_base
    from deltaw.base.preferences import Dpo
    from deltaw.base.source import find_base
    from deltaw.config import DataConfig, TrainConfig
    from deltaw.data.loader import LoaderState, Units
    from deltaw.data.prepare import prepare
    from deltaw.data.render import Renderer, open_tokenizer
    from deltaw.data.weighed import Weighed
    from deltaw.evaluation.weighing import summed_logprobs
    from deltaw.training.checkpoint import TrainState
    from deltaw.training.learner import Learner
    from deltaw.training.step import step

    base = open_base(find_base(BASE), dtype="auto", device="cpu")
    renderer = Renderer(open_tokenizer(base.source.directory), shape="pairs")
    data = prepare(DataConfig(train=rows(steps * PAIRS), max_length=4096), renderer).train
    attached, forward = attach(base.model, Adapter.load(folder)), plan_forward(base.model)
    config = TrainConfig(lr=RATE, schedule="constant", warmup_steps=0, weight_decay=0.0)
    learner = Learner(attached, config, steps, TrainState(), objective=Dpo(0.1))
    began = time.perf_counter()
    with attached.disabled():
        weighed = Weighed(data, summed_logprobs(forward, data))
    reference, seconds, losses, units = time.perf_counter() - began, list[float](), list[float](), Units(data)
    for number in range(steps):
        began = time.perf_counter()
        own = range(number * PAIRS, (number + 1) * PAIRS)
        shared = units.shared(data, own)
        every = units.examples_of(own)
        parts = shared.batches(config.batch_tokens) if shared else []
        batches = [weighed.dressed(part.pack(), [every[at] for at in part.numbers]) for part in parts]
        batches = batches or [weighed.packed(every)]
        (record,) = step(forward, [learner], batches, LoaderState(0, number + 1))
        seconds.append(time.perf_counter() - began)
        losses.append(record["loss"])
    assert torch.isfinite(torch.tensor(losses)).all()
    return {"reference": reference, "seconds": seconds, "losses": losses}


def of_trl(folder: Path, steps: int, *, once: bool) -> dict[str, Any]:
    """The same of TRL."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from benchmarks.loops import peft_model
    from benchmarks.trainers import Clock, settings
    from deltaw.base.dtype import fast_dtype
    from deltaw.base.source import find_base
    from deltaw.data.render import open_tokenizer

    model, tokenizer = peft_model(folder, fast_dtype()), open_tokenizer(find_base(BASE).directory)
    clock, reference = Clock(lambda: None, lambda: None), 0.0
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            **settings(output, steps, PAIRS, RATE),
            train_sampling_strategy="sequential",
            logging_steps=1,
            max_length=None,
            beta=0.1,
            precompute_ref_log_probs=once,
        )
        data = Dataset.from_list(rows(steps * PAIRS))
        began = time.perf_counter()
        trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
        if once:
            trainer.get_train_dataloader()
            reference = time.perf_counter() - began
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"reference": reference, "seconds": clock.seconds, "losses": losses}


def one_arm(arm: str, folder: Path, steps: int) -> dict[str, Any]:
    """An arm in this process, its peak beside it."""
    told = of_deltaw(folder, steps) if arm == "deltaw" else of_trl(folder, steps, once=arm == "trl-once")
    return {**told, "peak": memory("VmHWM")}


def start(folder: Path) -> None:
    """Write factors that all arms begin with. B is zero: TRL's reference is the adapter that it is given, deltaw's the
    base, and here they are one."""
    import torch

    from deltaw.adapter.attach import attach, detach
    from deltaw.adapter.file import BaseId
    from deltaw.base.load import open_base
    from deltaw.base.source import find_base
    from deltaw.config import AdapterSpec

    base = open_base(find_base(BASE), dtype="float32", device="cpu")
    attached = attach(base.model, AdapterSpec(rank=16, alpha=32), generator=torch.Generator().manual_seed(0))
    detach(attached, BaseId(BASE)).save(folder)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--steps", type=int, default=8)
    asked.add_argument("--rounds", type=int, default=2)
    asked.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    asked.add_argument("--record", action="store_true")
    asked.add_argument("--one", nargs=2, metavar=("ARM", "FACTORS"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.one:
        print(json.dumps(one_arm(options.one[0], Path(options.one[1]), options.steps)))
        return
    told: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder))
        for _, arm in ((turn, arm) for turn in range(options.rounds) for arm in options.arms):
            call = [sys.executable, "-m", "benchmarks.preferences", "--steps", str(options.steps), "--one", arm, folder]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            told[arm].append(json.loads(done.stdout.splitlines()[-1]))
    rates = {arm: statistics.median(map(rate, runs)) for arm, runs in told.items()}
    peaks = {arm: max(run["peak"] for run in runs) for arm, runs in told.items()}
    for arm, runs in told.items():
        losses = " ".join(f"{loss:.4f}" for loss in islice(runs[0]["losses"], 6))
        print(f"{arm:9} {rates[arm]:6.2f} pairs/s, {peaks[arm] / 1e9:.1f} GB, losses {losses}")
    for other in (arm for arm in ("trl", "trl-once") if "deltaw" in rates and arm in rates):
        faster, smaller = rates["deltaw"] / rates[other], peaks["deltaw"] / peaks[other]
        print(f"against {other}: {faster:.2f} x the pairs per second, {smaller:.2f} of the memory")
        if options.record:
            bounds = (FASTER, SMALLER) if other == "trl" else (None, None)
            note(Measured(SECTION, f"DPO, pairs per second, of {other}'s", faster, bound=bounds[0]))
            note(Measured(SECTION, f"DPO, peak memory, of {other}'s", smaller, bound=bounds[1], at_most=True))


def rate(run: dict[str, Any]) -> float:
    """Pairs per second, the first step left out and the reference charged to every step alike."""
    return PAIRS / (statistics.median(run["seconds"][1:]) + run["reference"] / len(run["seconds"]))


if __name__ == "__main__":
    main()
