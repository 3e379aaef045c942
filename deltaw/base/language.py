"""Which part of a model is the language model: the part that reads text, beside towers for pictures or sound."""

from collections.abc import Callable
from typing import Any

from torch import nn


def language_part(model: nn.Module) -> Callable[[str], bool]:
    """Whether the module of a path lies in the language model.

    It is built from the text config where the config has one; where it hasn't, models within the model that have a
    config of another kind don't belong to it. This is found by config, not by name. Without a config everything belongs
    to it.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return lambda path: True
    text = type(config.get_text_config(decoder=True))
    models = {
        f"{path}.": type(module.config)
        for path, module in model.named_modules()
        if path and hasattr(module, "config") and hasattr(module, "get_input_embeddings")
    }
    if text is type(config):
        others = tuple(path for path, kind in models.items() if kind is not text)
        return lambda path: not path.startswith(others)
    own = tuple(path for path, kind in models.items() if kind is text)
    return lambda path: not own or path.startswith(own)
