"""What was measured, in plain words: one sentence per module, a few for the model.

A path gives its layer (its first number) and its kind (its last part): `model.layers.12.mlp.down_proj` is layer 12's
down_proj, and so is that of each of its experts. Directions "in use" are those that hold 90 % of ‖ΔW‖²_F. That is
energy, not function: only a trial tells what a model does with the rest. How strong an update is beside W in its
directions means something only when compared with random directions, so both are given.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from deltaw.analysis.measure import NEAR, Measures
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.show.text import counted, percent

KINDS = 16  # columns of a map
ORDER = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "c_fc",
    "down_proj", "c_proj",
)  # fmt: skip


def place(path: str) -> tuple[int | None, str]:
    """(layer, kind): (12, "down_proj"); the layer is None if the path has no number."""
    parts = parameter_of(path).split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    return layer, parts[-1]


def short(kind: str) -> str:
    """A column's head: "down" for down_proj."""
    return kind.removesuffix("_proj")


def kinds_of(paths: Iterable[str]) -> list[str]:
    """The kinds of module, in the order in which a layer computes them, unknown names last."""
    kinds = sorted({place(path)[1] for path in paths})
    return sorted(kinds, key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))


def columns_of(paths: Iterable[str]) -> dict[str, str]:
    """The kind of each path, in the order of the kinds; if there are very many, the rarer ones become "other"."""
    named = {path: place(path)[1] for path in paths}
    counts, kinds = Counter(named.values()), kinds_of(named)
    if len(kinds) > KINDS:
        common = {kind for kind, _ in counts.most_common(KINDS - 1)}
        named = {path: kind if kind in common else "other" for path, kind in named.items()}
        kinds = [*(kind for kind in kinds if kind in common), "other"]
    return {path: named[path] for path in sorted(named, key=lambda path: kinds.index(named[path]))}


def title(path: str) -> str:
    """ "layer 12 down_proj", or the path."""
    layer, kind = place(path)
    expert = expert_of(path)
    which = "" if expert is None else f" of expert {expert}"
    return path if layer is None else f"layer {layer} {kind}{which}"


def sentence(path: str, m: Measures) -> str:
    """One module's update in a sentence."""
    if not m.numerical_rank:
        return f"{title(path)} learnt nothing: its update is zero"
    words = f"{title(path)} uses {m.energy_rank} of {m.rank} directions"
    if m.base is None:
        return words
    words += f", changes the weight by {percent(m.base.relative, 1)}"
    top = m.base.amplification_top
    if top.factor is not None and top.chance is not None:
        words += f" and has {top.factor:.3g} times what W has in its main directions (by chance {top.chance:.3g})"
    if m.base.intruders:
        words += f"; {m.base.intruders} of the tuned weight's first {m.base.intruders_of} directions are new"
    return words


def gist(measures: Mapping[str, Measures], summary: Mapping[str, Any]) -> list[str]:
    """The model in a few paragraphs."""
    used = [m for m in measures.values() if m.numerical_rank]
    if not used:
        return ["The update is zero in every module: this is the base."]
    ranks = sorted({m.rank for m in used})
    available = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    middle = median(m.energy_rank for m in used)
    size = f"{counted(summary['modules'], 'module')}, {counted(summary['parameters'], 'parameter')}."
    half = f"Half of the modules hold 90 % of the energy ‖ΔW‖² in {middle:g} or fewer of {available} directions"
    paragraphs = [f"{size} {half}; energy doesn't say what the others do for the task."]
    if "relative" in summary:
        largest = summary["largest"]["relative"]
        most = f"{title(largest['module'])} ({percent(largest['value'], 1)})"
        paragraphs.append(f"The weights changed by {percent(summary['relative'], 2)} (‖ΔW‖ / ‖W‖), most in {most}.")
        paragraphs.append(_amplified(used, summary["percentile"]))
        leading = f"{summary['intruders']:,} of {summary['intruders_of']:,} leading directions of the tuned weights"
        more = f"; {summary['outside']:,} of them lie mostly outside its first {NEAR}" if summary["intruders"] else ""
        paragraphs.append(f"{leading} are intruders, unlike any of the base's own{more}.")
    return paragraphs


def _amplified(used: list[Measures], percentile: float | None) -> str:
    """LoRA §7.3 over the modules: ΔW in its own directions, beside W there and W in random directions."""
    tops = [m.base.amplification_top for m in used if m.base]
    factors = [top.factor for top in tops if top.factor is not None]
    chances = [top.chance for top in tops if top.chance is not None]
    if not factors or not chances:
        return "In the directions that carry 90 % of the update, W has nothing."
    words = f"In the directions that carry 90 % of the update, it has {median(factors):.3g} times what W has"
    words += f"; in random directions it would have {median(chances):.3g} times."
    if percentile is not None:
        more = f"W has more there than in {percent(percentile)} of random directions"
        words += f" {more} (mean of the modules; chance is 50 %)."
    return words
