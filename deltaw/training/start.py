"""The start of a run whose initialiser wants data: its first batches, in the order in which it will train on them.

A run that is resumed has its start in the checkpoint and doesn't come here.
"""

from itertools import chain, islice

from deltaw.adapter.attach import Attached
from deltaw.adapter.init_data import initialise_from_data
from deltaw.data.loader import Loader
from deltaw.model import Model
from deltaw.show.progress import Display

BATCHES = 8  # of train.tokens_per_batch: 16,384 tokens by default


def start_from_data(attached: Attached, model: Model, loader: Loader, display: Display) -> None:
    """Set every layer's start from the first `BATCHES` batches (of a small set of rows, some come twice)."""
    batches = [
        batch.to(model.base.device) for batch in islice(chain.from_iterable(step for step, _ in loader), BATCHES)
    ]
    initialise_from_data(attached, model.forward, batches, display)
