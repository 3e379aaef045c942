"""Which prompts may be decoded side by side: found by trying the model, not from a list of architectures.

Rows of one length are safe with nearly every model: nothing is padded, and all rows are at the same place, which is
what rotary frequencies that depend on the longest position (longrope, dynamic NTK) need. Anything more is tried:

    company   two rows of one length get what each gets alone;
    padding   a short row beside a long one gets it, too;
    leaving   a row can be dropped from the cache, and the other goes on as if it had never been there;
    border    the tokens up to which a pass leaves the model as it was. Frequencies are buffers, which such a model
              writes into when a position lies beyond; below the border the rows' lengths don't matter.

"Gets what it gets alone" is two things: its logits have exactly no gradient at the padding or at the other row, which
finds a faint leak (into a state space, say) in any number format, and they are near those of the row alone, which finds
wrong positions. How near is near enough is measured: rounding between batches, and experts that are chosen by a hair,
don't matter.

The trial takes some fifteen passes over a few tokens, once per model and way of attention.
"""

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.frozen import dtype_of
from deltaw.base.probe import REFUSALS, rounding
from deltaw.generate.cache import State, context, padded, text_config

SHORT, LONG = 4, 11  # tokens of the prompts that are tried


@dataclass(frozen=True)
class Together:
    """What rows may share a batch. The defaults: one row at a time."""

    company: bool = False
    padding: bool = False
    leaving: bool = False
    border: int | None = None  # None: no border within reach

    @staticmethod
    def on(model: nn.Module, most: int, *, alone: bool = False) -> "Together":
        """For rows of at most `most` tokens, on a model in eval mode; `alone`: there is only one."""
        border = border_of(model, min(most, context(model)))
        if alone:
            return Together(border=border)
        way = (dtype_of(model), model.config._attn_implementation)  # type: ignore[union-attr]
        if _tried.get(model, (None,))[0] != way:
            _tried[model] = way, Trial(model).result()
        return dataclasses.replace(_tried[model][1], border=border)

    def crosses(self, tokens: int) -> bool:
        """Whether a row of so many tokens, answer included, goes beyond the border."""
        return self.border is not None and tokens > self.border


_tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Together]] = weakref.WeakKeyDictionary()  # spares the passes


class Trial:
    """A short prompt and two long ones, and what the model gives for each alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, next(model.parameters()).device
        ids_T = (torch.arange(SHORT + 2 * LONG, device=self.device) * 7919 + 13) % text_config(model).vocab_size
        self.short, self.long, self.other = ids_T.split([SHORT, LONG, LONG])
        self.units = max(rounding(dtype_of(model)), 1e-6)

    def result(self) -> Together:
        try:
            short, long, other = (self.logits([ids])[:, 0] for ids in (self.short, self.long, self.other))
            batched = self.distance([self.long, self.other], [long, other])
            company = batched < 0.5 and self.isolated([self.long, self.other])
        except REFUSALS:
            company = False
        if not company:
            return Together()
        near = max(self.units, 3 * batched)
        return Together(
            company=True,
            padding=_holds(
                lambda: (
                    self.distance([self.short, self.long], [short, long]) <= near
                    and self.isolated([self.short, self.long])
                )
            ),
            leaving=_holds(lambda: self.distance([self.other, self.long], [long], leave=True) <= near),
        )

    @torch.no_grad()
    def logits(self, prompts: list[Tensor], *, leave: bool = False) -> Tensor:
        """[2, R, V], after the prompts and after one token more. With `leave` the first row leaves in between."""
        state = State(self.model, *padded([ids.tolist() for ids in prompts], self.device))
        first_RV = state.forward()
        state.append(self.other[:1].expand(len(prompts)))
        if leave:
            state.keep(torch.tensor([1], device=self.device))
            first_RV = first_RV[1:]
        return torch.stack([first_RV, state.forward()]).double()

    def distance(self, prompts: list[Tensor], alone: list[Tensor], *, leave: bool = False) -> float:
        """How far the logits together are from those alone."""
        return self.apart(self.logits(prompts, leave=leave), torch.stack(alone, 1))

    @staticmethod
    def apart(mine: Tensor, truth: Tensor) -> float:
        """Root mean square between logits, in units of a typical one."""
        return float((mine - truth).square().mean().sqrt() / truth.std())

    @torch.enable_grad()
    def isolated(self, prompts: list[Tensor]) -> bool:
        """Whether the first row's logits have a gradient at its own tokens, and none at padding or the other row."""
        embedded: list[Tensor] = []

        def watch(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        state = State(self.model, *padded([ids.tolist() for ids in prompts], self.device))
        hook = self.model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
        try:
            logits_RV = state.forward()
        finally:
            hook.remove()
        (grad_RLD,) = torch.autograd.grad(logits_RV[0].square().sum(), embedded[-1:])
        own = len(prompts[0])
        return not grad_RLD[1:].any() and not grad_RLD[0, :-own].any() and bool(grad_RLD[0, -own:].any())


def _holds(trial: Callable[[], bool]) -> bool:
    try:
        return trial()
    except REFUSALS:
        return False


def border_of(model: nn.Module, most: int) -> int | None:
    """The most tokens that a pass may hold without writing into the model's buffers; None where `most` may be held.
    Looked for once: the passes that it takes would be felt before every answer's first token."""
    tried, border = _borders.get(model, (0, None))
    if border is None and most > tried:
        tried = min(2 ** (most - 1).bit_length(), context(model))  # longer rows will come
        border = _border(model, tried)
        _borders[model] = tried, border
    return border if border is not None and border < most else None


_borders: weakref.WeakKeyDictionary[nn.Module, tuple[int, int | None]] = weakref.WeakKeyDictionary()


def _border(model: nn.Module, most: int) -> int | None:
    if "position_ids" not in State(model, *padded([[0]], next(model.parameters()).device)).accepted:
        return None

    def writes(tokens: int) -> bool:
        come_to_rest(model)
        before = _frequencies(model)
        _one_token(model, tokens - 1)
        return any(not torch.equal(old, new) for old, new in zip(before, _frequencies(model), strict=True))

    if not writes(most):
        return None
    low, high = 1, most  # the first doesn't, the second does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if writes(middle) else (middle, high)
    come_to_rest(model)
    return low


def come_to_rest(model: nn.Module) -> None:
    """Take frequencies that grew in a long pass (dynamic NTK) back to the model's own, as any short pass does."""
    _one_token(model, 0)


@torch.no_grad()
def _one_token(model: nn.Module, position: int) -> None:
    device = next(model.parameters()).device
    model(
        input_ids=torch.tensor([[0]], device=device),
        position_ids=torch.tensor([[position]], device=device),
        use_cache=False,
    )


def _frequencies(model: nn.Module) -> list[Tensor]:
    """Copies of the small floating-point buffers, rotary frequencies among them."""
    return [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
