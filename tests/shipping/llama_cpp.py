"""Real llama.cpp beside transformers: the next token's log-probabilities of a GGUF, with adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.shipping.verify.sides.llama import LlamaCpp

pytest.importorskip("xllamacpp", reason="pip install xllamacpp, a build of llama.cpp")


def next_token(model: Path, adapters: Sequence[Path], prompts: Sequence[Sequence[int]]) -> Tensor:
    """[prompts, vocabulary] by llama.cpp, on one thread."""
    with LlamaCpp(model, adapters, threads=1) as llama:
        return torch.stack([_asked(llama, prompt) for prompt in prompts])


LETTER = 65  # "A" in the tests' vocabulary. The answer is forced to it: of half a character the server tells nothing


def _asked(llama: LlamaCpp, prompt: Sequence[int]) -> Tensor:
    body = {"prompt": list(prompt), "n_predict": 1, "n_probs": 1_000_000, "logit_bias": [[LETTER, 1e6]]}
    (step,) = llama.client.ask("/completion", body)["completion_probabilities"]
    logs = torch.full([len(step["top_logprobs"])], torch.nan)
    for token in step["top_logprobs"]:
        logs[token["id"]] = token["logprob"]
    return logs


@torch.no_grad()
def by_transformers(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The same by a model in torch."""
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(0) for prompt in prompts])
