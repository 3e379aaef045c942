"""Stand-ins: a model's own norms, attention blocks and gated MLPs, run by the hand-written kernels.

A stand-in (base/stand_in.py) takes the place of one submodule on this instance: the same contents, another `forward`.

Nothing is taken on trust and nothing is known by a model's name. A module is a candidate by the parts it has (a weight
and an epsilon; q_proj, k_proj, v_proj, o_proj; gate_proj, up_proj, down_proj). The model then runs once on two short
documents while every candidate's inputs and outputs are watched, and a stand-in is put in only where it gives the
module's own output for the module's own inputs. What a layer does beyond its parts (a norm of queries and keys, a
window, a soft cap, a scale) shows in the call it makes to attention, and is taken from there. A layer that does
something else keeps its own code and is merely slower: `Attached.describe()` counts what stands in.

Whole decoder layers were rejected as the unit: they differ between architectures in residuals, extra norms and scales,
which cost next to nothing, while these three parts are all but the same everywhere. (A recorded pass of a GPU, where
they do cost something, has them for its length: residual.py.)

Letters: T tokens, D hidden size, H query heads, K key/value heads, E head size.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.layer import AdaptedLinear
from deltaw.base.attention import AttentionCall
from deltaw.base.frozen import BringsWeight, FrozenLinear, weight_of
from deltaw.base.passing import Passing, passing_of
from deltaw.base.probe import watched_pass
from deltaw.base.stand_in import StandIn
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.joined import joined_gated_mlp, joined_heads, joined_linears
from deltaw.kernels.lora import ACTIVATIONS, Projection, gated, lora_gated_mlp, lora_linears
from deltaw.kernels.norm import add_rms_norm, rms_norm
from deltaw.kernels.room import room_of
from deltaw.kernels.rotary import rotary, turned

KINDS = ("norm", "attention", "mlp")


class FusedNorm(StandIn):
    """An RMSNorm."""

    def __init__(self, original: nn.Module, offset: float, passing: Passing) -> None:
        super().__init__(original)
        self.offset, self.eps, self.passing = offset, _epsilon(original), passing

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if not self.enabled:
            return self.original(hidden_states)
        return rms_norm(hidden_states, self.weight, self.eps, self.offset, self.room)

    def behind(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + delta, or x itself, and the norm of that), both [..., D]; in the backward what reaches x past the norm
        is added to its gradient in one go."""
        return add_rms_norm(x, delta, self.weight, self.eps, self.offset, self.room)

    @property
    def room(self) -> int:
        """Columns that what reads the norm wants behind it."""
        folded = self.passing.folded
        return 0 if folded is None else folded.room(self.weight.shape[0])


class FusedMLP(StandIn):
    """down(act(gate(x)) ∘ up(x))."""

    def __init__(self, original: nn.Module, activation: str, passing: Passing) -> None:
        super().__init__(original)
        self.activation, self.passing = activation, passing

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if not self.enabled:
            return self.original(x)
        own, ready = self._modules, self.passing.current.ready
        if ready is not None and (gu := ready.linears((own["gate_proj"], own["up_proj"]), x.flatten(0, -2))):
            inner_TI = gated(gu[0], gu[1], self.activation)
            return _linears(self.passing, (own["down_proj"],), inner_TI)[0].view(*x.shape[:-1], -1)
        folded = self.passing.folded
        pair = folded and folded.of((own["gate_proj"], own["up_proj"]))
        if pair and (last := folded.of((own["down_proj"],))):
            y_TD = joined_gated_mlp(x.flatten(0, -2), pair, last, self.activation, room_of(x))
            return y_TD.view(*x.shape[:-1], -1)
        gate, up, down = (_projection(own[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        return lora_gated_mlp(x, gate, up, down, self.activation)


class FusedAttention(StandIn):
    """q, k, v from one input, their norms where there are any, rotation, packed attention, output."""

    def __init__(self, original: nn.Module, call: AttentionCall, passing: Passing) -> None:
        super().__init__(original)
        self.call, self.passing = call, passing

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original's. A pass over packed documents or over a cache of ours is done here, and goes on as it began
        where the stand-in is switched off in between; whatever else is the original's to do."""
        documents, cache = self.passing.current.documents, self.passing.current.cache
        angles, ours = kwargs.get("position_embeddings"), cache is not None or (self.enabled and documents is not None)
        more = args or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None
        if not ours or angles is None or more:
            return self.original(hidden_states, *args, **kwargs)
        x_TD = hidden_states.flatten(0, 1)
        own, ready, head = self._modules, self.passing.current.ready, self.call.head_size
        three = (own["q_proj"], own["k_proj"], own["v_proj"])
        joined = self.passing.folded and self.passing.folded.of(three)
        if joined and cache is None and not own.keys() & {"q_norm", "k_norm"}:
            cos_TR, sin_TR = (angle.flatten(0, 1) for angle in angles)
            q_THE, k_TKE, v_TKE = joined_heads(x_TD, joined, cos_TR, sin_TR, head, room_of(hidden_states))
        else:
            q, k, v = _linears(self.passing, three, x_TD)
            q_THE, k_TKE = (self._norm(name, x, head) for name, x in (("q_norm", q), ("k_norm", k)))
            if ready is not None and angles[0].shape[-1] == head:
                qk = turned(torch.cat([q_THE, k_TKE], 1), *ready.angles(angles, q.dtype))
                q_THE, k_TKE = qk.split([q_THE.shape[1], k_TKE.shape[1]], 1)
            else:
                cos_TR, sin_TR = (angle.flatten(0, 1) for angle in angles)
                q_THE, k_TKE = rotary(q_THE, cos_TR, sin_TR), rotary(k_TKE, cos_TR, sin_TR)
            v_TKE = v.unflatten(-1, (-1, head))
        asked: dict[str, Any] = {"scale": self.call.scale, "window": self.call.window, "softcap": self.call.softcap}
        if cache is not None:
            out_THE = cache.attention(self, q_THE, k_TKE, v_TKE, **asked)
        else:
            assert documents is not None
            out_THE = packed_attention(q_THE, k_TKE, v_TKE, documents, **asked)
        y_TD = _linears(self.passing, (own["o_proj"],), out_THE.flatten(1))[0]
        return y_TD.view(*hidden_states.shape[:-1], -1), None

    def _norm(self, name: str, x_TM: Tensor, head: int) -> Tensor:
        """[T, heads, E]; a norm is over each head or, where its weight is that long, over all of them."""
        norm = self._modules.get(name)
        whole = norm is not None and getattr(norm, "weight", x_TM.new_empty(0)).shape[-1] == x_TM.shape[1] != head
        if norm is not None and whole:
            x_TM = norm(x_TM)
        x_THE = x_TM.unflatten(-1, (-1, head))
        return x_THE if norm is None or whole else norm(x_THE)


FUSED: tuple[type[StandIn], ...] = (FusedNorm, FusedAttention, FusedMLP)


def install(model: nn.Module, kinds: Sequence[str] = KINDS) -> dict[str, StandIn]:
    """Put a stand-in wherever one gives the module's own output, in place. Returns them by path, outer ones last."""
    candidates = {path: module for path, module in model.named_modules() if _kind(module) in kinds}
    if not candidates or not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        return {}  # a module of somebody's own, of which nobody knows how to run it
    try:
        watched, calls, this = watched_pass(model, candidates)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        return {}  # a model that isn't run by tokens alone
    stand_ins: dict[str, StandIn] = {}
    # Norms first: an attention's stand-in, which reads its children when it runs, then has the norms' stand-ins.
    for kind in KINDS:
        for path, module in candidates.items():
            if _kind(module) != kind or path not in watched:
                continue
            stand_in = _build(kind, module, calls.get(module), passing_of(model))
            with passing_of(model).running(this):
                same = stand_in is not None and same_output(stand_in, *watched[path])
            if stand_in is not None and same:
                model.set_submodule(path, stand_in)
                stand_ins[path] = stand_in
    return stand_ins


def installed(model: nn.Module) -> dict[str, StandIn]:
    """The stand-ins that are in place, by path, in the order in which `install` gave them."""
    modules = dict(model.named_modules())
    return {path: module for kind in FUSED for path, module in modules.items() if isinstance(module, kind)}


def put_back(model: nn.Module, stand_ins: Mapping[str, StandIn]) -> None:
    """Put stand-ins in place again that `remove` took out."""
    for path, stand_in in stand_ins.items():
        model.set_submodule(path, stand_in)


def remove(model: nn.Module, stand_ins: dict[str, StandIn]) -> None:
    """Put the originals back."""
    for path, stand_in in reversed(stand_ins.items()):
        model.set_submodule(path, stand_in.original)


def describe(stand_ins: dict[str, StandIn]) -> str:
    """How many of each kind stand in, for logs."""
    names = {FusedNorm: "norms", FusedAttention: "attention blocks", FusedMLP: "MLPs"}
    counts = [(sum(isinstance(s, kind) for s in stand_ins.values()), name) for kind, name in names.items()]
    return "fused " + ", ".join(f"{n} {name}" for n, name in counts if n) if any(n for n, _ in counts) else "not fused"


def _kind(module: nn.Module) -> str:
    """What a module could be, by its parts; "" for nothing that is known here."""
    parts = set(module._modules)
    if parts >= {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return "attention"
    if parts >= {"gate_proj", "up_proj", "down_proj"} and hasattr(module, "act_fn"):
        return "mlp"
    if parts or set(module._parameters) != {"weight"} or "RMSNorm" not in type(module).__name__:
        return ""
    return "norm" if isinstance(module.weight, Tensor) and module.weight.ndim == 1 else ""


def _build(kind: str, module: nn.Module, call: AttentionCall | None, passing: Passing) -> StandIn | None:
    """The stand-in that this module would have, or None."""
    if isinstance(module, StandIn):
        return None
    if kind == "norm":
        offset = _offset(module)
        return None if offset is None else FusedNorm(module, offset, passing)
    names = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    if not all(_can_project(module._modules[name]) for name in names[kind]):
        return None
    if kind == "mlp":
        activation = _activation(module.act_fn)
        return None if activation is None or not _takes_one(module) else FusedMLP(module, activation, passing)
    return None if call is None else FusedAttention(module, call, passing)


def _can_project(module: nn.Module | None) -> bool:
    """A plain linear layer, with updates or not; one that the kernels don't know needs the layer's own forward."""
    if isinstance(module, AdaptedLinear):
        return module.for_kernels
    return isinstance(module, BringsWeight) or (type(module) is nn.Linear and FrozenLinear.can_wrap(module))


def _projection(module: nn.Module | None) -> Projection:
    if isinstance(module, AdaptedLinear):
        return module.projection()
    assert module is not None
    return Projection(weight_of(module), module.bias)  # type: ignore[arg-type]


def _linears(passing: Passing, modules: tuple[nn.Module | None, ...], x_TN: Tensor) -> Sequence[Tensor]:
    """Each module of one x: by what steps of decoding have ready of them, or by their joined matrix (folding.py), where
    there is one."""
    if passing.folded is not None and (joined := passing.folded.of(modules)) is not None:
        return joined_linears(x_TN, joined)
    ready = passing.current.ready
    ys = None if ready is None else ready.linears(modules, x_TN)
    return lora_linears(x_TN, [_projection(module) for module in modules]) if ys is None else ys


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0)


@torch.no_grad()
def _offset(norm: nn.Module) -> float | None:
    """0 for x̂ ∘ w, 1 for x̂ ∘ (1 + w), None for neither; in float64, where nothing hides in rounding."""
    if not _takes_one(norm):
        return None
    wide: Any = copy.deepcopy(norm).cpu().double()  # not every device has float64
    w_D, sizes_T1 = wide.weight, torch.tensor([[1.0], [0.1], [0.01]], dtype=torch.float64)
    x_TD = torch.linspace(-1, 2, 3 * len(w_D), dtype=torch.float64).view(3, -1) * sizes_T1
    own = wide(x_TD)
    for offset in (0.0, 1.0):
        # The module may compute in float32 whatever it is given.
        if torch.allclose(rms_norm(x_TD, w_D, _epsilon(norm), offset), own, rtol=1e-5, atol=1e-6):
            return offset
    return None


def _activation(act: Any) -> str | None:
    """Which of the kernels' activations a module is; by value, for the library has several classes of one formula."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    try:
        own = act(x)
    except (TypeError, RuntimeError):
        return None
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(activation.forward(x), own, rtol=1e-12, atol=1e-12):
            return name
    return None


def _takes_one(module: nn.Module) -> bool:
    """Whether its forward takes one argument: a gate or a residual beside the input is another formula."""
    return len(inspect.signature(module.forward).parameters) == 1


@torch.no_grad()
def same_output(stand_in: StandIn, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether the stand-in gives the output that was watched, up to the roundings of two orders of the same sums."""
    try:
        mine = stand_in(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, KeyError):
        return False
    mine, own = (out[0] if isinstance(out, tuple) else out for out in (mine, output))
    if mine.shape != own.shape or mine.dtype != own.dtype:
        return False
    dtype = own.dtype
    mine, own = mine.cpu().double(), own.cpu().double()
    # Roundings of single elements cancel in a projection, so that half precision can't hide a factor of 1.01.
    unit, factor = max(torch.finfo(dtype).eps, 4e-6), float((mine * own).sum() / own.square().sum())
    return abs(factor - 1) <= unit / 2 and float((mine - own).norm() / own.norm()) <= 4 * unit
