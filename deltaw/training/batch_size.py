"""train.tokens_per_batch: auto, as a number.

How a step is cut into batches changes its speed and its memory and nothing else. On a CPU small batches are no slower,
so it is `PLAIN_BATCH`. A GPU wants large ones: a batch of 2,048 tokens leaves most of an H100 idle. So there a batch is
a whole step, if that fits: the memory of two small passes is measured and carried on to the step's tokens, all of them
trained (fit.py); where it would take more than `ROOM` of what is free, a step is cut into two, four, and so on. The
rest of the memory is for passes that are recorded beside those that run as they are (captured.py), and for evaluations.

Rejected: trying larger and larger batches until memory runs out (the card is then full of holes), and racing their
speeds: up to 8,192 tokens the larger was the faster one on every model measured (benchmarks/gpu.csv).
"""

from dataclasses import replace

from deltaw.config.train import PLAIN_BATCH
from deltaw.files.output import gib
from deltaw.show.progress import Display
from deltaw.training.fit import Fit, fit_memory, measure
from deltaw.training.length import tokens_of_step
from deltaw.training.memory import free_memory, held_memory, is_out_of_memory
from deltaw.training.opening import Opened

TRIED = (512, 2048)  # tokens of the passes that are measured
ROOM = 0.4  # of the free memory, for a batch
LEAST, MOST = 256, 16_384  # tokens


def sized(opened: Opened, display: Display) -> Opened:
    """The run with a number for `auto`, which a line names where it isn't the plain one."""
    train = opened.config.train
    if train.tokens_per_batch != "auto":
        return opened
    tokens = PLAIN_BATCH if opened.device.type == "cpu" else _agreed(opened, display)
    config = opened.config.model_copy(update={"train": train.model_copy(update={"tokens_per_batch": tokens})})
    return replace(opened, config=config)


def fitting(step: int, fit: Fit, limit: float, besides: float = 0.0) -> int:
    """The largest of a step, its half, its quarter, ... (from `MOST` down to `LEAST` tokens) of which a batch takes at
    most `limit` bytes, all of its tokens trained; the smallest where none does. `besides`: the share of general text
    that comes on top (`train.retain`)."""
    tokens, more = step, 1 + besides
    while tokens > LEAST and (tokens > MOST or fit.bytes_at(more * tokens, more * tokens) > limit):
        tokens = -(-tokens // 2)
    return tokens


def _agreed(opened: Opened, display: Display) -> int:
    """What was measured: by each process for itself, but where a pass takes all of them."""
    if not opened.shards:
        return _measured(opened, display)
    tokens = LEAST
    if opened.world.is_first:
        with opened.shards.leads():
            tokens = _measured(opened, display)
    else:
        opened.shards.follow()
    return opened.world.first(lambda: tokens, "the size of a batch")


def _measured(opened: Opened, display: Display) -> int:
    rows, train, device = opened.dataset.train, opened.config.train, opened.device
    step = tokens_of_step(opened.config, opened.dataset)
    step = step if opened.is_rewarded else min(step, int(rows.lengths.sum()))
    held, free = held_memory(device), free_memory(device)
    try:
        sizes = [min(size, step) for size in TRIED]
        points = list(measure(opened.model.forward, opened.learner(display), rows, sizes, accumulating=True))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return LEAST
    fit = fit_memory(points)
    tokens = fitting(step, fit, held + ROOM * free, train.retain.share if train.retain else 0.0)
    part = "a whole step" if tokens == step else f"a step of {step:,} in parts"
    takes = f"about {gib(fit.bytes_at(tokens, tokens))}, and {gib(held + free)} are available"
    others = " and ".join(f"{other:,} about {gib(fit.bytes_at(other, other))}" for other in (tokens // 2, 2 * tokens))
    display.say(f"batches of up to {tokens:,} tokens, {part}: {takes}; {others}")
    return tokens
