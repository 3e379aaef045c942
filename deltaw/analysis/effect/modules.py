"""How much each module's update adds to what its weight gives: ‖ΔW x‖ / ‖W x‖ on the inputs x that really reach it.

    effect     the mean of ‖ΔW x_t‖ / ‖W x_t‖ over the tokens t of a kind of text
    random     the same for inputs drawn at random, of independent normal entries: what ΔW's and W's size alone give

A weight's relative change ‖ΔW‖_F / ‖W‖_F speaks of inputs in all directions alike, and a model's inputs lie in few. An
update that reads from those its task uses has more effect on the task's text than on other text, and more on either
than on random inputs. Where all three agree, the update hasn't found anything of the task's.

The tuned model runs by its own code (the kernels' stand-ins off), one document at a time: so every row that a module is
given is a token's, and a document is the unit of the intervals, whatever the model does with rows in between. x is what
enters in the tuned model. ΔW x is formed in float32 from the factors, W x as the module's output less bias and ΔW x.

Letters: T tokens, N inputs, M outputs, D documents, Z random inputs.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter.attach import Attached
from deltaw.adapter.layer_update import LayerUpdate
from deltaw.analysis.effect.states import Trained
from deltaw.base.stand_in import disabled
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.evaluation.intervals import Interval, Scores, interval
from deltaw.generate.cache import evaluating
from deltaw.model import Model
from deltaw.show.progress import Display

DOCUMENTS, LONGEST = 12, 96  # of each kind, and tokens of one
RANDOM = 64  # inputs
TINY = 1e-30


@dataclass(frozen=True)
class ModuleEffect:
    """One module's, by kind of text; `random` is chance. None where no token reached it (an expert, say)."""

    of: Mapping[str, Interval | None]
    random: float

    def value(self, kind: str) -> float | None:
        one = self.of.get(kind)
        return None if one is None else one.value

    def to_json(self) -> dict[str, Any]:
        return {**{kind: one and one.to_json() for kind, one in self.of.items()}, "random": self.random}


@torch.no_grad()
def module_effects(
    model: Model, rows: Mapping[str, Sequence[Example]], trained: Trained, display: Display
) -> dict[str, ModuleEffect]:
    """By module path; of linear layers alone: an expert's rows are known to its whole module only."""
    attached = model.attached
    assert attached is not None
    chosen = {kind: [_cut(row) for row in examples[:DOCUMENTS]] for kind, examples in rows.items()}
    watched = {kind: _watch(model, attached, trained, kind, examples, display) for kind, examples in chosen.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        path: ModuleEffect(
            {kind: _mean(seen.get(path, [])) for kind, seen in watched.items()},
            _random(layer, trained[path], generator),
        )
        for path, layer in _linear(attached).items()
    }


def _linear(attached: Attached) -> dict[str, LayerUpdate]:
    return {path: layer for path, layer in attached.layers.items() if layer.home(path) == path}


def _cut(row: Example) -> Example:
    return row if len(row.tokens) <= LONGEST else row.cut(LONGEST)


def _watch(
    model: Model, attached: Attached, trained: Trained, kind: str, examples: Sequence[Example], display: Display
) -> dict[str, list[tuple[float, int]]]:
    """By module: for each document that reached it, (the sum over its tokens, how many they are)."""
    seen: dict[str, list[tuple[float, int]]] = {path: [] for path in _linear(attached)}

    def note(path: str) -> Any:
        def hook(layer: LayerUpdate, args: tuple[Tensor, ...], y: Tensor) -> None:
            ratio_T = _ratios(layer, trained[path], args[0], y)
            seen[path].append((float(ratio_T.sum()), len(ratio_T)))

        return hook

    with ExitStack() as stack, display.task(f"effect on {kind} tokens", len(examples)) as progress:
        stack.enter_context(evaluating(model.base.model))
        stack.enter_context(disabled(list(attached.stand_ins.values())))
        for path, layer in _linear(attached).items():
            stack.callback(layer.register_forward_hook(note(path)).remove)
        for number, example in enumerate(examples, 1):
            model.forward.rows(pack([example]).to(model.base.device))
            progress(number)
    return seen


def _ratios(layer: LayerUpdate, update: Any, x: Tensor, y: Tensor) -> Tensor:
    """[T]: ‖ΔW x‖ / ‖W x‖ of each row, 0 where W gives nothing."""
    x_TN, y_TM = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
    added_TM = update.relative_to(layer.base.weight).apply(x_TN)
    bias_M = layer.base.bias_M
    own_TM = y_TM - added_TM - (0 if bias_M is None else bias_M.float())
    return _over(added_TM, own_TM)


def _random(layer: LayerUpdate, update: Any, generator: torch.Generator) -> float:
    weight = layer.base.weight
    z_ZN = torch.randn(RANDOM, weight.shape[1], generator=generator).to(weight.device)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    own_ZM = weight.matmul(z_ZN.to(dtype)).float()
    return float(_over(update.relative_to(weight).apply(z_ZN), own_ZM).mean())


def _over(added_TM: Tensor, own_TM: Tensor) -> Tensor:
    size_T = own_TM.norm(dim=1)
    return torch.where(size_T > TINY, added_TM.norm(dim=1) / size_T.clamp(min=TINY), 0.0)


def _mean(documents: Sequence[tuple[float, int]]) -> Interval | None:
    """Over all tokens; the interval by drawing documents."""
    return interval(Scores(np.array(documents)), seed=0) if documents else None
