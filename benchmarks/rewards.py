"""GRPO by deltaw and by TRL's GRPOTrainer with PEFT, in turns: seconds per step, memory, and what a step was made of.

    python -m benchmarks.rewards [--record] [--steps 6] [--rounds 2] [--arms deltaw trl] [--prompts 8] [--samples 8]
                                 [--tokens 20]

Each step samples 8 answers of exactly 20 tokens to each of 8 prompts (words of CMUdict, as in the demo), rewards them
and takes one update; one process per arm. Both begin with the same factors (rank 16, all linear layers; B isn't zero,
so that the adapter has something to say) and ask the same prompts at the same rate. No token ends an answer, so that
both arms sample and train the same number of tokens; the reward is the share of letters in an answer that are vowels.

    deltaw      the step as a run takes it: rollouts, groups, step.py
    trl         GRPOTrainer as documented, generating by transformers in its process. Made strong as in trainers.py:
                base in the fast dtype, no gradient checkpointing, fused AdamW, one batch per step, no costly logging
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arms import memory
from benchmarks.figures import Measured, note
from benchmarks.workloads import BASE

SECTION = "Rewards"
RATE = 1e-5
ARMS = ("deltaw", "trl")
FASTER, SMALLER = 2.5, 0.4


def prompts(count: int) -> list[str]:
    """Words, letter by letter."""
    from deltaw.data.builtin import read_builtin

    words = read_builtin("cmudict")
    return [str(next(words).value["prompt"]) for _ in range(count)]


def reward(answer: str) -> float:
    """The share of its letters that are vowels."""
    letters = [letter for letter in answer.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(1, len(letters))


def of_deltaw(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step, and what its record says."""
    from deltaw.adapter.attach import attach
    from deltaw.adapter.file import Adapter
    from deltaw.base.forward import plan_forward
    from deltaw.base.load import open_base
    from deltaw.base.rewarded import Grpo
    from deltaw.base.source import find_base
    from deltaw.config import TrainConfig, parse_config
    from deltaw.data.loader import LoaderState
    from deltaw.data.render import Renderer, open_tokenizer
    from deltaw.generate.rollout import sampled
    from deltaw.generate.sampling import Sampling
    from deltaw.rewards.scored import Scored
    from deltaw.training.checkpoint import TrainState
    from deltaw.training.groups import Group, figures, laid
    from deltaw.training.learner import Learner
    from deltaw.training.step import step

    base = open_base(find_base(BASE), dtype="auto", device="cpu")
    renderer = Renderer(open_tokenizer(base.source.directory), shape="prompts")
    asked = [renderer.prompt_ids(prompt) for prompt in prompts(options.steps * options.prompts)]
    attached, forward = attach(base.model, Adapter.load(folder)), plan_forward(base.model)
    train = {"lr": RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "tokens_per_batch": 4096}
    group = {"samples": options.samples, "prompts": options.prompts, "max_new_tokens": options.tokens}
    objective = {"kind": "grpo", "reward": "exact_match", "mask_truncated": False, **group}
    config = parse_config({"base": BASE, "data": {"train": "rows"}, "objective": objective, "output": "-"})
    config = config.model_copy(update={"train": TrainConfig(**train)})  # type: ignore[arg-type]
    learner = Learner(attached, config.train, options.steps, TrainState(), objective=Grpo())
    seconds, rewards, lengths = list[float](), list[float](), list[float]()
    for number in range(options.steps):
        began = time.perf_counter()
        own = asked[number * options.prompts : (number + 1) * options.prompts]
        sampling = Sampling(max_new_tokens=options.tokens, temperature=1.0, seed=number)
        answers = sampled(base.model, own, options.samples, sampling, frozenset())
        groups = [
            Group(tuple(prompt), str(at), some, [Scored(reward(renderer.decode(one.tokens))) for one in some])
            for at, (prompt, some) in enumerate(zip(own, answers, strict=True))
        ]
        step(forward, [learner], laid(groups, config, shares=forward.shares), LoaderState(0, number + 1))
        seconds.append(time.perf_counter() - began)
        said = figures(groups)
        rewards.append(said["reward"])
        lengths.append(said["answer_tokens"])
    return {"seconds": seconds, "rewards": rewards, "tokens": lengths}


def of_trl(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same of TRL."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.loops import peft_model
    from benchmarks.trainers import Clock, settings
    from deltaw.base.dtype import fast_dtype
    from deltaw.base.source import find_base
    from deltaw.data.render import open_tokenizer

    model, tokenizer = peft_model(folder, fast_dtype()), open_tokenizer(find_base(BASE).directory)
    clock = Clock(lambda: None, lambda: None)

    def judged(completions: list[str], **_: Any) -> list[float]:
        return [reward(completion) for completion in completions]

    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            **settings(output, options.steps, options.prompts * options.samples, RATE),
            num_generations=options.samples,
            max_completion_length=options.tokens,
            generation_kwargs={"min_new_tokens": options.tokens},
            temperature=1.0,
            shuffle_dataset=False,
            logging_steps=1,
        )
        data = Dataset.from_list([{"prompt": prompt} for prompt in prompts(options.steps * options.prompts)])
        more: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [clock]}
        trainer = GRPOTrainer(model, judged, args=config, train_dataset=data, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "reward" in line]
    lengths = [line["completions/mean_length"] for line in lines]
    return {"seconds": clock.seconds, "rewards": [line["reward"] for line in lines], "tokens": lengths}


def one_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An arm in this process, its peak beside it."""
    told = of_deltaw(folder, options) if arm == "deltaw" else of_trl(folder, options)
    return {**told, "peak": memory("VmHWM")}


def start(folder: Path) -> None:
    """Write factors that both arms begin with."""
    import torch

    from deltaw.adapter.attach import attach, detach
    from deltaw.adapter.file import BaseId
    from deltaw.base.load import open_base
    from deltaw.base.source import find_base
    from deltaw.config import AdapterSpec

    base, generator = open_base(find_base(BASE), dtype="float32", device="cpu"), torch.Generator().manual_seed(0)
    attached = attach(base.model, AdapterSpec(rank=16, alpha=32), generator=generator)
    with torch.no_grad():
        for layer in attached.layers.values():
            layer.trained()["b"].normal_(std=1e-3, generator=generator)
    detach(attached, BaseId(BASE)).save(folder)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in (("steps", 6), ("rounds", 2), ("prompts", 8), ("samples", 8), ("tokens", 20)):
        asked.add_argument(f"--{name}", type=int, default=number)
    asked.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    asked.add_argument("--record", action="store_true")
    asked.add_argument("--one", nargs=2, metavar=("ARM", "FACTORS"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.one:
        print(json.dumps(one_arm(options.one[0], Path(options.one[1]), options)))
        return
    told: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    sizes = [
        text
        for name in ("steps", "prompts", "samples", "tokens")
        for text in (f"--{name}", str(getattr(options, name)))
    ]
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder))
        for _, arm in ((turn, arm) for turn in range(options.rounds) for arm in options.arms):
            call = [sys.executable, "-m", "benchmarks.rewards", *sizes, "--one", arm, folder]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            told[arm].append(json.loads(done.stdout.splitlines()[-1]))
    times = {
        arm: statistics.median(statistics.median(run["seconds"][1:]) for run in runs) for arm, runs in told.items()
    }
    peaks = {arm: max(run["peak"] for run in runs) for arm, runs in told.items()}
    for arm, runs in told.items():
        tokens, worth = (statistics.mean(runs[0][name]) for name in ("tokens", "rewards"))
        what = f"{tokens:.1f} tokens per answer, mean reward {worth:.3f}"
        print(f"{arm:9} {times[arm]:6.2f} s per step, {peaks[arm] / 1e9:.1f} GB, {what}")
    if {*ARMS} <= times.keys():
        faster, smaller = times["trl"] / times["deltaw"], peaks["deltaw"] / peaks["trl"]
        print(f"against trl: {faster:.2f} x as fast, {smaller:.2f} of the memory")
        if options.record:
            note(Measured(SECTION, "GRPO, steps per second, of TRL's", faster, bound=FASTER))
            note(Measured(SECTION, "GRPO, peak memory, of TRL's", smaller, bound=SMALLER, at_most=True))


if __name__ == "__main__":
    main()
