"""FrozenExperts: the experts of a mixture as transformers 5 keeps them, and what an adapter needs to know of them.

transformers keeps the matrices of all experts of a layer in one parameter of three dimensions, and calls the module
that has them with the tokens, the experts that the router chose for each, and their weights. Every architecture that
takes part in its choice of implementations (`experts_implementation`) computes one formula,

    Σ_k weight_k · down_e(gate(in_e(x))),    e the k-th expert of x

with `in` called gate_up_proj (gate and up in one, side by side or by turns, which `_apply_gate` knows) or up_proj, both
with or without a bias, stored [E, M, N] or [E, N, M] (`is_transposed`). The module itself says which of these it is, so
nothing is known here by a model's name; what a module does beside that shows when an adapter is tried (adapter/trial).

A model whose experts aren't kept so (Llama 4 and JetMoE, whose experts are called in another way) has none that can be
adapted, and they are named among what is left out. docs/models.md has each type.

A `FrozenStack` is one parameter by itself, the weight that an update belongs to: `<module>.<name>` is its path, and
`<module>.<name>[e]` that of one expert's matrix.

Letters: T tokens, K experts of each, E experts, M outputs, N inputs.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.frozen import PLAIN, Stored

FLAGS = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "num_experts",
)  # what a module of transformers' interface says of itself
DOWN = "down_proj"


class FrozenStack:
    """One parameter of an experts' module: E matrices."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    transposed = False  # PEFT's word, for a base of Conv1D

    @property
    def turned(self) -> bool:
        """Whether the module stores each as [N, M]."""
        return bool(self.module.is_transposed)

    @property
    def w_EMN(self) -> Tensor:
        """All of them, a view of the base's own storage."""
        stored: Tensor = getattr(self.module, self.name)
        return stored.transpose(1, 2) if self.turned else stored

    @property
    def bias_EM(self) -> Tensor | None:
        """The biases, or None."""
        return getattr(self.module, f"{self.name}_bias") if self.module.has_bias else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, M, N)."""
        e, m, n = self.w_EMN.shape
        return e, m, n

    @property
    def stored(self) -> Stored:
        """How the module stores them."""
        return Stored.of(getattr(self.module, self.name))


class FrozenExperts(nn.Module):
    """One interface over the experts' modules. Raises TypeError where `can_wrap` refuses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not self.can_wrap(module):
            raise TypeError(f"{type(module).__name__} doesn't keep its experts as transformers' interface does")
        self.module = module

    @staticmethod
    def can_wrap(module: nn.Module) -> bool:
        """Whether this is an experts' module of transformers' interface, its matrices plain floating parameters."""
        if not all(hasattr(module, flag) for flag in FLAGS) or getattr(module, "_is_expert_parallel", False):
            return False
        names = names_of(module)
        known = {*names, *(f"{name}_bias" for name in names)}
        stacks = [module._parameters.get(name) for name in names]
        return set(module._parameters) <= known and all(
            type(stack) is nn.Parameter and stack.ndim == 3 and stack.dtype in PLAIN for stack in stacks
        )

    def stack(self, name: str) -> FrozenStack:
        """One of its parameters."""
        return FrozenStack(self.module, name)

    @property
    def module_names(self) -> tuple[str, str]:
        """The names of its two parameters, in the order of the products."""
        return names_of(self.module)

    @property
    def count(self) -> int:
        """E."""
        return self.stack(DOWN).shape[0]

    @property
    def stored(self) -> Stored:
        """How the matrices of the last product are stored."""
        return self.stack(DOWN).stored

    def inner(self, y_SM: Tensor) -> Tensor:
        """What stands between the two products."""
        module: Any = self.module
        inner: Tensor = module._apply_gate(y_SM) if module.has_gate else module.act_fn(y_SM)
        return inner

    def after(self, y_SM: Tensor) -> Tensor:
        """What comes behind them, before the router's weights."""
        module: Any = self.module
        normed: Tensor = module.post_expert_norm(y_SM) if getattr(module, "has_post_expert_norm", False) else y_SM
        return normed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module itself computes it."""
        y: Tensor = self.module(*args, **kwargs)
        return y

    @torch.no_grad()
    def with_weights(self, stacks: dict[str, Tensor]) -> nn.Module:
        """A new module of its own kind with these matrices [E, M, N] by name, rounded once."""
        made = copy.deepcopy(self.module)
        for name, w_EMN in stacks.items():
            FrozenStack(made, name).w_EMN.copy_(w_EMN)
        return made


def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, N], experts [T, K] and weights [T, K] of a call of experts, whatever they call their arguments."""
    if not kwargs:
        x, experts, weights = args
        return x, experts, weights
    names = list(inspect.signature(type(module).forward).parameters)[1:4]
    x, experts, weights = (*args, *(kwargs[name] for name in names[len(args) :]))
    return x, experts, weights


def names_of(module: nn.Module) -> tuple[str, str]:
    """Its two parameters, in the order of its products (and of the module's own parameters)."""
    return ("gate_up_proj" if module.has_gate else "up_proj", DOWN)


def expert_stacks(model: nn.Module) -> dict[str, FrozenStack]:
    """Every parameter of experts that can be adapted, by its path, in the model's order."""
    return {
        f"{path}.{name}": FrozenStack(module, name)
        for path, module in model.named_modules()
        if FrozenExperts.can_wrap(module)
        for name in names_of(module)
    }


def chosen(model: nn.Module) -> int:
    """How many experts a token goes to, by the config (transformers' names for it differ); 1 where it doesn't say."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in (
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_k",
        "num_selected_experts",
    ):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
        if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
            return max(1, min(value))
    return 1
