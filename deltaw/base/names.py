"""The names of a checkpoint's tensors: which parameter of the model each one is, by the rules of transformers' loading.

A checkpoint's names are not always the model's own. transformers 5 renames by patterns (a Gemma 3 with a tower stores
`language_model.model.…` for `model.language_model.…`), stacks or cuts tensors (a file with one matrix for each expert,
a model with one for all), and puts the prefix of the bare model on or takes it off (a bare GPT-2: `h.0.…` for
`transformer.h.0.…`). Its own functions are asked, so that what is read here is what it would load.

A transformers that has them otherwise leaves the one rule that all versions share, the prefix.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from transformers import conversion_mapping, core_model_loading

EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Slot(NamedTuple):
    """Which part of a parameter of all experts a tensor is: that expert's, and of its rows the `part`-th of `parts`
    equal ones (gate and up, say)."""

    expert: int
    part: int
    parts: int


class Place(NamedTuple):
    """The model's own name for a tensor, None where it has no place for it. `converted`: it is only a part of that one
    or has several in it; `slot`: which part, where it is an expert's matrix as it stands."""

    name: str | None
    converted: bool = False
    slot: Slot | None = None


def places(skeleton: nn.Module, stored: Iterable[str]) -> dict[str, Place]:
    """By the name in the file. `skeleton`: the model, its weights may be on the meta device."""
    own = skeleton.state_dict()
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    renamed = _renaming(skeleton, prefix)

    def place(name: str) -> Place:
        new, converted, slot = renamed(name)
        if new not in own and name in own:
            new, converted, slot = name, False, None  # as transformers: it should probably not have been renamed
        known = (new,) if new in own or not prefix else (f"{prefix}.{new}", new.removeprefix(f"{prefix}."))
        return Place(next((n for n in known if n in own), None), converted, slot)

    return {name: place(name) for name in stored}


def _renaming(skeleton: nn.Module, prefix: str) -> Callable[[str], tuple[str, bool, Slot | None]]:
    """A stored name -> the model's, whether a conversion is due, and the part of the parameter that it is then."""
    own = skeleton.state_dict()
    try:
        rules = conversion_mapping.get_model_conversion_mapping(skeleton)
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]

        def renamed(name: str) -> tuple[str, bool, Slot | None]:
            new, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, own)
            return new, pattern is not None, None if pattern is None else _slot(name, pattern, converters)

        renamed("model.layers.0.weight")
    except (AttributeError, TypeError):
        return lambda name: (name, False, None)
    return renamed


def _slot(name: str, pattern: str, converters: Iterable[Any]) -> Slot | None:
    """The part that a tensor is of what its rule makes; None unless the rule puts experts' matrices on top of each
    other, as they are."""
    numbers = EXPERT.findall(name)
    rule = next((rule for rule in converters if pattern in rule.source_patterns), None)
    if rule is None or len(numbers) != 1:
        return None
    parts = list(rule.source_patterns)
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or len(steps) > len(parts):
        return None
    return Slot(int(numbers[0]), parts.index(pattern), len(parts))
