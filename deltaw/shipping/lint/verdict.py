"""From findings to a verdict per destination, an exit code, and the text that is printed.

The exit code is for a build that shouldn't ship what answers wrongly. Without `--to` it depends on the destinations
that read the given form as it is (READERS; for a folder in PEFT's layout: PEFT, transformers, vLLM): 1 if the first of
them refuses it, or if any of them would answer wrongly. A loud refusal by the others isn't a failure, since nobody
ships by accident what doesn't load; nor is what llama.cpp, Ollama and mlx-lm would make of another form, since
deltaw's exports are the way there. With `--to` it is 1 unless each of the named destinations loads it and answers
rightly.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deltaw.errors import InputError
from deltaw.shipping.lint.finding import (
    DESTINATIONS,
    LLAMA_CPP,
    LOADS,
    OLLAMA,
    REFUSED,
    UNSURE,
    WRONG,
    Effect,
    Finding,
)
from deltaw.shipping.lint.forms import READERS, Form


def destinations(names: Iterable[str]) -> tuple[str, ...]:
    """The names in lint's spelling. An unknown one is refused: it mustn't look like one without findings."""
    lowered = tuple(name.lower() for name in names)
    if strange := [name for name in lowered if name not in DESTINATIONS]:
        raise InputError(f"{strange[0]!r} isn't a destination", fix=f"one of {', '.join(DESTINATIONS)}")
    return lowered


ROUTES = {  # how a form that isn't its own reaches a destination
    ("peft", LLAMA_CPP): "through its own converter",
    ("peft", OLLAMA): "given this folder",
    ("model", LLAMA_CPP): "through its own converter",
    ("model", OLLAMA): "given this folder",
}
WIDTH = 110


@dataclass(frozen=True)
class Verdict:
    """All findings. `form`: what it is; `asked`: the destinations of --to, empty for all of them."""

    name: str
    form: Form
    base: str
    findings: tuple[Finding, ...]
    asked: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def at(self, destination: str) -> Effect:
        """The worst effect at a destination. Raises InputError for an unknown one."""
        (destination,) = destinations([destination])
        return max((f.effects.get(destination, LOADS) for f in self.findings), default=LOADS)

    @property
    def shown(self) -> list[Finding]:
        """The findings about the destinations asked for, those worst for programs that read it as it is first."""
        readers = [place for place in self._asked if place in READERS[self.form]]
        concern = [finding for finding in self.findings if set(self._asked) & finding.effects.keys()]
        return sorted(concern, key=lambda f: (-f.worst_of(readers), -f.worst_of(self._asked), f.code))

    @property
    def exit_code(self) -> int:
        """0, or 1 for an adapter that shouldn't be shipped."""
        if self.asked:
            return int(any(self.at(place) > UNSURE for place in self.asked))
        readers = READERS[self.form]
        return int(self.at(readers[0]) == REFUSED or any(self.at(place) == WRONG for place in readers))

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": self.name,
            "form": self.form,
            "base": self.base or None,
            "verdicts": {
                place: {
                    "verdict": self.at(place).name.lower(),
                    "findings": [f.code for f in self.shown if place in f.effects],
                    "reads_it_as_it_is": place in READERS[self.form],
                }
                for place in self._asked
            },
            "findings": [
                {
                    "code": f.code,
                    "what": f.what,
                    "mend": f.fix,
                    "effects": {place: effect.name.lower() for place, effect in f.effects.items()},
                }
                for f in self.shown
            ],
            "exit_code": self.exit_code,
        }

    def text(self) -> str:
        """A line for each destination, then each finding and how to fix it."""
        width = max(map(len, DESTINATIONS.values()))
        lines = [f"{DESTINATIONS[place]:{width}}  {self._line(place)}" for place in self._asked]
        for finding in self.shown:
            places = {
                effect: [DESTINATIONS[p] for p in self._asked if finding.effects.get(p) is effect]
                for effect in sorted(set(finding.effects.values()), reverse=True)
            }
            touched = "; ".join(f"{', '.join(names)}: {effect.words}" for effect, names in places.items() if names)
            lines += ["", *_wrapped(f"{finding.code}  ", finding.what), *_wrapped("       ", touched)]
            lines.append(f"       fix: {finding.fix}")
        if not self.shown:
            lines += ["", "nothing speaks against it"]
        return "\n".join(lines)

    def _line(self, place: str) -> str:
        effect, route = self.at(place), ROUTES.get((self.form, place), "")
        codes = [f.code for f in self.shown if f.effects.get(place) is effect]
        why = f"  ({', '.join(codes)})" if codes and effect > LOADS else ""
        return f"{effect.words}{f', {route}' if route else ''}{why}"

    @property
    def _asked(self) -> tuple[str, ...]:
        return self.asked or tuple(DESTINATIONS)


def _wrapped(first: str, text: str) -> list[str]:
    rest = " " * len(first)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False) or [first]
