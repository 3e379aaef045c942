"""Experts as targets: which parameters a spec's names mean, of what rank, and in what words that is told.

The experts of a mixture are parameters, each of all experts at once (base/experts.py). The group `experts` is all of
them, and their paths and ends (`experts.down_proj`) are names like those of layers; a name that a linear layer has
means the layer, so `down_proj` is a dense or a shared MLP's where there is one. What is left out (`not layers.0-3`) is
left out of both. Other groups leave experts alone, and a line says so.

Each expert's matrices get the rank divided by the number of experts that a token goes to, at least 1, unless
`expert_rank` or an override says otherwise (LoRA Without Regret: a token then meets as many trained directions as in a
dense layer, and the adapter stays the same share of the model). Divided by all experts, as some do, rank 16 would be 0
for 128 of them.

DoRA, full fine-tuning and starts that need data aren't for experts: PEFT's form has no magnitudes for them, a ΔW of all
experts is the size of the model, and what one batch sends to an expert is too little to start from.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from deltaw.adapter.patterns import matched
from deltaw.base.experts import chosen, expert_stacks
from deltaw.config import AdapterSpec, names_module
from deltaw.config.adapter import parameter_of
from deltaw.show.text import counted
from deltaw.updates import Update

GROUP = "experts"
Shape = tuple[int, int, int]  # E, M, N


class Experts(NamedTuple):
    """The parameters of a model's experts by path, and how many of them a token goes to."""

    shapes: Mapping[str, Shape]
    chosen: int

    def among(self, paths: Sequence[str]) -> list[str]:
        """Those of `paths` that are experts'."""
        return [path for path in paths if path in self.shapes]

    def meant(self, name: str, paths: Sequence[str], *, too: bool = False) -> list[str]:
        """What a name or a pattern means: layers, and experts where it means none; both, if `too`."""
        linear = matched(name, [path for path in paths if path not in self.shapes])
        return linear + (matched(name, self.among(paths)) if too or not linear else [])

    def refused(self, spec: AdapterSpec, paths: Sequence[str]) -> dict[str, str]:
        """Those that can't be trained as the spec says, and why."""
        if spec.kind == "lora" and not spec.from_data:
            return {}
        way = "DoRA (magnitude)" if spec.magnitude else "full fine-tuning" if spec.full else f"init {spec.init}"
        return dict.fromkeys(self.among(paths), f"holds experts, and {way} isn't for experts")

    def ranked(self, spec: AdapterSpec, paths: Sequence[str]) -> AdapterSpec:
        """The spec with ranks for the experts among `paths`, where it has none of its own for them."""
        experts = self.among(paths)
        if not experts or spec.full:
            return spec
        rank = spec.expert_rank or max(1, spec.rank // self.chosen)
        given = [path for path in experts if any(names_module(name, path) for name in spec.rank_overrides)]
        own = {ends(path): rank for path in experts if path not in given}
        return spec.model_copy(update={"rank_overrides": {**spec.rank_overrides, **own}, "expert_rank": None})

    def in_words(self, spec: AdapterSpec, paths: Sequence[str], stacks: Sequence[str]) -> str:
        """Which are adapted, for logs; "" for none. `stacks`: the layers that they lie in."""
        experts = self.among(paths)
        if not experts:
            return ""
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in experts))
        ranks = sorted({spec.rank_of(path) for path in experts})
        each = f"rank {', '.join(map(str, ranks))} each"
        if ranks != [spec.rank] and self.chosen > 1:
            each += f" (a token goes to {self.chosen}; adapter.expert_rank changes it)"
        where = f" in {', '.join(stacks)}" if stacks else ""
        return f"{counted(self.shapes[experts[0]][0], 'expert')} per layer: {names}{where}, {each}"

    def misfits(self, updates: Mapping[str, Update]) -> list[str]:
        """What of updates of single experts doesn't fit this model."""
        counts = Counter(parameter_of(path) for path in updates)
        problems = [f"{path:.120}: no such experts in this model" for path in counts if path not in self.shapes]
        for path, count in counts.items():
            if path in self.shapes and count != self.shapes[path][0]:
                problems.append(f"{path}: updates of {counted(count, 'expert')}, the model has {self.shapes[path][0]}")
        for path, update in updates.items():
            shape = self.shapes.get(parameter_of(path))
            if shape is not None and update.shape != shape[1:]:
                problems.append(f"{path}: update is {update.shape}, the expert's matrix {shape[1:]}")
        return problems


def experts_of(model: nn.Module) -> Experts:
    """Those that can be adapted."""
    return Experts({path: stack.shape for path, stack in expert_stacks(model).items()}, chosen(model))


def ends(path: str) -> str:
    """The last two parts of a parameter's path, which name it: its module's name and its own."""
    return ".".join(path.split(".")[-2:])
