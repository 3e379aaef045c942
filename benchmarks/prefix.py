"""What it brings to compute frozen layers once (base/prefix.py): an adapter on the upper third of the builtin's layers.

    python -m benchmarks.prefix

Steps of the demo's words with and without it, in turns in one process. A run gains by it from its second epoch on.
"""

import statistics

from benchmarks.step import demo_steps, take
from deltaw.adapter.attach import attach, detach
from deltaw.base.prefix import lowest_layer
from deltaw.training.optim import make_optimizer

LAYERS, STEPS, WARM = range(20, 30), 12, 2


def main() -> None:
    config, forward, steps = demo_steps(WARM + STEPS)
    everywhere = attach(forward.model, config.adapter)
    targets = tuple(path for path in everywhere.paths if int(path.split(".")[2]) in LAYERS)
    detach(everywhere)
    attached = attach(forward.model, config.adapter.model_copy(update={"targets": targets}))
    optimizer = make_optimizer(attached, config.train)
    lowest = lowest_layer(attached.paths)
    assert lowest is not None
    above = forward.above(*lowest, [batch for batches in steps for batch in batches], lambda done: None)
    pairs = [[take(way, batches, optimizer) for way in (forward, above)] for batches in steps]
    bottom, upper = (statistics.median(times) for times in zip(*pairs[WARM:], strict=True))
    print(f"{above.describe()}")
    print(f"a step {bottom:.2f} s from the bottom, {upper:.2f} s above: {bottom / upper:.2f} times as fast")


if __name__ == "__main__":
    main()
