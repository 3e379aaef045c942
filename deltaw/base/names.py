"""The names of a checkpoint's tensors: which parameter of the model each one is, by the rules of transformers' loading.

A checkpoint's names are not always the model's own. transformers 5 renames by patterns (a Gemma 3 with a tower stores
`language_model.model.…` for `model.language_model.…`), stacks or cuts tensors (a file with one matrix for each expert,
a model with one for all), and puts the prefix of the bare model on or takes it off (a bare GPT-2: `h.0.…` for
`transformer.h.0.…`). Its own functions are asked, so that what is read here is what it would load.

A transformers that has them otherwise leaves the one rule that all versions share, the prefix.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn
from transformers import conversion_mapping, core_model_loading


class Place(NamedTuple):
    """The model's own name for a tensor, None where it has no place for it. `converted`: it is only a part of that one
    or has several in it."""

    name: str | None
    converted: bool = False


def places(skeleton: nn.Module, stored: Iterable[str]) -> dict[str, Place]:
    """By the name in the file. `skeleton`: the model, its weights may be on the meta device."""
    own = skeleton.state_dict()
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    renamed = _renaming(skeleton, prefix)

    def place(name: str) -> Place:
        new, converted = renamed(name)
        if new not in own and name in own:
            new, converted = name, False  # as transformers: it should probably not have been renamed
        known = (new,) if new in own or not prefix else (f"{prefix}.{new}", new.removeprefix(f"{prefix}."))
        return Place(next((n for n in known if n in own), None), converted)

    return {name: place(name) for name in stored}


def _renaming(skeleton: nn.Module, prefix: str) -> Callable[[str], tuple[str, bool]]:
    """A stored name -> the model's, and whether a conversion is due."""
    own = skeleton.state_dict()
    try:
        rules = conversion_mapping.get_model_conversion_mapping(skeleton)
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]

        def renamed(name: str) -> tuple[str, bool]:
            new, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, own)
            return new, pattern is not None

        renamed("model.layers.0.weight")
    except (AttributeError, TypeError):
        return lambda name: (name, False)
    return renamed
