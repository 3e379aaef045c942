"""Frozen layers below the lowest adapter, computed once for all rows of a run (base/prefix.py) if that is worth it."""

from deltaw.base.forward import Forward
from deltaw.base.frozen import embedding_of
from deltaw.base.prefix import lowest_layer
from deltaw.data.loader import fill
from deltaw.data.pack import pack
from deltaw.show.progress import Display
from deltaw.training.checkpoint import TrainState
from deltaw.training.memory import free_memory
from deltaw.training.opening import Opened

FROZEN_SHARE = 0.25  # of the free memory, that what they give may take


def above_the_frozen(opened: Opened, display: Display) -> Forward:
    """The forward of training steps; of sampled answers it is at the temperature of the sampling. Where a run passes
    its documents more than once, the frozen layers below the lowest adapter are computed once for all of them, if their
    output fits into `FROZEN_SHARE` of the free memory."""
    forward, rows, capacity = opened.model.forward, opened.dataset.train, opened.config.train.batch_tokens
    if opened.is_rewarded:  # its documents are written as it goes
        return forward.at(opened.config.objective.temperature or 1.0)
    lowest = lowest_layer(opened.attached.paths)
    if (
        opened.shards
        or lowest is None
        or not lowest[1]
        or opened.total <= opened.loader(TrainState()).steps_in_epoch(0)
    ):
        return forward
    lengths, kept, words = rows.lengths, opened.retained.lengths, embedding_of(opened.model.base.model)
    tokens = int(lengths.sum() + kept.sum())
    if tokens * words.shape[1] * words.dtype.itemsize > FROZEN_SHARE * free_memory(opened.device):
        return forward
    groups = [(rows, group) for group in fill(range(len(lengths)), lengths, capacity)]
    groups += [(opened.retained, group) for group in fill(range(len(kept)), kept, capacity)]
    batches = (pack([some[n] for n in group]).to(opened.device) for some, group in groups)
    with display.task("frozen layers", len(groups)) as progress:
        forward = forward.above(*lowest, batches, progress)
        progress(len(groups))
    display.say(f"training steps: {forward.describe()}")
    return forward
