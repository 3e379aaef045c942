"""Trying a fresh adapter before it counts as attached: is the model unchanged, and can the adapter learn?

An adapted layer computes x Wᵀ + b itself. What it stands for may do more than its class says: a hook may change what it
returns, and the model may read `.weight` beside it or instead of it. Neither shows in the modules, so the model runs on
two short documents.

First as it is, forward and back (`observe`). A function mode sees every tensor function, and so each use of a weight
while its own layer isn't running; and a layer whose output gets no gradient would never learn. Then with the fresh
layers, which are ΔW = 0, in place (`differences`): the logits must be the base's to the bit, or, where something rounds
otherwise (another shape of the same product), each layer's output its own base's. Last with the kernels' stand-ins, and
back where it is to be trained (`holds`): the logits up to the stand-ins' rounding, a gradient that reaches the factors.

A router picks other experts where two of them are nearly equal and something before it was rounded otherwise, and then
the logits are others, too, though nothing is wrong. So where they differ, the model is run once more with the choices
and weights that its routers made in the first pass.

A layer that doesn't run on the documents (an expert that no token chose) and a model that isn't run by token ids alone
(somebody's own module) are tried layer by layer on a row of random numbers. On the meta device there is nothing to run.

Letters: T tokens, V vocabulary, N inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltaw.adapter.layer_update import AdaptedLayer, LayerUpdate
from deltaw.base.attention import is_packed
from deltaw.base.batch import Batch
from deltaw.base.experts import FrozenExperts, called
from deltaw.base.frozen import FrozenLinear
from deltaw.base.passing import Pass, passing_of
from deltaw.base.probe import REFUSALS, probe_documents, rounding
from deltaw.errors import InputError

Routed = tuple[Tensor, Tensor]  # experts and weights of each token
NOT_TEXT = "doesn't run on text"
SILENT = "gets no gradient from the model's answers"
READ = "has its weight read by the model itself, past the layer"
CHANGED = "gives something other than what its weight and bias make of its input"


@dataclass(frozen=True)
class Observed:
    """One pass of the base on a batch and back: its logits, which layers ran, which of them were given all its rows
    (`whole`), and why others can't be adapted (`unfit`), or can but would never learn (`idle`). `routes`: what each
    module of experts was told of where tokens go."""

    batch: Batch
    logits_TV: Tensor
    routes: Mapping[str, list[Routed]]
    ran: frozenset[str]
    whole: frozenset[str]
    unfit: Mapping[str, str]
    idle: Mapping[str, str]


def observe(model: nn.Module) -> Observed | None:
    """The base as it is; None where it isn't run by token ids alone."""
    kinds = (FrozenLinear, FrozenExperts)
    linear = {path: module for path, module in model.named_modules() if any(kind.can_wrap(module) for kind in kinds)}
    watch = _Watch(linear)
    hooks: list[Any] = []
    routes: dict[str, list[Routed]] = {}
    try:
        for path, module in linear.items():
            hooks += watch.on(path, module)
            if FrozenExperts.can_wrap(module):
                hooks.append(module.register_forward_pre_hook(_noting(routes.setdefault(path, [])), with_kwargs=True))
        hooks.append(model.get_input_embeddings().register_forward_hook(_with_gradient))  # type: ignore[operator]
        batch = probe_documents(model)
        with _evaluating(model), torch.enable_grad(), watch:
            logits_TV = _logits(model, batch)
    except REFUSALS:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    # An expert that no token chose is one of many; a tower, or attention to an encoder, has none that ran.
    ran = {_family(path) for path in watch.outputs}
    idle = dict.fromkeys([path for path in linear if _family(path) not in ran], NOT_TEXT)
    idle |= dict.fromkeys(watch.without_gradient(logits_TV), SILENT)
    return Observed(
        batch,
        logits_TV.detach(),
        routes,
        frozenset(watch.outputs),
        frozenset(path for path, ys in watch.outputs.items() if all(_rows(y) == len(logits_TV) for y in ys)),
        dict.fromkeys(watch.read, READ),
        idle,
    )


@torch.no_grad()
def differences(model: nn.Module, layers: Mapping[str, AdaptedLayer], base: Observed | None) -> dict[str, str]:
    """Which of the fresh `layers`, in their places, aren't what they stand for, and why. Raises InputError where the
    model differs and no layer does."""
    if any(layer.stored.device.type == "meta" for layer in layers.values()):
        return {}
    alone = {path: layer for path, layer in layers.items() if base is None or path not in base.ran}
    wrong = {path: CHANGED for path, layer in alone.items() if not _same_on_a_row(layer)}
    if base is None or wrong:
        return wrong
    try:
        with _evaluating(model):
            logits_TV = _logits(model, base.batch)
            if torch.equal(logits_TV, base.logits_TV):
                return {}
            wrong = _changed(model, layers, base.batch)
    except AttributeError as error:  # what the model asks of its own layer, and this one doesn't have
        path = next((path for path, layer in layers.items() if layer is getattr(error, "obj", None)), None)
        if path is None:
            raise
        return {path: READ}
    dtype = next(iter(layers.values())).stored.dtype
    if not wrong and not (_near(logits_TV, base.logits_TV, dtype) or _near_as_routed(model, base, dtype)):
        if not base.logits_TV.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            fix = "set train.dtype: bfloat16 or float32" if name == "float16" else "download the base again"
            raise InputError(f"the base answers with NaN or infinity in {name}, without any adapter", fix=fix)
        raise InputError("with a fresh adapter the model doesn't answer as it does without one, so none is attached")
    return wrong


def holds(model: nn.Module, updates: Mapping[str, LayerUpdate], base: Observed | None, *, to_train: bool) -> bool:
    """Whether the model as it will run gives the base's logits, up to rounding. Raises InputError unless it runs and,
    where it is `to_train`, a backward reaches the factors."""
    parameters = [parameter for update in updates.values() for parameter in update.trained().values()]
    if base is None or any(parameter.is_meta for parameter in parameters):
        return True
    reached: list[Tensor] = []
    try:
        with _evaluating(model), torch.set_grad_enabled(to_train):
            logits_TV = _logits(model, base.batch)
            if logits_TV.requires_grad:
                gradients = torch.autograd.grad(logits_TV.square().mean(), parameters, allow_unused=True)
                reached = [gradient for gradient in gradients if gradient is not None]
    except REFUSALS as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"this model can't {'be trained' if to_train else 'run'} with an adapter in it "
            f"({type(error).__name__}: {reason:.200})",
            fix="choose fewer adapter.targets, or use another base" if to_train else "use another base",
        ) from None
    if to_train and not (reached and all(gradient.isfinite().all() for gradient in reached)):
        what = "no gradient reaches the adapter" if not reached else "the gradient isn't finite"
        raise InputError(f"{what} in a pass over text", fix="choose other adapter.targets")
    dtype = next(iter(updates.values())).base.stored.dtype
    known_TV = logits_TV.detach()[:, : base.logits_TV.shape[1]]  # an update may add words
    return _near(known_TV, base.logits_TV, dtype) or _near_as_routed(model, base, dtype)


class _Watch(TorchFunctionMode):
    """Notes what each layer returned, and uses of its weight by anything but its own call."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.outputs: dict[str, list[Tensor]] = {}
        self.read: set[str] = set()
        self._running: list[str] = []
        self._owners: dict[int, set[str]] = {}  # a tied weight has several
        for path, layer in layers.items():
            for parameter in layer.parameters(recurse=False):
                if parameter.ndim >= 2:  # the weight, or the parts of a packed one
                    self._owners.setdefault(id(parameter), set()).add(path)

    def on(self, path: str, module: nn.Module) -> Iterator[Any]:
        def begin(*_: Any) -> None:
            self._running.append(path)

        def end(module: nn.Module, args: Any, output: Tensor | None) -> None:
            self._running.pop()
            self.outputs.setdefault(path, []).extend([] if output is None else [output])

        yield module.register_forward_pre_hook(begin, prepend=True)
        yield module.register_forward_hook(end, always_call=True)

    def without_gradient(self, logits_TV: Tensor) -> list[str]:
        """The layers that ran, and of whose outputs the logits are no function that can be differentiated (not those
        whose gradient is 0 so far: a weight of zeros behind them may be adapted, too)."""
        made = [(path, output) for path, outputs in self.outputs.items() for output in outputs if output.requires_grad]
        try:
            gradients = torch.autograd.grad(logits_TV.square().sum(), [output for _, output in made], allow_unused=True)
        except REFUSALS:  # what trains has to run backward, and is tried itself
            return []
        reached = {path for (path, _), grad in zip(made, gradients, strict=True) if grad is not None}
        return [path for path in self.outputs if path not in reached] if reached else []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, list | tuple) and made else made
        if isinstance(first, Tensor):  # its dtype or shape may be read of any parameter
            for value in (*args, *(kwargs or {}).values()):
                for item in value if isinstance(value, list | tuple) else (value,):
                    owners = self._owners.get(id(item), ())
                    if owners and not owners & set(self._running):
                        self.read |= owners
        return made


def _noting(routes: list[Routed]) -> Any:
    """A hook before a module of experts that adds what it is told to `routes`."""

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        _, experts_TK, weights_TK = called(module, args, kwargs)
        routes.append((experts_TK.detach(), weights_TK.detach()))

    return note


def _replaying(routes: Iterator[Routed]) -> Any:
    """A hook that tells it, each time it is called, what was noted."""

    def replace(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (called(module, args, kwargs)[0], *next(routes)), {}

    return replace


@torch.no_grad()
def _near_as_routed(model: nn.Module, base: Observed, dtype: torch.dtype) -> bool:
    """Whether it gives the base's logits where its tokens go to the experts that they went to in the base's pass."""
    if not base.routes:
        return False
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(_replaying(iter(routes)), with_kwargs=True)
        for path, routes in base.routes.items()
    ]
    try:
        with _evaluating(model):
            return _near(_logits(model, base.batch), base.logits_TV, dtype)
    except StopIteration:  # called more often than it was
        return False
    finally:
        for hook in hooks:
            hook.remove()


def _rows(y: Tensor) -> int:
    return y.shape[:-1].numel()


def _family(path: str) -> str:
    """A path without the numbers of lists."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _with_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_().clone()  # a model may write into it, which no leaf allows


def _logits(model: Any, batch: Batch) -> Tensor:
    """[T, V] in float32 of two short documents, packed where the model runs packed, else in a row."""
    inputs, this = {"input_ids": batch.tokens_T[None]}, Pass()
    if is_packed(model):
        inputs["position_ids"], this = batch.positions_T[None], Pass(documents=batch.documents)
    with passing_of(model).running(this):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0].float()


def _changed(model: nn.Module, layers: Mapping[str, AdaptedLayer], batch: Batch) -> dict[str, str]:
    """The layers whose output in a pass isn't that of what they stand for."""
    wrong: dict[str, str] = {}

    def watch(path: str) -> Any:
        def compare(module: AdaptedLayer, args: Any, kwargs: Any, output: Tensor) -> None:
            if not _near(output, module.base(*args, **kwargs), module.stored.dtype, sure=True):
                wrong[path] = CHANGED

        return compare

    hooks = [layer.register_forward_hook(watch(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        _logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return wrong


def _same_on_a_row(layer: AdaptedLayer) -> bool:
    row, training = layer.sample(), layer.training
    try:
        return _near(layer.eval()(*row), layer.base(*row), layer.stored.dtype, sure=True)
    finally:
        layer.train(training)


def _near(got: Tensor, wanted: Tensor, dtype: torch.dtype, *, sure: bool = False) -> bool:
    """Whether two tensors differ by rounding: of a whole model as plan_forward has it, or (`sure`) of one product."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    got, wanted = got.float(), wanted.float()
    if sure:
        units = 4 * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps)
        allowed = max(units * float(wanted.square().mean().sqrt()), 1e-30)
    else:
        allowed = max(rounding(dtype) * float(wanted.std()), 1e-6)
    return float((got - wanted).square().mean().sqrt()) <= allowed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
