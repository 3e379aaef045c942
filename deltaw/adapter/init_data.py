"""Initialisers that need data: a layer's inputs (eva), the gradient of its weight (lora-ga).

Both watch the base, its adapter switched off, on a few batches: hooks on the frozen layers add up

    eva        Σ (x − μ)(x − μ)ᵀ [N, N], float64, over all tokens     one pass forward
    lora-ga    ∂L/∂W = Σ Gᵀ x [M, N], float32, L the run's objective  one pass forward and back

and init.py turns each sum into factors. A running mean is subtracted batch by batch and the batches' means are joined
as in Chan, Golub & LeVeque (1983): XᵀX − T μμᵀ would lose the small directions beside the few inputs of language models
that are a thousand times the others. No weight gets a gradient of its own: the embeddings' output is made the leaf that
the backward goes down to, and Gᵀ x is formed where G passes by.

Memory is bounded: layers are taken in groups whose sums fit into `BUDGET` bytes, each group with passes of its
own, so a large model costs time and not memory. The batches are the caller's, and the same ones give the same bits.

On padded batches (a model that mixes packed documents) eva counts the padding's inputs, too. Labels don't matter to
eva: what enters a layer does so at every token.

Letters: T tokens, N inputs, M outputs.
"""

import abc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from deltaw.adapter.attach import Attached
from deltaw.adapter.dora import DoRAUpdate
from deltaw.adapter.init import eva_directions, lora_ga_factors
from deltaw.adapter.layer import LowRankUpdate
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.base.frozen import FrozenLinear
from deltaw.base.objective import Objective, sft
from deltaw.data.loader import fill
from deltaw.errors import RunError
from deltaw.show.progress import QUIET, Display

BUDGET = 2 << 30  # bytes of sums held at a time


def initialise_from_data(
    attached: Attached,
    forward: Forward,
    batches: Sequence[Batch],
    display: Display = QUIET,
    objective: Objective = sft,
) -> None:
    """Set every layer's start as `attached.spec.init` (eva or lora-ga) says, from `batches`, which lie on its device;
    `objective`: what they are to be better by, whose reference is the base.

    Raises RunError for a layer that the batches tell nothing of, or NaN, and ValueError for an init that needs no data.
    """
    if not attached.spec.from_data:
        raise ValueError(f"init {attached.spec.init} needs no data")
    kind = _Inputs if attached.spec.init == "eva" else _Gradient
    bases = {path: base for path, layer in attached.layers.items() if isinstance(base := layer.base, FrozenLinear)}
    paths = [path for path in bases if isinstance(attached.layers[path], LowRankUpdate | DoRAUpdate)]
    groups = fill(range(len(paths)), [kind.bytes_of(bases[path]) for path in paths], BUDGET)
    with display.task(f"init {attached.spec.init}", len(groups) * len(batches)) as progress:
        for number, group in enumerate(groups):
            sums = {paths[index]: kind(bases[paths[index]]) for index in group}
            hooks = [bases[path].register_forward_hook(total.watch) for path, total in sums.items()]
            hooks += [_leaf(attached.model)] if kind is _Gradient else []
            try:
                for done, batch in enumerate(batches, 1 + number * len(batches)):
                    _pass(attached, forward, batch, objective if kind is _Gradient else None)
                    progress(done)
            finally:
                for hook in hooks:
                    hook.remove()
            for path in list(sums):
                layer = attached.layers[path]
                assert isinstance(layer, LowRankUpdate | DoRAUpdate)
                layer.start(*sums.pop(path).factors(layer.lora_a.shape[0], path))


def _pass(attached: Attached, forward: Forward, batch: Batch, objective: Objective | None) -> None:
    """The base on one batch, and back from the objective."""
    batch = attached.taken_by(batch)
    with attached.disabled(), torch.set_grad_enabled(objective is not None):
        if objective is None:
            forward.rows(batch)
            return
        scores = forward.scores(batch)
        if objective.references:  # which is the base, as it stands here
            batch = replace(batch, references=tuple(batch.by_document(scores.logp_K.detach()).tolist()))
        if batch.supervised:
            objective(scores, batch).backward()


def _leaf(model: Any) -> RemovableHandle:
    """Makes the embeddings' output the leaf of the graph: nothing else in a frozen model would begin one."""
    hook: RemovableHandle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.detach().requires_grad_()
    )
    return hook


class _Sum(abc.ABC):
    """What is added up for one layer."""

    @staticmethod
    @abc.abstractmethod
    def bytes_of(base: FrozenLinear) -> int:
        """How much is held."""

    @abc.abstractmethod
    def watch(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of the frozen layer."""

    @abc.abstractmethod
    def factors(self, rank: int, path: str) -> tuple[Tensor, Tensor]:
        """A [R, N] and B [M, R] to begin at. Raises RunError that names `path`."""


class _Inputs(_Sum):
    """The count, the mean and the scatter of a layer's inputs."""

    def __init__(self, base: FrozenLinear) -> None:
        n, self.outputs = base.in_features, base.out_features
        self.count = 0
        self.mean_N = torch.zeros(n, dtype=torch.float64, device=base.weight.device)
        self.scatter_NN = self.mean_N.new_zeros(n, n)

    @staticmethod
    def bytes_of(base: FrozenLinear) -> int:
        return 8 * base.in_features**2

    def watch(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x_TN = inputs[0].detach().flatten(0, -2)
        mean_N = x_TN.mean(0, dtype=torch.float64)
        centred_TN = (x_TN - mean_N).float()  # subtracted in float64; what is left has no digits to lose
        self.scatter_NN += centred_TN.T @ centred_TN
        count, apart_N = self.count + len(x_TN), mean_N - self.mean_N
        self.scatter_NN += (self.count * len(x_TN) / count) * torch.outer(apart_N, apart_N)
        self.mean_N += (len(x_TN) / count) * apart_N
        self.count = count

    def factors(self, rank: int, path: str) -> tuple[Tensor, Tensor]:
        _check(self.scatter_NN, path)
        a_RN = eva_directions(self.scatter_NN, rank)
        return a_RN, a_RN.new_zeros(self.outputs, rank)


class _Gradient(_Sum):
    """∂L/∂W of a layer."""

    def __init__(self, base: FrozenLinear) -> None:
        self.gradient_MN = torch.zeros(base.weight.shape, device=base.weight.device)

    @staticmethod
    def bytes_of(base: FrozenLinear) -> int:
        return 4 * base.in_features * base.out_features

    def watch(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x_TN = inputs[0].detach().flatten(0, -2)

        def add(g: Tensor) -> None:
            self.gradient_MN.addmm_(g.flatten(0, -2).float().T, x_TN.float())

        output.register_hook(add)

    def factors(self, rank: int, path: str) -> tuple[Tensor, Tensor]:
        _check(self.gradient_MN, path)
        return lora_ga_factors(self.gradient_MN, rank)


def _check(total: Tensor, path: str) -> None:
    if not total.any() or not torch.isfinite(total).all():
        wrong = "NaN or infinity" if total.any() else "nothing but zeros"
        raise RunError(
            f"{path}: the first batches give {wrong}, and no start can be made from that", fix="use init: lora"
        )
