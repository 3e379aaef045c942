"""What it brings to compute frozen layers once (base/prefix.py): an adapter on the upper third of the builtin's layers.

    python benchmarks/prefix.py

Steps of the demo's words with and without it, in turns in one process. A run gains by it from its second epoch on.
"""

import statistics
import time

from deltaw.adapter.attach import attach, detach
from deltaw.base.forward import plan_forward
from deltaw.base.load import open_base
from deltaw.base.prefix import lowest_layer
from deltaw.commands.demo import DEMO
from deltaw.config import parse_config
from deltaw.data.loader import Loader
from deltaw.data.opening import open_dataset
from deltaw.show.progress import Display
from deltaw.training.optim import make_optimizer

LAYERS, STEPS, WARM = range(20, 30), 12, 2


def main() -> None:
    sections = {"data": {**DEMO["data"], "limit": 2000, "eval": None}, "train": {**DEMO["train"], "sample_every": None}}
    config = parse_config({**DEMO, **sections, "evaluate": {}})
    _, _, dataset = open_dataset(config, Display(quiet=True))
    base = open_base(config.base)
    forward = plan_forward(base.model)
    linear = attach(base.model, config.adapter)
    targets = tuple(path for path in linear.paths if int(path.split(".")[2]) in LAYERS)
    detach(linear)
    attached = attach(base.model, config.adapter.model_copy(update={"targets": targets}))
    optimizer, sizes = make_optimizer(attached, config.train), config.train
    steps = [
        batches
        for (batches, _), _ in zip(
            Loader(dataset.train, sizes.tokens_per_step, sizes.tokens_per_batch, 0), range(WARM + STEPS), strict=False
        )
    ]
    lowest = lowest_layer(attached.paths)
    assert lowest is not None
    above = forward.above(*lowest, [batch for batches in steps for batch in batches], lambda done: None)
    seconds: dict[str, list[float]] = {"from the bottom": [], "above the frozen layers": []}
    for number, batches in enumerate(steps):
        for name, way in zip(seconds, (forward, above), strict=True):
            began = time.perf_counter()
            for batch in batches:
                loss, count = way.loss(batch)
                (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= WARM:
                seconds[name].append(time.perf_counter() - began)
    bottom, upper = (statistics.median(times) for times in seconds.values())
    print(f"{above.describe()}")
    print(f"a step {bottom:.2f} s from the bottom, {upper:.2f} s above: {bottom / upper:.2f} times as fast")


if __name__ == "__main__":
    main()
