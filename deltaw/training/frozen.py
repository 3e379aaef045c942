"""Frozen layers below the lowest adapter: computed once a run, where a run passes its documents more than once."""

import torch

from deltaw.base.forward import Forward
from deltaw.base.prefix import lowest_layer
from deltaw.data.dataset import Dataset
from deltaw.data.loader import fill
from deltaw.data.pack import pack
from deltaw.model import Model
from deltaw.show.progress import Display
from deltaw.training.memory import free_memory

SHARE = 0.25  # of the free memory that what the layers give may take


def above_the_frozen(model: Model, dataset: Dataset, tokens_per_batch: int, display: Display) -> Forward:
    """The model's forward, begun above the frozen layers for the training documents. As it is where the lowest layer
    is adapted, or what the layers below give doesn't fit into `SHARE` of the free memory."""
    assert model.attached is not None
    lowest = lowest_layer(model.attached.paths)
    lengths = [len(example.tokens) for example in dataset.train]
    weight: torch.Tensor = model.base.model.get_input_embeddings().weight  # type: ignore[operator]
    size = sum(lengths) * weight.shape[1] * weight.dtype.itemsize
    if lowest is None or not lowest[1] or size > SHARE * free_memory(model.base.device):
        return model.forward
    groups = fill(range(len(lengths)), lengths, tokens_per_batch)
    batches = (pack([dataset.train[n] for n in group]).to(model.base.device) for group in groups)
    with display.task("frozen layers", len(groups)) as update:
        forward = model.forward.above(*lowest, batches, update)
        update(len(groups))
    display.say(f"training steps: {forward.describe()}")
    return forward
