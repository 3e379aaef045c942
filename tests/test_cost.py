"""What a step costs, without a clock: products counted as they run, bytes as autograd keeps them.

Held to the arithmetic of a LoRA step: FLOPs = 4 T (N_blocks + f · N_head) + 6 T r Σ (in + out) + attention, where f is
the share of supervised tokens; kept for the backward are x once for q, k, v and once for gate, up; gate and up; Q, K, V
and the output of attention; the residual stream at each norm. A fast path that silently stops being taken shows here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw.adapter.attach import Attached, attach
from deltaw.adapter.stand_ins import KINDS
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec
from deltaw.kernels.logprobs import IGNORE

T, LAYERS, RANK = 256, 3, 16
# SmolLM2-135M's own shape, fewer layers and words.
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
VOCABULARY = 1000
LINEARS = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]  # in, out
N_BLOCK, N_HEAD = sum(i * o for i, o in LINEARS), 576 * VOCABULARY
LOW_RANK = 6 * RANK * sum(i + o for i, o in LINEARS)


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, 2 for a multiplication and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.batched = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif name in ("bmm", "baddbmm", "baddbmm_"):
            left, right = args[-2:]
            self.batched += 2 * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
        return func(*args, **(kwargs or {}))


def model(layers: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def prepared(fuse: tuple[str, ...] = KINDS, **spec: Any) -> tuple[Forward, Attached]:
    base = model()
    return plan_forward(base), attach(base, AdapterSpec(rank=RANK, alpha=32, **spec), fuse=fuse)


def batch(supervised: float = 1.0, length: int = 64) -> Batch:
    """T random tokens in documents of `length`, the last `supervised` share of each with a label."""
    tokens = torch.randint(VOCABULARY, (T,), generator=torch.Generator().manual_seed(0))
    at = torch.arange(T) % length
    labels = tokens.roll(-1).masked_fill(at < length * (1 - supervised), IGNORE)
    return Batch.of(tokens, range(0, T + 1, length), labels)


def flops(forward: Forward, given: Batch) -> Products:
    with Products() as products:
        forward.loss(given)[0].backward()
    return products


def kept_bytes(call: Callable[[], Tensor], parameters: set[int]) -> int:
    """Bytes of distinct storage that autograd holds after the forward, frozen weights and factors left out."""
    storages: dict[int, int] = {}
    held = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(x)  # or its storage's address could be taken again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storages.values())


def kept_per_token_and_layer(fuse: tuple[str, ...], length: int) -> float:
    forward, attached = prepared(fuse)
    weights = {p.untyped_storage().data_ptr() for p in attached.model.parameters()}
    given = batch(supervised=1 / 64, length=length)
    return kept_bytes(lambda: forward.loss(given)[0], weights) / (T * LAYERS)


@pytest.mark.parametrize("supervised", [1.0, 0.25])
def test_products_of_a_step_are_what_the_arithmetic_says(supervised: float) -> None:
    forward, _ = prepared()
    got = flops(forward, batch(supervised))
    # The first block's q, k, v and gate, up hand nothing down: no ∂L/∂x, neither through W nor through A, for q, k, v.
    qkv = LINEARS[:3]
    below = sum(2 * i * o for i, o in qkv) + 2 * RANK * sum(i for i, _ in qkv)
    wanted = T * (4 * (LAYERS * N_BLOCK + supervised * N_HEAD) + LAYERS * LOW_RANK - below)
    assert got.flops == pytest.approx(wanted, rel=1e-3)


def test_attention_computes_only_what_is_seen() -> None:
    """Seven products (two forward, one again, four backward, P kept: six) over each document's own scores."""
    for length, products, share in ((64, 6, 1.0), (256, 7, 0.625)):
        forward, _ = prepared()
        scores = T * length * share * 9 * 64
        assert flops(forward, batch(length=length)).batched == 2 * products * scores * LAYERS


def test_nothing_is_computed_below_the_lowest_adapter() -> None:
    top, _ = prepared(targets=tuple(f"model.layers.{LAYERS - 1}.mlp.{name}_proj" for name in ("gate", "up", "down")))
    mlp = LINEARS[4:]
    low_rank = 6 * RANK * sum(i + o for i, o in mlp)
    # ∂L/∂x of gate and up, whose input needs none: 2 products less, and the same for their A.
    below = sum(2 * i * o for i, o in mlp[:2]) + 2 * RANK * sum(i for i, _ in mlp[:2])
    blocks = 2 * LAYERS * N_BLOCK + sum(2 * i * o for i, o in mlp)
    assert flops(top, batch()).flops == pytest.approx(T * (blocks + 4 * N_HEAD + low_rank - below), rel=1e-3)


def test_down_proj_alone_in_the_lowest_layer_costs_no_gradient_of_its_input() -> None:
    forward, _ = prepared(targets=("model.layers.2.mlp.down_proj",))
    wanted = T * (2 * LAYERS * N_BLOCK + 4 * N_HEAD + 2 * RANK * (2 * 1536 + 2 * 576) + 2 * RANK * 576)
    assert flops(forward, batch()).flops == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("length", [64, 256])
def test_bytes_kept_for_the_backward(length: int) -> None:
    """bfloat16: at most 14 KiB per token and layer, P of short documents (at most Q, K and V once more) aside."""
    short = 9 * 64 * 2 if length == 64 else 0
    got = kept_per_token_and_layer(KINDS, length) - short
    assert 10 * 1024 < got < 14.5 * 1024
    assert got < 0.75 * kept_per_token_and_layer((), length)
