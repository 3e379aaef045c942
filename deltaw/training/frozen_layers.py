"""Frozen layers below the lowest adapter, computed once for all rows of a run, or of several runs on one base
(base/prefix.py), if that is worth it."""

from collections.abc import Sequence

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


def above_the_frozen(runs: Sequence[Opened], display: Display) -> Forward:
    """The forward of training steps; of sampled answers it is at the temperature of the sampling. Where documents are
    passed more than once, by one run or by several, the frozen layers below the lowest adapter are computed once for
    all of them, if their output fits into `FROZEN_SHARE` of the free memory."""
    first, paths = runs[0], [path for run in runs for path in run.attached.paths]
    forward, lowest = first.model.forward, lowest_layer(paths)
    if first.is_rewarded:  # its documents are written as it goes
        return forward.at(first.config.objective.temperature or 1.0)
    if first.shards or lowest is None or not lowest[1]:
        return forward
    texts = {one.fingerprint: one.train for one in (run.dataset for run in runs)}
    passed = sum(run.total / run.loader(TrainState()).steps_in_epoch(0) for run in runs)
    if passed <= len(texts):
        return forward
    texts |= {text.fingerprint: text.pieces for run in runs if (text := run.kept_text)}
    words, device = embedding_of(first.model.base.model), first.device
    tokens = sum(int(rows.lengths.sum()) for rows in texts.values())
    if tokens * words.shape[1] * words.dtype.itemsize > FROZEN_SHARE * free_memory(device):
        return forward
    capacity = max(run.config.train.batch_tokens for run in runs)
    groups = [(rows, group) for rows in texts.values() for group in fill(range(len(rows)), rows.lengths, capacity)]
    batches = (pack([some[n] for n in group]).to(device) for some, group in groups)
    with display.task("frozen layers", len(groups)) as progress:
        forward = forward.above(*lowest, batches, progress)
        progress(len(groups))
    display.say(f"training steps: {forward.describe()}")
    return forward
