"""Running a causal LM on documents laid end to end: the loss and the logits of a packed batch.

transformers' attention registry is the extension point. The attention registered here as `deltaw` is `packed_attention`
when the call carries `documents` (an unknown keyword, which transformers hands through to attention), and otherwise
scaled-dot-product attention, so that training and generation need no switch. Its mask function makes no mask for a
full causal pass: a packed batch would need one of T² entries.

Not every architecture plays along (state-space layers mix neighbours, ALiBi rides on the mask, attention sinks are an
argument of their own), and not every head is a plain product. Nothing is taken on trust: `plan_forward` runs two short
documents packed and apart, and looks whether one can see the other. A model that fails is run on padded batches, or
with its own head, and `Forward.describe()` says so.

Letters: T tokens of a batch, S documents + 1, B documents of a padded batch, L the longest, D hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.base.prefix import Prefix, Tokens
from deltaw.kernels.attention import Documents, packed_attention
from deltaw.kernels.loss import IGNORE, linear_cross_entropy

ATTENTION = "deltaw"


@dataclass(frozen=True)
class AttentionCall:
    """What a module asks of attention beside its queries, keys and values. Window in tokens, itself included."""

    head_size: int
    scale: float | None
    window: int | None
    softcap: float | None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    calls: dict[nn.Module, AttentionCall] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, L, E], key and value [B, K, L', E] -> [B, L, H, E].

    `calls`, if given, is told who called and how (`watched_pass`).
    """
    if s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention with sinks or a position bias")
    if calls is not None:
        calls[module] = AttentionCall(query.shape[3], scaling, sliding_window, softcap)
    plain = attention_mask is None and query.shape[2] == key.shape[2]
    if documents is None and plain:
        rows, length = query.shape[0], query.shape[2]
        documents = Documents([i * length for i in range(rows + 1)], query.device)
    if documents is not None and plain:
        out = packed_attention(
            query.transpose(1, 2).flatten(0, 1),
            key.transpose(1, 2).flatten(0, 1),
            value.transpose(1, 2).flatten(0, 1),
            documents,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
        )
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None
    if softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    return _capped_attention(query, key, value, attention_mask, scaling, softcap), None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Masked attention with soft-capped scores (Gemma 2), for generation: [B, L, H, E]."""
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3)
    scores = softcap * torch.tanh(scores * (scaling or query.shape[-1] ** -0.5) / softcap)
    if mask is not None:
        # Not −∞: a padding token that sees nothing must not become NaN, which its value rows would hand on.
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a full causal pass, transformers' own for everything else (padding, a cache)."""
    q_length, kv_length = kwargs.get("q_length"), kwargs.get("kv_length")
    if kwargs.get("attention_mask") is None and q_length == kv_length and not kwargs.get("q_offset"):
        return None
    kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


@dataclass(frozen=True)
class Head:
    """What turns hidden rows into logits: z = cap(scale · (W h + bias))."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def loss(self, hidden_TD: Tensor, labels_T: Tensor) -> tuple[Tensor, int]:
        """(sum of the losses in nats, count of labels)."""
        return linear_cross_entropy(
            hidden_TD,
            self.linear.weight,
            labels_T,
            bias_V=self.linear.bias,
            scale=self.scale,
            softcap=self.softcap,
        )

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in float32."""
        z_TV = self.scale * self.linear(hidden_TD).float()
        return z_TV if self.softcap is None else self.softcap * torch.tanh(z_TV / self.softcap)


@dataclass(frozen=True)
class Forward:
    """How a model is run: packed or padded, with the head fused into the loss or through the model's own.

    Built by `plan_forward`. Knows nothing of adapters: they sit inside the model's linear layers.
    """

    model: nn.Module
    head: Head | None
    packed: bool
    prefix: Prefix | None = None  # frozen layers that are not computed again

    def describe(self) -> str:
        """One line for logs: which path runs."""
        batches = "packed documents" if self.packed else "padded batches (this model mixes packed documents)"
        head = "fused head and loss" if self.head else "the model's own head"
        below = f", {self.prefix.first} frozen layers computed once" if self.prefix else ""
        return f"{batches}, {head}{below}"

    def loss(self, tokens_T: Tensor, labels_T: Tensor, positions_T: Tensor, starts_S: Tensor) -> tuple[Tensor, int]:
        """(sum over labelled tokens of the cross-entropy in nats, their count). Labels are already shifted."""
        if not (labels_T != IGNORE).any():
            return tokens_T.new_zeros((), dtype=torch.float32), 0
        hidden_TX = self._rows(tokens_T, positions_T, starts_S)
        if self.head is not None:
            return self.head.loss(hidden_TX, labels_T)
        rows = labels_T != IGNORE
        loss = nn.functional.cross_entropy(hidden_TX[rows].float(), labels_T[rows], reduction="sum")
        return loss, int(rows.sum())

    def logits(self, tokens_T: Tensor, positions_T: Tensor, starts_S: Tensor) -> Tensor:
        """[T, V] in float32: for tests and small inputs; training never forms it."""
        hidden_TX = self._rows(tokens_T, positions_T, starts_S)
        return hidden_TX.float() if self.head is None else self.head.logits(hidden_TX)

    def above(self, layers: str, first: int, batches: Iterable[Tokens], progress: Callable[[int], None]) -> "Forward":
        """This forward for passes over the documents of `batches`, begun at layer `first` of the module list `layers`.

        Right as long as nothing below changes. Itself where that can't be done.
        """
        if not self.packed or not first:
            return self
        prefix = Prefix(self.model, layers, first)
        if prefix.fill(dataclasses.replace(self, prefix=prefix)._rows, batches, progress):
            return dataclasses.replace(self, prefix=prefix)
        prefix.remove()
        return self

    def _rows(self, tokens_T: Tensor, positions_T: Tensor, starts_S: Tensor) -> Tensor:
        """A row a token: hidden [T, D] where the head is known, else logits [T, V]."""
        if self.packed:
            documents = Documents(starts_S.tolist(), tokens_T.device)
            with self.prefix.replayed(tokens_T, starts_S) if self.prefix else nullcontext():
                rows = self._run(input_ids=tokens_T[None], position_ids=positions_T[None], documents=documents)
            return rows.squeeze(0)
        starts = starts_S.tolist()
        length_B = starts_S.diff()
        real_BL = torch.arange(int(length_B.max()), device=tokens_T.device) < length_B[:, None].to(tokens_T.device)
        ids_BL = tokens_T.new_zeros(real_BL.shape)
        ids_BL[real_BL] = tokens_T
        if len(starts) == 2:  # nothing is padded
            return self._run(input_ids=ids_BL).squeeze(0)
        return self._run(input_ids=ids_BL, attention_mask=real_BL.long())[real_BL]

    def _run(self, **inputs: Any) -> Tensor:
        if self.head is None:
            out: Tensor = self.model(**inputs, use_cache=False).logits
        else:
            out = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
        return out


@torch.no_grad()
def plan_forward(model: nn.Module) -> Forward:
    """The fastest way to run `model` that gives its own answers: tried on two short documents, not assumed.

    On success the model is left on the `deltaw` attention, otherwise on the one it came with.
    """
    probe = _Probe.on(model)
    padded = Forward(model, _find_head(model), packed=False)
    if not probe.fits_apart(padded):
        padded = dataclasses.replace(padded, head=None)  # the model's own way, which needs no proof
    packed = dataclasses.replace(padded, packed=True)
    own = model.config._attn_implementation  # type: ignore[union-attr]
    try:
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        if probe.fits(packed) and probe.isolated(packed):
            return packed
    except (NotImplementedError, TypeError, ValueError, RuntimeError, KeyError):
        pass  # what a model says that can't be run this way
    model.set_attn_implementation(own)  # type: ignore[operator]
    return padded


Seen = tuple[tuple[Any, ...], dict[str, Any], Any]  # a module's arguments and its output


@torch.no_grad()
def watched_pass(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Seen], dict[Any, AttentionCall]]:
    """One pass over two short documents: (what each of `modules` was first given and gave, who called attention how).

    A model that `plan_forward` left on packed attention runs packed here, too; the calls are empty for any other.
    """
    tokens_T, positions_T, starts_S = _two_documents(model)
    inputs: dict[str, Any] = {"input_ids": tokens_T[None], "position_ids": positions_T[None]}
    calls: dict[Any, AttentionCall] = {}
    if model.config._attn_implementation == ATTENTION:  # type: ignore[union-attr]
        inputs |= {"documents": Documents(starts_S.tolist(), tokens_T.device), "calls": calls}
    else:
        inputs = {"input_ids": tokens_T[None]}
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
    return seen, calls


def _cloned(value: Any) -> Any:
    """Tensors copied (a model may go on to write into them), tuples gone through, the rest as it is."""
    if isinstance(value, tuple):
        return tuple(_cloned(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


def _two_documents(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_T, positions_T, starts_S) of two documents of 5 and 7 tokens."""
    lengths, device = (5, 7), next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens_T = (torch.arange(sum(lengths), device=device) * 7919 + 13) % vocabulary
    positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
    return tokens_T, positions_T, torch.tensor([0, lengths[0], sum(lengths)])


@dataclass(frozen=True)
class _Probe:
    """Two short documents and the model's own logits for each, run apart with its own attention."""

    tokens_T: Tensor
    positions_T: Tensor
    starts_S: Tensor
    truth_TV: Tensor
    tolerance: float

    @staticmethod
    def on(model: nn.Module) -> "_Probe":
        tokens_T, positions_T, starts_S = _two_documents(model)
        lengths = starts_S.diff().tolist()
        dtype = next(model.parameters()).dtype
        truth = [model(input_ids=part[None], use_cache=False).logits[0].float() for part in tokens_T.split(lengths)]
        truth_TV = torch.cat(truth)
        # The root mean square of two roundings of the same sums, in units of a typical logit: the storage's (9 units in
        # the last place measured in bfloat16 after 30 layers; the model's own code is 12 from float32's answer) and
        # the accumulators', which long sums multiply (float32 after 30 layers: at most 100). A wrong path is off by 1.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tolerance = (25 * torch.finfo(dtype).eps + 300 * torch.finfo(wide).eps) * float(truth_TV.std())
        return _Probe(tokens_T, positions_T, starts_S, truth_TV, max(tolerance, 1e-6))

    def fits(self, forward: Forward) -> bool:
        """Whether both documents, run together, get the logits that the model gives them apart."""
        return self._is_truth(forward.logits(self.tokens_T, self.positions_T, self.starts_S))

    def fits_apart(self, forward: Forward) -> bool:
        """Whether each document, run alone, gets them: then only the head can differ, and rounding between batches
        (a state space's, or experts chosen by a hair) is no matter."""
        lengths = self.starts_S.diff().tolist()
        parts = zip(self.tokens_T.split(lengths), self.positions_T.split(lengths), lengths, strict=True)
        try:
            logits = [forward.logits(tokens, positions, torch.tensor([0, n])) for tokens, positions, n in parts]
        except RuntimeError:
            return False  # a head that can't even be multiplied (a dtype of its own, say)
        return self._is_truth(torch.cat(logits))

    def _is_truth(self, logits_TV: Tensor) -> bool:
        return float((logits_TV - self.truth_TV).square().mean().sqrt()) <= self.tolerance

    @torch.enable_grad()
    def isolated(self, forward: Forward) -> bool:
        """Whether the second document's logits have exactly no gradient at the first one's embeddings.

        Comparing logits instead would need a tolerance, and bfloat16's would hide a faint leak.
        """
        embedded: list[Tensor] = []

        def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = forward.model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
        try:
            logits_TV = forward.logits(self.tokens_T, self.positions_T, self.starts_S)
        finally:
            hook.remove()
        cut = int(self.starts_S[1])
        (grad,) = torch.autograd.grad(logits_TV[cut:].square().sum(), embedded)
        grad_TD = grad.reshape(len(self.tokens_T), -1)
        return not grad_TD[:cut].any() and bool(grad_TD[cut:].any())


def _find_head(model: nn.Module) -> Head | None:
    """The output head as a plain product, with the scale and the cap that the config names; verified by the caller."""
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(linear, nn.Linear) or model.base_model is model:
        return None
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear, scale, softcap)
