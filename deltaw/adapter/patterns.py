"""How a run file chooses modules: names, and patterns for those who want some layers only.

    q_proj, model.layers.3.mlp.up_proj     a module's path or its dotted end, to the letter
    layers.16-   layers.0-7.mlp   *_proj   a pattern: the modules that it fits, and all in them
    not layers.0-3                         what isn't adapted, whatever else is asked for

A pattern is a path with something left open. In a part (what stands between dots) `*` is any letters, `16-23` and `16-`
are a number from 16 on. Parts may be left out between two others, `layers.16-.q_proj`; but a number belongs to the part
before it, else `layers.0-3` would also mean the first experts of every layer. A name that no layer has is taken for a
pattern, too: `self_attn` are all layers in it, `layers.5` those of the sixth block.

What a pattern means depends on the model, so it is resolved when an adapter is attached: the modules' own names are
what is saved, and PEFT adapts exactly those. A trained adapter's names are never taken for patterns.

Rejected: regular expressions (as in PEFT: a dot is any character there, and a slip matches something else in silence),
and PEFT's layers_to_transform beside the names (one range for all of them, and it needs to be told where layers are).
"""

import re
from collections.abc import Sequence

from deltaw.config import names_module

NOT = "not "
NUMBERS = re.compile(r"(\d+)(?:(-)(\d*))?")  # 5, 5-, 5-8
ALLOWED = re.compile(r"(?:[\w*-]+\.)*[\w*-]+")


def matched(name: str, paths: Sequence[str]) -> list[str]:
    """The paths that a name means: those it names to the letter; if there are none, those it fits as a pattern."""
    return [path for path in paths if names_module(name, path)] or [path for path in paths if fits(name, path)]


def fits(pattern: str, path: str) -> bool:
    """Whether the module at `path`, or one that it lies in, is what the pattern describes."""
    return _follow(pattern.split("."), path.split("."))


def problem(name: str) -> str | None:
    """Why this can be neither a name nor a pattern."""
    if "," in name:
        return f"write a list: [{', '.join(part.strip() for part in name.split(','))}]"
    if not ALLOWED.fullmatch(name):
        return "it isn't a name; patterns are written like *_proj or layers.8-15.mlp, not as regular expressions"
    for part in name.split("."):
        range_ = NUMBERS.fullmatch(part)
        if range_ and range_[3] and int(range_[1]) > int(range_[3]):
            return f"{part} has no number: write {range_[3]}-{range_[1]}"
    return None


def is_literal(name: str) -> bool:
    """Whether a name leaves nothing open."""
    return "*" not in name and not any(NUMBERS.fullmatch(part) and "-" in part for part in name.split("."))


def _follow(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether the parts of the pattern come in this order in those of the path."""
    if not pattern:
        return True
    first, rest = pattern[0], pattern[1:]
    reach = 1 if NUMBERS.fullmatch(first) else len(path)  # a number stands right behind what was before it
    return any(_is(first, part) and _follow(rest, path[at + 1 :]) for at, part in enumerate(path[:reach]))


def _is(word: str, part: str) -> bool:
    if range_ := NUMBERS.fullmatch(word):
        first, dash, last = range_.groups()
        return part.isdecimal() and int(first) <= int(part) <= (int(last or part) if dash else int(first))
    head, *middle = word.split("*")
    if not middle:
        return word == part
    *middle, tail = middle
    if len(part) < len(head) + len(tail) or not (part.startswith(head) and part.endswith(tail)):
        return False
    at, end = len(head), len(part) - len(tail)
    for piece in middle:  # the first place is as good as any: what follows has the most room
        at = part.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True
