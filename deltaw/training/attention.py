"""Which attention a run takes on a GPU: once, when its model is opened, the kernels that are installed are raced on the
model's own heads (kernels/race.py).

Only training does it. Importing a package of kernels and compiling them takes seconds, which a run wins back within
its first minutes and an answer to one question never.
"""

from collections.abc import Callable
from typing import Any

import torch

from deltaw.base.source import compiled_kernels
from deltaw.errors import InputError, first_line
from deltaw.generate.cache import text_config
from deltaw.kernels.device import HALF
from deltaw.kernels.flash import Heads
from deltaw.kernels.race import fastest_attention
from deltaw.model import Model
from deltaw.training.memory import release


def choose_attention(model: Model, longest: int, say: Callable[[str], None]) -> None:
    """Let the fastest kernel have the model's attention, for the rest of the process; a line says which, where there is
    a choice. `longest`: tokens of the longest row. Raises InputError for a kernel that leaves the GPU unusable."""
    base = model.base
    if base.device.type != "cuda" or torch.version.hip is not None or not model.forward.packed:
        return
    if (heads := heads_of(base.model, base.dtype)) is None:
        return
    try:
        lines = fastest_attention(heads, longest, base.device, compiled_kernels()).lines()
    except InputError:
        raise
    except Exception as error:  # a full device, say: then it is PyTorch's own
        lines = [f"attention isn't raced: {first_line(error):.200}"]
    finally:
        release(base.device)
    for line in lines:
        say(line)


def heads_of(model: Any, dtype: torch.dtype) -> Heads | None:
    """By its config; None where it says nothing of them, or where PyTorch's own kernels take another way. Layers with
    other heads than that keep PyTorch's own."""
    config = text_config(model)
    query, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(query, int) or not isinstance(width, int) or dtype not in HALF:
        return None  # it has none, or each layer its own
    shared = getattr(config, "num_key_value_heads", None) or query
    size = getattr(config, "head_dim", None) or width // query
    whole = isinstance(shared, int) and isinstance(size, int) and size % 8 == 0 and size <= 256
    return Heads(query, shared, size, dtype) if whole else None
