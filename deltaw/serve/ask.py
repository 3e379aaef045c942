"""What is asked of a server's worker and what it answers: values, without a thread or a tensor in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from deltaw.errors import DeltawError
from deltaw.generate.sampling import Sampling

if TYPE_CHECKING:
    from deltaw.generate.grammar import Grammar
    from deltaw.generate.logprobs import Logprobs

Finish = Literal["stop", "length"]
MOST_SCALE = 2.0  # the slider's end


class Busy(DeltawError):
    """The queue is full. `retry_after`: in how many seconds there should be a place, by the speed measured so far."""

    def __init__(self, what: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(what, fix=f"try again in {retry_after} s")


class Unknown(DeltawError):
    """No adapter of this name is served."""

    exit_code = 2


@dataclass(frozen=True)
class Ask:
    """One request. `adapter`: the name of an adapter, None for the base alone; `scale` multiplies its update (0 to
    `MOST_SCALE`).

    `stop`: texts at which an answer ends, left out of it; `stop_ids`: tokens that end it, None for the model's own.
    `logprobs`: of each token its own and those of so many likely ones. `bias`: what is added to a token's logit. `n`:
    how many answers. `echo`: the prompt comes first, with its logprobs where they are asked for; without `answer` it is
    all that comes (OpenAI's `max_tokens: 0`). `grammar`: what the answers are held to. `shown`: control
    tokens that their text has nevertheless. `client`: whom it is from; waiting clients take turns.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    scale: float = 1.0
    logprobs: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    echo: bool = False
    answer: bool = True
    client: str = ""
    stop_ids: frozenset[int] | None = None
    grammar: "Grammar | None" = None
    shown: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Piece:
    """A piece of answer number `index`. `tokens` are those that its text is made of; a half character or the beginning
    of a stop text is kept back with its tokens until more is known. `logprobs` are those of `tokens`, one for each,
    where they were asked for; None stands for a prompt's first token, which nothing foretells.

    `echoed`: it is the prompt. `finish` is set on an answer's last piece, whose text may be empty.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: "tuple[Logprobs | None, ...] | None" = None
    finish: Finish | None = None
    echoed: bool = False
