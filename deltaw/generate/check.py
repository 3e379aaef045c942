"""What a model can't be asked to go on with: found before a row is made of it."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from deltaw.base.frozen import embedding_of
from deltaw.errors import InputError
from deltaw.generate.cache import context

NO_BIAS: Mapping[int, float] = MappingProxyType({})


def check(
    model: nn.Module,
    prompt: Sequence[int],
    number: int,
    bias: Mapping[int, float] = NO_BIAS,
    *,
    full: bool = False,
) -> None:
    """Raise InputError for a prompt that the model can't be given, or a bias to what it doesn't have. `full`: the
    prompt may fill the context."""
    most, vocabulary = context(model) + full, embedding_of(model).shape[0]
    if len(prompt) == 0:
        raise InputError(f"prompt {number} is empty", fix="begin with at least one token, such as bos")
    if len(prompt) >= most:
        including = "" if full else ", including the answer,"
        raise InputError(
            f"prompt {number} has {len(prompt):,} tokens; the context{including} holds {context(model):,}",
            fix="shorten it",
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise InputError(f"prompt {number} holds ids outside the model's vocabulary of {vocabulary:,}")
    if bias and (min(bias) < 0 or max(bias) >= vocabulary):
        raise InputError(f"the bias of prompt {number} is to ids outside the model's vocabulary of {vocabulary:,}")
    if any(not math.isfinite(value) for value in bias.values()):
        raise InputError(f"the bias of prompt {number} isn't finite", fix="use -100 to forbid a token")
