"""What gpu.py measures: models of known shapes with random weights, and text in documents at their real lengths, the
same in every process.

Letters: T tokens of a batch laid end to end, S documents + 1, B documents of a padded one, L the longest.
"""

import bisect
import collections
import gc
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
LONGEST = 2048  # tokens of a document, where a shape doesn't say

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"layers": 30, "hidden": 576, "inner": 1536, "heads": (9, 3), "vocabulary": 49152, "tied": True},
    "1b": {"layers": 16, "hidden": 2048, "inner": 8192, "heads": (32, 8), "vocabulary": 128256, "tied": True},
    "8b": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": (32, 8), "vocabulary": 128256, "tied": False},
    "8b-4k": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": (32, 8), "vocabulary": 128256, "tied": False}
    | {"longest": 4096, "shortest": 4096},
    "toy": {"layers": 2, "hidden": 64, "inner": 96, "heads": (4, 2), "vocabulary": 512, "tied": True, "longest": 40},
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much is measured: of `steps` timed ones at least three, however long they take."""

    sizes: tuple[int, ...] = (2048, 8192)
    warm: int = 3
    steps: int = 12
    seconds: float = 4.0
    square: int = 8192


TOY = Effort(sizes=(64, 128), warm=1, steps=3, seconds=1.0, square=64)


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end (labels shifted, starts on the CPU), and padded at the end (labels not shifted)."""

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    starts_S: Tensor
    ids_BL: Tensor
    padded_BL: Tensor
    count: int

    @cached_property
    def packed(self) -> Any:
        """As deltaw is given it: documents laid end to end, what they need for attention worked out."""
        from deltaw.base import batch

        return batch.Batch.of(self.tokens_T, self.starts_S.tolist(), self.labels_T)

    @cached_property
    def on_host(self) -> Any:
        """The same as deltaw's loader gives it."""
        from deltaw.base import batch

        return batch.Batch.of(self.tokens_T.cpu(), self.starts_S.tolist(), self.labels_T.cpu())

    @staticmethod
    def of(documents: Sequence[Sequence[int]], device: str) -> "Batch":
        lengths = [len(document) for document in documents]
        tokens_T = torch.tensor(list(itertools.chain(*documents)))
        starts_S = torch.tensor([0, *itertools.accumulate(lengths)])
        labels_T = torch.cat([tokens_T[1:], tokens_T[:1]])
        labels_T[starts_S[1:] - 1] = IGNORE
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        ids_BL = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        padded_BL = torch.full(ids_BL.shape, IGNORE)
        for row, document in enumerate(documents):
            ids_BL[row, : len(document)] = padded_BL[row, : len(document)] = torch.tensor(document)
        there = [x.to(device) for x in (tokens_T, labels_T, positions_T)]
        return Batch(*there, starts_S, ids_BL.to(device), padded_BL.to(device), sum(lengths) - len(lengths))


def longest_of(shape: str) -> int:
    """Tokens of its longest document."""
    longest: int = SHAPES[shape].get("longest", LONGEST)
    return longest


@cache
def reference(vocabulary: int, longest: int, shortest: int = 0) -> list[list[int]]:
    """The language reference's texts and pieces, the shortest first, as ids by frequency. Where the shortest is to be
    as long as the longest, all texts are one, in pieces of that length."""
    texts = [re.findall(r"\w+|[^\w\s]", text) for _, text in sorted(topics.items())]
    ranked = [word for word, _ in collections.Counter(itertools.chain(*texts)).most_common()]
    number = {word: rank % vocabulary for rank, word in enumerate(ranked)}
    pieces, draw = [], random.Random(0)
    if shortest == longest:
        ids = [number[word] for word in itertools.chain(*texts)]
        return [ids[start : start + longest] for start in range(0, len(ids) - longest + 1, longest)]
    for text in texts:
        while text:
            length = len(text) if len(text) <= longest else draw.randint(longest // 8, longest)
            pieces.append([number[word] for word in text[:length]])
            text = text[length:]
    return sorted((piece for piece in pieces if len(piece) >= longest // 64 + 2), key=len)


def batches(shape: str, size: int, count: int, device: str) -> list[Batch]:
    """`count` batches of `size` tokens from all over the range of lengths: documents of like length, each cut a little.

    Cutting the last alone would leave it far shorter than the rest, and whoever pads would pay for that.
    """
    shortest = SHAPES[shape].get("shortest", 0)
    texts, found = reference(SHAPES[shape]["vocabulary"], longest_of(shape), shortest), []
    ends = list(itertools.accumulate(map(len, texts)))
    for part in range(count):
        # From the middle of the part-th of `count` equal shares of all tokens, or so that enough are left.
        start = bisect.bisect_left(ends, min((part + 0.5) / count * ends[-1], ends[-1] - size + 1))
        before = ends[start - 1] if start else 0
        chosen = texts[start : bisect.bisect_left(ends, before + size) + 1]
        whole = sum(map(len, chosen))
        cuts = [round(end * size / whole) for end in itertools.accumulate(map(len, chosen), initial=0)]
        lengths = [after - before for before, after in itertools.pairwise(cuts)]
        found.append(Batch.of([text[:length] for text, length in zip(chosen, lengths, strict=True)], device))
    random.Random(0).shuffle(found)
    return found


def build_model(shape: str, device: str) -> Any:
    """In bfloat16, weights by the generator alone, so that every process has the same."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa")
    fill_weights(model)
    return model.requires_grad_(False).train()


def _config(shape: str) -> Any:
    from transformers import LlamaConfig

    s = SHAPES[shape]
    return LlamaConfig(
        vocab_size=s["vocabulary"],
        hidden_size=s["hidden"],
        intermediate_size=s["inner"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"][0],
        num_key_value_heads=s["heads"][1],
        tie_word_embeddings=s["tied"],
        max_position_embeddings=8192,
        use_cache=False,
    )


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Matrices from N(0, 0.02²), norms about one."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for _, weight in sorted(model.named_parameters()):
        weight.normal_(std=0.02, generator=generator)
        if weight.ndim == 1:
            weight.add_(1.0)


def products(shape: str) -> list[tuple[int, int]]:
    """(out, in) of a decoder layer's linear layers."""
    s = SHAPES[shape]
    d, i, kv = s["hidden"], s["inner"], s["hidden"] * s["heads"][1] // s["heads"][0]
    return [(d, d), (kv, d), (kv, d), (d, d), (i, d), (i, d), (d, i)]


def flops_per_token(shape: str) -> int:
    """4 (N_blocks + N_head)."""
    s = SHAPES[shape]
    blocks = s["layers"] * sum(rows * columns for rows, columns in products(shape))
    return 4 * (blocks + s["hidden"] * s["vocabulary"])


@torch.no_grad()
def fill_factors(parameters: Mapping[str, nn.Parameter]) -> None:
    """The same in every arm. B is not zero, or dA would be."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(parameters):
        parameter = parameters[name]
        std = 0.01 if name.endswith(".B") else parameter.shape[1] ** -0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
