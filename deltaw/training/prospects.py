"""What the first steps of a run on rewards say of the others: warnings, once of each, where little can be learnt."""

from collections.abc import Callable, Mapping
from statistics import fmean

from deltaw.config import RunConfig

LOOK, MOST = 5, 0.8  # steps in a row; share of groups or answers


class Prospects:
    """Of one process: a run that is resumed may warn again."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._seen: dict[str, list[float]] = {"flat_groups": [], "truncated": []}

    def see(self, figures: Mapping[str, float], step: int) -> None:
        """The figures of a step."""
        for name, seen in list(self._seen.items()):
            seen.append(figures[name])
            if len(seen) >= LOOK and min(seen[-LOOK:]) >= MOST:
                share = fmean(seen[-LOOK:])
                self._say(f"warning: step {step}: {self._words(name, share, figures['reward'])}")
                del self._seen[name]

    def _words(self, name: str, share: float, reward: float) -> str:
        _, samples, longest = self._config.objective.group
        if name == "truncated":
            return (
                f"{share:.0%} of the answers are cut off at {longest:,} tokens: raise objective.max_new_tokens, or "
                "begin with an adapter that has learnt to end (adapter.from)"
            )
        return (
            f"in {share:.0%} of the groups all {samples} answers have the same reward (the mean is {reward:.3g}), and "
            "these teach nothing: take harder or easier prompts, give parts of an answer a reward of their own, raise "
            "objective.temperature, or train on examples first (adapter.from)"
        )
