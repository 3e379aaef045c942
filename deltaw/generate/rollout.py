"""Several answers to each of some prompts, sampled side by side, with the log-probability of each of their tokens.

A row is a (prompt, sample), and which uniform numbers it draws depends on the seed and on its number alone
(sampling.py). The log-probabilities are of the distribution that was sampled from: at the temperature. Of an answer
that ended by itself the stop token is a part: a model learns to end, too.

A prompt is prefilled once for all of its samples where the engine keeps beginnings (prefixes.py) and it is long enough
for that to pay. An engine lives for one call: the weights change between two of them, and what it has kept of a prompt
would be another model's.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import nn

from deltaw.generate.engine import ALL_AT_ONCE, Engine
from deltaw.generate.prefixes import SMALL
from deltaw.generate.sampling import Sampling
from deltaw.show.progress import Progress, unseen

PLACES = {"cpu": 128, "cuda": 512}  # rows at a time
SAME = b"the weights as they stand"  # an engine's rows are all of one adapter
LONG = 2 * SMALL  # tokens of a prompt from which on it is shared


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
    rows = [(of, begin[of] + sample) for of in range(len(prompts)) for sample in range(samples)]
    device = next(model.parameters()).device.type
    engine = Engine(model, batch_size=max(1, min(PLACES.get(device, 128), len(rows))), piece=ALL_AT_ONCE)
    answers: dict[int, Sampled] = {}
    try:
        for of, number in rows:
            prompt = prompts[of]
            key = SAME if samples > 1 and len(prompt) > LONG else b""
            how = {"number": number, "key": key, "logprobs": 0, "tempered": True}
            answers[engine.add(prompt, sampling, stop_ids, **how)] = Sampled()  # type: ignore[arg-type]
        ended = 0
        while engine.busy:
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
    finally:
        engine.close()
    every = list(answers.values())
    return [every[at : at + samples] for at in range(0, len(every), samples)]
