"""Trying a model when it is opened: this finds out what nobody can know about an architecture from its name.

Two documents are run through the model apart, by its own code, and whatever deltaw would do in its place must come to
the same. They are short where a pass is expensive, but a model may behave differently beyond some length (a window, a
chunk, another scaling), and its config states that length as a number. So every border is crossed:

* the second document is longer than each number in the config that a pass of a second or so allows (all of them, in a
  small model);
* what the masks let through is asked of their functions at places on both sides of each number, however large
  (attention.py), and must be what attention is told: `masks_are_told`;
* rotary angles are asked for at such places, too (angles.py);
* what is left is tried on a small copy of the model, its numbers made small (small.py).

Letters: T tokens of the documents, S documents + 1, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.attention import Calls, is_packed, packed_attention_of, pairs
from deltaw.base.batch import Batch
from deltaw.base.frozen import dtype_of, stored_of
from deltaw.base.passing import Pass, passing_of

SHORT = (5, 7)  # tokens of the two documents where the config has no number that is dear to cross
BUDGET = 4e9  # parameters x tokens of a pass: under half a second on two cores
LONGEST = 512
FURTHER = 9  # tokens beyond a border
CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
)  # names of a context's length

Logits = Callable[[Batch], Tensor]
Seen = tuple[tuple[Any, ...], dict[str, Any], Any]  # a module's arguments and its output
# What a model says that can't be run as it is asked to.
REFUSALS = (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError)


def probe_documents(model: nn.Module) -> Batch:
    """Two documents end to end, the second beyond as many borders of the config as a pass of this model allows."""
    device = next(model.parameters()).device
    lengths = (SHORT[0], max(SHORT[1], _crossing(model)))
    words = model.get_input_embeddings()  # type: ignore[operator]
    stored = stored_of(getattr(words, "base", words))  # the base's own words, whatever an adapter adds
    assert stored is not None
    vocabulary = stored.shape[0]
    tokens_T = (torch.arange(sum(lengths), device=device) * 7919 + 13) % vocabulary
    return Batch.of(tokens_T, [0, lengths[0], sum(lengths)])


def borders(config: Any) -> set[int]:
    """Every whole number above 1 in a config, at any depth: what a model does from some length on is among them."""
    if isinstance(config, Mapping):
        return {n for value in config.values() for n in borders(value)}
    if isinstance(config, list | tuple):
        return {n for value in config for n in borders(value)}
    if isinstance(config, float) and config.is_integer():
        config = int(config)
    return {config} if type(config) is int and 1 < config < 2**31 else set()


def uncrossed(model: nn.Module) -> bool:
    """Whether the config has a number that the probe's documents don't reach and that may be a length."""
    return max(_lengths(model.config.to_dict()), default=0) >= _crossing(model)  # type: ignore[union-attr, operator]


def _lengths(config: Any) -> set[int]:
    """The numbers of a config that aren't token ids, a base of frequencies or the context (where angles alone change).

    Sizes of weights are among them: a name doesn't say which is which.
    """
    if isinstance(config, Mapping):
        named = {str(name): value for name, value in config.items() if name not in CONTEXTS}
        return {
            n for name, value in named.items() if "_id" not in name and "theta" not in name for n in _lengths(value)
        }
    return borders(config)


def _contexts(model: nn.Module) -> set[int]:
    """How many places there are, by what the config says and by the tables that they may be looked up in."""
    named = [getattr(model.config, name, None) for name in CONTEXTS]
    lengths = [length for length in named if isinstance(length, int)] + [len(table.weight) for table in _tables(model)]
    return {length for length in lengths if length > sum(SHORT)}


def _tables(model: nn.Module) -> list[nn.Embedding]:
    """Embeddings of something else than tokens: of places, perhaps."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]


def _crossing(model: nn.Module) -> int:
    """The length that crosses all borders within reach: of the budget, and of a table of positions."""
    size = sum(parameter.numel() for parameter in model.parameters())
    reach = min(int(BUDGET / size), LONGEST, min(_contexts(model), default=LONGEST) - SHORT[0])
    crossed = [border + FURTHER for border in borders(model.config.to_dict()) if border < reach]  # type: ignore[union-attr, operator]
    return min(max(crossed, default=0), reach)


@torch.no_grad()
def masks_are_told(model: nn.Module) -> bool:
    """Whether attention is told, in its arguments, all that the model's masks ask for, at any length.

    Leaves the model on the attention that asks.
    """
    model.set_attn_implementation(packed_attention_of(model))  # type: ignore[operator]
    batch, calls = probe_documents(model), Calls(ask=True)
    with passing_of(model).running(Pass(probe=calls)):
        model(input_ids=batch.tokens_T[None, : batch.starts[1]], use_cache=False)
    places = pairs(borders(model.config.to_dict()), batch.tokens_T.device)  # type: ignore[union-attr, operator]
    kinds = {(call.sees, call.masked, call.window): call for call in calls.values()}  # a mask is for many layers
    return all(call.honest(*places) for call in kinds.values())


@torch.no_grad()
def watched_pass(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Seen], Calls, Pass]:
    """One pass over two documents: (what each of `modules` was first given and gave, who called attention, the pass).

    The second document stands at places beyond every border in the config, so that what a module does by place (a
    temperature, say) shows. A model that `plan_forward` left on packed attention runs
    packed here, too; the calls are empty for any other.
    """
    batch, calls = probe_documents(model), Calls()
    inputs = {"input_ids": batch.tokens_T[None]}
    if not is_packed(model):
        return _watched(model, modules, inputs), calls, Pass()
    positions_T = batch.positions_T.clone()
    positions_T[batch.starts[1] :] += _far(model, len(positions_T))
    with passing_of(model).running(Pass(documents=batch.documents, probe=calls)):
        seen = _watched(model, modules, {**inputs, "position_ids": positions_T[None]})
    return seen, calls, Pass(documents=batch.documents)


def _far(model: nn.Module, tokens: int) -> int:
    """A place beyond every border in the config or, where places may be looked up in a table, near the table's end."""
    context = min(_contexts(model), default=0)
    if _tables(model) or any(max(buffer.shape, default=0) >= max(context, 1) for buffer in model.buffers()):
        return max(0, context - tokens)
    return 2 * max(_lengths(model.config.to_dict()), default=0)  # type: ignore[union-attr, operator]


def _watched(model: nn.Module, modules: Mapping[str, nn.Module], inputs: dict[str, Any]) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}

    def watch(path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen.setdefault(path, (_cloned(args), {k: _cloned(v) for k, v in kwargs.items()}, _cloned(output)))

        return note

    hooks = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in modules.items()]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _cloned(value: Any) -> Any:
    """Tensors copied (a model may go on to write into them), tuples gone through, the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_cloned(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


def rounding(dtype: torch.dtype) -> float:
    """The root mean square, in units of a typical logit, that two roundings of the same pass may differ by.

    The storage's (9 units in the last place measured in bfloat16 after 30 layers; a model's own code is 12 from
    float32's answer) and the accumulators', which long sums multiply (float32 after 30 layers: at most 100). A wrong
    path is off by 1.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return 25 * torch.finfo(dtype).eps + 300 * torch.finfo(wide).eps


def _parts(batch: Batch) -> tuple[Tensor, ...]:
    """The tokens of each document."""
    return batch.tokens_T.tensor_split(batch.starts[1:-1])


@dataclass(frozen=True)
class Probe:
    """The probe's documents and the model's own logits for each, run apart with its own attention."""

    batch: Batch
    truth_TV: Tensor
    tolerance: float

    @staticmethod
    def on(model: nn.Module) -> "Probe":
        batch, dtype = probe_documents(model), dtype_of(model)
        truth = [model(input_ids=part[None], use_cache=False).logits[0].float() for part in _parts(batch)]
        truth_TV = torch.cat(truth)
        return Probe(batch, truth_TV, max(rounding(dtype) * float(truth_TV.std()), 1e-6))

    def fits(self, logits: Logits) -> bool:
        """Whether both documents, run together, get the logits that the model gives them apart."""
        return self._is_truth(logits(self.batch))

    def fits_apart(self, logits: Logits) -> bool:
        """Whether each document, run alone, gets them: then only the head can differ, and rounding between batches
        (a state space's, or experts chosen by a hair) doesn't matter."""
        try:
            got = [logits(Batch.of(tokens, [0, len(tokens)])) for tokens in _parts(self.batch)]
        except RuntimeError:
            return False  # a head that can't even be multiplied (a dtype of its own, say)
        return self._is_truth(torch.cat(got))

    def shares(self, logits: Logits) -> bool:
        """Whether two copies of the second document that share their first half get its logits. A model may find out by
        itself where documents end (from positions that start over), and then knows nothing of those that go on."""
        begin = self.batch.starts[1]
        tokens_L, truth_LV = (x[begin : begin + 4 * FURTHER] for x in (self.batch.tokens_T, self.truth_TV))
        half, length = len(tokens_L) // 2, len(tokens_L)
        twice = torch.cat([tokens_L, tokens_L[half:]])
        batch = Batch.of(twice, [0, half, length, len(twice)], parents=[-1, 0, 0])
        try:
            return self._is_truth(logits(batch), torch.cat([truth_LV, truth_LV[half:]]))
        except REFUSALS:
            return False

    def _is_truth(self, logits_TV: Tensor, truth_TV: Tensor | None = None) -> bool:
        """The last tokens count by themselves, too: they may be all that lies beyond the farthest border."""
        error_T = (logits_TV - (self.truth_TV if truth_TV is None else truth_TV)).square().mean(1)
        return all(float(part.mean().sqrt()) <= self.tolerance for part in (error_T, error_T[-FURTHER:]))

    @torch.enable_grad()
    def isolated(self, model: nn.Module, logits: Logits) -> bool:
        """Whether the second document's logits have exactly no gradient at the first one's embeddings.

        Comparing logits instead would need a tolerance, and bfloat16's would hide a faint leak.
        """
        embedded: list[Tensor] = []

        def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
        try:
            logits_TV = logits(self.batch)
        finally:
            hook.remove()
        cut = self.batch.starts[1]
        (grad,) = torch.autograd.grad(logits_TV[cut:].square().sum(), embedded)
        grad_TD = grad.reshape(len(logits_TV), -1)
        return not grad_TD[:cut].any() and bool(grad_TD[cut:].any())
