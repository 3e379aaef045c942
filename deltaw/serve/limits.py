"""What one request may ask of a server: bounds that keep a hostile client's cost near an ordinary one's.

They aren't options, since nobody would know what to set. What depends on the model (context, vocabulary) is read off
it. A bound that is crossed is a 400 or a 413 that names it, never a silent cut; `max_tokens` beyond what the context
has left isn't wrong, for the answer then says `finish_reason: length`.
"""

from dataclasses import dataclass

from deltaw.base.frozen import embedding_of
from deltaw.model import Model


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    context: int  # tokens of a prompt and its answer together
    vocabulary: int
    body: int = 2**20
    headers: int = 2**14
    head_seconds: float = 10.0  # for a request's line and headers
    body_seconds: float = 30.0
    stall_seconds: float = 60.0  # that a client may leave its answer unread
    connections: int = 512
    depth: int = 64  # of lists and objects in JSON
    rows: int = 64  # answers of one request: prompts x n
    n: int = 16
    stops: int = 16
    stop_length: int = 200  # characters
    top_logprobs: int = 20
    biases: int = 1024
    answer: int = 2048  # tokens of a chat's answer, where the client doesn't say
    share: float = 0.75  # of all places that one client may take

    @staticmethod
    def of(model: Model) -> "Limits":
        """For a model."""
        return Limits(model.context, embedding_of(model.base.model).shape[0])
