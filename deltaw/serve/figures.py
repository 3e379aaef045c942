"""What a server counts: for `/metrics`, and for saying when a full queue will have a place."""

from bisect import bisect_left
from dataclasses import dataclass, field

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Histogram:
    """How many values lie in each bucket: `counts[i]` are those up to `bounds[i]` (and above the bound before), the
    last those above all."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclass
class Figures:
    """All counts since the server began, except where it says now."""

    running: int = 0  # requests that are being answered now
    waiting: int = 0  # and those in the queue now
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_tokens: int = 0  # of the prompts' tokens, those whose keys and values were there
    ended: dict[str, int] = field(default_factory=dict)  # requests by how they ended: stop, length, cancelled, error
    refused: int = 0  # because the queue was full
    restarts: int = 0  # of the engine
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)
    adapters_attached: int = 0  # now
    adapter_bytes: int = 0  # now
    adapter_hits: int = 0
    adapter_misses: int = 0
    adapter_loads: int = 0
    adapter_failures: int = 0
    adapter_evictions: int = 0
