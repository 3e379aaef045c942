"""Several answers to each of some prompts, sampled side by side, with the log-probability of each of their tokens.

A row is a (prompt, sample), and which uniform numbers it draws depends on the seed and on its number alone
(sampling.py). The log-probabilities are of the distribution that was sampled from: at the temperature. Of an answer
that ended by itself the stop token is a part: a model learns to end, too.

Where the engine keeps beginnings (prefixes.py) a prompt is prefilled once: its first answer begins a step before the
others, which find what it has made (SmolLM2-135M, 16 prompts of 8 tokens with 8 answers of 8: 6.1 s instead of 6.9 on
one thread). An engine lives for one call: the weights change between two of them, and what it has kept of a prompt
would be another model's.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.generate.engine import ALL_AT_ONCE, Engine
from deltaw.generate.sampling import Sampling
from deltaw.show.progress import Progress, unseen

PLACES = {"cpu": 128, "cuda": 512}  # rows at a time
SAME = b"the weights as they stand"  # an engine's rows are all of one adapter


@dataclass(eq=False)
class Sampled:
    """An answer: the tokens that the model gave, the one that ended it among them unless it is `truncated`; and their
    log-probabilities."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = True

    def to_json(self) -> tuple[list[int], list[float], bool]:
        """For another process: `Sampled(*…)` is the same."""
        return self.tokens, self.logprobs, self.truncated

    @property
    def text_tokens(self) -> list[int]:
        """Those that are text: without the stop token."""
        return self.tokens if self.truncated else self.tokens[:-1]


def sampled(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    samples: int,
    sampling: Sampling,
    stop_ids: AbstractSet[int],
    *,
    first: Sequence[int] = (),
    progress: Progress = unseen,
) -> list[list[Sampled]]:
    """`samples` answers to each prompt, in order. `first`: by prompt, the number of its first row, where they aren't
    simply counted (others of them are sampled elsewhere). `progress` is called with the number of answers that have
    ended. Raises InputError for a prompt that is empty or leaves no room."""
    begin = first or range(0, len(prompts) * samples, samples)
    device = next(model.parameters()).device.type
    places = max(1, min(PLACES.get(device, 128), len(prompts) * samples))
    engine = Engine(model, batch_size=places, piece=ALL_AT_ONCE)
    every = [[Sampled() for _ in range(samples)] for _ in prompts]
    answers: dict[int, Sampled] = {}
    ended = 0

    def add(of: int, sample: int) -> None:
        how: dict[str, Any] = {"number": begin[of] + sample, "logprobs": 0, "tempered": True}
        how["key"] = SAME if samples > 1 and engine.keeps_beginnings else b""
        answers[engine.add(prompts[of], sampling, stop_ids, **how)] = every[of][sample]

    def step() -> None:
        nonlocal ended
        for event in engine.step():
            answer = answers[event.id]
            token = event.stop if event.token is None else event.token
            if token is not None:
                assert event.logprobs is not None
                answer.tokens.append(token)
                answer.logprobs.append(event.logprobs.token)
            if event.token is None:
                answer.truncated, ended = event.stop is None, ended + 1
        progress(ended)

    try:
        for of in range(len(prompts)):
            add(of, 0)
        if engine.keeps_beginnings and samples > 1:
            step()  # the others find the prompts
        for of in range(len(prompts)):
            for sample in range(1, samples):
                add(of, sample)
        while engine.busy:
            step()
    finally:
        engine.close()
    return every
