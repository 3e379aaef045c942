"""What was measured, in plain words: one sentence a module, a few for the model.

A path is read for its layer (its first number) and its kind (its last part): `model.layers.12.mlp.down_proj` is layer
12's down_proj. Directions "in use" are those that hold 90 % of ‖ΔW‖²_F.
"""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from deltaw.analysis.measure import Measures

ORDER = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "c_fc",
    "down_proj", "c_proj",
)  # fmt: skip


def place(path: str) -> tuple[int | None, str]:
    """(layer, kind): (12, "down_proj"); the layer is None where the path has no number."""
    parts = path.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    return layer, parts[-1]


def short(kind: str) -> str:
    """A column's head: "down" for down_proj."""
    return kind.removesuffix("_proj")


def kinds_of(paths: Iterable[str]) -> list[str]:
    """The kinds of module, in the order in which a layer computes them as far as their names are known."""
    found = sorted({place(path)[1] for path in paths})
    return sorted(found, key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))


def title(path: str) -> str:
    """ "layer 12 down_proj", or the path."""
    layer, kind = place(path)
    return path if layer is None else f"layer {layer} {kind}"


def sentence(path: str, m: Measures) -> str:
    """What one module's update is like."""
    if not m.numerical_rank:
        return f"{title(path)} learnt nothing: its update is zero"
    said = f"{title(path)} uses {m.energy_rank} of {m.rank} directions"
    if m.base is None:
        return said
    said += f", changes the weight by {m.base.relative:.1%}"
    if m.base.amplification_top.factor is not None:
        said += f" and has {m.base.amplification_top.factor:.3g} times what W has in its main directions"
    if m.base.intruders:
        said += f"; {m.base.intruders} of W's first {m.base.intruders_of} directions are new"
    return said


def gist(measures: Mapping[str, Measures], summary: Mapping[str, Any]) -> list[str]:
    """The model in a few sentences."""
    used = [m for m in measures.values() if m.numerical_rank]
    if not used:
        return ["The update is zero in every module: this is the base."]
    ranks = sorted({m.rank for m in used})
    available = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    said = [
        f"{summary['modules']} modules, {summary['parameters']:,} parameters. Half of the modules hold 90 % of "
        f"their update "
        f"in {median(m.energy_rank for m in used):g} or fewer of {available} directions."
    ]
    if "relative" in summary:
        largest = summary["largest"]["relative"]
        said.append(
            f"The weights changed by {summary['relative']:.2%} (‖ΔW‖ / ‖W‖), most in {title(largest['module'])} "
            f"({largest['value']:.1%})."
        )
        said.append(_amplified(used))
        said.append(
            f"{summary['intruders']} of {summary['intruders_of']} leading directions of the tuned weights are "
            "intruders, unlike any of the base's own."
        )
    return said


def _amplified(used: list[Measures]) -> str:
    """LoRA §7.3 over the modules: what ΔW has in its directions against what W has there, and in W's own."""
    tops = [m.base.amplification_top for m in used if m.base]
    factors = [top.factor for top in tops if top.factor is not None]
    share = median(top.on_update / top.on_base for top in tops if top.on_base)
    chance = median(top.on_random / top.on_base for top in tops if top.on_base)
    return (
        f"In the directions that carry 90 % of the update, the update is {median(factors):.3g} times what W has "
        f"there; W has "
        f"{share:.1%} of its strongest directions' norm there, where chance would give {chance:.1%}."
    )
