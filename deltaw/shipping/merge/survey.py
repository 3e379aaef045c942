"""How much of the update survives a merge, in words, and what follows. The figures come from linalg/rounding.py.

Two things happen to an update in weights of few digits, and they are judged apart:

    lost        `kept` says how much survives along the update's own direction. That is less than all of it if
                the base's numbers lie on the target's own grid, since anything below half a step is gone: a weak
                update in a bfloat16 base, any update in blocks that are quantised as the base's were
    noise       `cosine` falls with it, too. A block that is quantised again moves every entry by up to half a step,
                whatever the update is. A quantised base has just as much of that noise relative to the base: it
                points everywhere and isn't a loss of the update

So a quantised target is refused by what is lost (`LITTLE`), not by noise, which would refuse every model of 4 bits: the
demo's adapter, in Q4_0, has a cosine of 0.34 and keeps 0.95; in the Q4_1 that its base came in it keeps 0.28. In
floating types nearly all noise is loss, and the cosine measures both: below `FAINT` the error is half as large as what
was learnt (tan of the angle), so a warning is printed. If nothing changes at all, the merged model would be the base,
which nobody can have meant: that is refused, too.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deltaw.errors import InputError
from deltaw.linalg.rounding import Survival
from deltaw.show.text import percent

FAINT = 0.9  # cosine of all updates together, of floating types
LITTLE = 0.5  # of the update, along itself, in quantised types
SHOWN = 3  # modules that lose most


def whole(survivals: Mapping[str, Survival]) -> Survival:
    """The survival of all modules together."""
    return sum(survivals.values(), Survival())


def figures(survival: Survival) -> dict[str, float]:
    """The figures as JSON."""
    return {name: getattr(survival, name) for name in ("share", "cosine", "kept", "error")} | asdict(survival)


def to_json(survivals: Mapping[str, Survival]) -> dict[str, Any]:
    """The total, and each module."""
    return figures(whole(survivals)) | {"modules": {path: figures(s) for path, s in survivals.items()}}


def said(survivals: Mapping[str, Survival], type_name: str) -> list[str]:
    """A line on the whole update, and one on the modules that lose most."""
    total = whole(survivals)
    if not total.true:
        return ["the update is zero: the merged model is the base"]
    least = sorted((s.cosine, path) for path, s in survivals.items() if s.true)[:SHOWN]
    return [
        f"in {type_name}, {percent(total.share, 1)} of the {total.entries:,} entries change; the cosine between the "
        f"rounded and the true update is {total.cosine:.4f}, and {percent(total.kept, 1)} of it survives along its own "
        "direction",
        "the least survives in " + ", ".join(f"{path} ({cosine:.4f})" for cosine, path in least),
    ]


WIDER = "--dtype float32"


def warning(survivals: Mapping[str, Survival], type_name: str, *, wider: str = WIDER) -> str | None:
    """The warning about a merge into a floating type, or None. `wider`: the option that keeps more."""
    total = whole(survivals)
    if not total.true or total.cosine >= FAINT:
        return None
    return (
        f"WARNING: {type_name} rounds much of the update away: the cosine is {total.cosine:.2f}, and the model won't "
        f"answer as base and adapter do. Merge with {wider}, or serve the adapter beside its base"
    )


def noise(survivals: Mapping[str, Survival], type_name: str) -> list[str]:
    """A line on a low cosine in a quantised type, which isn't a loss of the update; none where it isn't low."""
    total = whole(survivals)
    if not total.true or total.cosine >= FAINT:
        return []
    return [
        f"the cosine is low because {type_name} moves every weight a little, the base's own as much; what that does to "
        "the answers: deltaw verify"
    ]


def check_floating(survivals: Mapping[str, Survival], type_name: str, *, force: bool, wider: str = WIDER) -> None:
    """Raise InputError if nothing of an update survives, unless `force`."""
    total = whole(survivals)
    if total.true and not total.changed and not force:
        raise InputError(
            f"nothing of the update survives in {type_name}: no weight changes, and the merged model would be the base",
            fix=f"merge with {wider} (or --force to write it anyway)",
        )


def check_quantised(survivals: Mapping[str, Survival], type_name: str, *, force: bool) -> None:
    """Raise InputError if little of an update survives in quantised weights, unless `force`."""
    total = whole(survivals)
    if total.true and total.kept < LITTLE and not force:
        raise InputError(
            f"little of the update survives in {type_name}: {percent(total.kept)} of it survives along its own "
            f"direction, the cosine between the rounded and the true update is {total.cosine:.2f}",
            fix="choose a type with more bits (Q8_0, F16), or add --force to write it anyway",
        )
