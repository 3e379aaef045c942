"""What it costs to keep a base's matrices packed: tokens per second beside the dense base, and the bytes of the base.

    python -m benchmarks.packed [--weights keep bfloat16 nf4] [--tokens 768 2048] [--rounds 4]

Training steps of the builtin with the demo's adapter, on tokens that are random and all supervised, in one process: one
step of each base in turn, so that other programs take from all of them alike. The time of a base is the median over
rounds of its time divided by the dense one's of the same round. About three minutes on two idle cores.
"""

import argparse
import statistics
import time
from typing import Any, get_args

import torch

from benchmarks.figures import Measured, note
from deltaw.adapter.attach import Attached, attach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import open_base
from deltaw.config import AdapterSpec, BaseWeights, TrainConfig
from deltaw.training.optim import make_optimizer

BASE, DENSE, WARM, DOCUMENT = "builtin:smollm2-135m", "auto", 1, 64
SECTION = "When it doesn't fit"
WANTED = {768: 0.8, 2048: 0.9}  # of the dense speed


class Arm:
    """A base with an adapter that is trained on it."""

    def __init__(self, weights: Any) -> None:
        opened = open_base(BASE, dtype="float32", weights=weights)
        self.weights, self.nbytes = weights, sum(one.nbytes for one in opened.model.parameters())
        self.forward: Forward = plan_forward(opened.model)
        self.attached: Attached = attach(opened.model, AdapterSpec(rank=16, alpha=32))
        self.optimizer = make_optimizer(self.attached, TrainConfig())

    def step(self, batch: Batch) -> float:
        """Seconds."""
        start = time.perf_counter()
        loss, count = self.forward.loss(batch)
        (loss / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def random_batch(tokens: int) -> Batch:
    """Documents of `DOCUMENT` tokens."""
    ids_T = torch.randint(1000, 40_000, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return Batch.of(ids_T, [*range(0, tokens, DOCUMENT), tokens], ids_T.roll(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [weights for weights in get_args(BaseWeights) if weights != DENSE]
    parser.add_argument("--weights", nargs="+", choices=others, default=["keep", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[768, 2048])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/performance.md")
    asked = parser.parse_args()
    arms = [Arm(weights) for weights in (DENSE, *asked.weights)]
    bfloat16 = arms[0].nbytes / 2  # the dense base is in float32
    for arm in arms:
        print(f"{arm.weights:9} {arm.nbytes / 1e6:6,.0f} MB, {arm.nbytes / bfloat16:.2f} of bfloat16's", flush=True)
        if asked.record and arm.weights != DENSE:
            bound = 0.4 if arm.weights == "keep" else None
            name = f"base under {arm.weights}, of bfloat16's bytes"
            note(Measured(SECTION, name, arm.nbytes / bfloat16, bound=bound, at_most=True))
    for tokens in asked.tokens:
        batch = random_batch(tokens)
        rounds = [[arm.step(batch) for arm in arms] for _ in range(WARM + asked.rounds)][WARM:]
        for number, arm in enumerate(arms):
            ratio = statistics.median(times[0] / times[number] for times in rounds)
            speed = tokens / statistics.median(times[number] for times in rounds)
            print(f"{tokens:5} tokens  {arm.weights:9} {speed:6.0f} tokens/s, {ratio:.2f} of dense", flush=True)
            if asked.record and arm.weights != DENSE:
                bound = WANTED.get(tokens) if arm.weights == "keep" else None
                name = f"{arm.weights}, {tokens:,} tokens a step, of the dense speed"
                note(Measured(SECTION, name, ratio, bound=bound))


if __name__ == "__main__":
    main()
