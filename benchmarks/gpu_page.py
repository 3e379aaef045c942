"""benchmarks/gpu.csv -> the section of docs/performance.md on GPUs (benchmarks/report.py writes it).

A row's share is of the rate that the same card gave an 8192³ product on the same day: tokens/s of one day are never set
against the product of another. Of rows that were measured again the last counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Row, Target, read_rows
from benchmarks.tables import shown, table

ARMS = {
    "peft": "PEFT",
    "peft-liger": "PEFT + Liger",
    "unsloth": "Unsloth",
    "deltaw": "deltaw's passes alone",
    "deltaw-graph": "the same, body as a CUDA graph",
    "train-uncaptured": "`deltaw train`, nothing recorded",
    "train": "`deltaw train`",
    "gemm": "products alone",
}
MODELS = {"135m": "135M", "1b": "1B", "8b": "8B"}
PRODUCT = "8192^3"
WANTED = (("8b", 8192, 0.70), ("8b", 2048, 0.65), ("1b", 8192, 0.65), ("1b", 2048, 0.45), ("135m", 8192, 0.25))
AHEAD = (("1b", 8192, 1.5), ("1b", 2048, 4.0), ("135m", 8192, 5.0))
OURS, PEERS = ("deltaw", "deltaw-graph", "train"), ("peft", "peft-liger", "unsloth")
BESIDE = {"profile": "profile", "train-exact": "recorded against not", "train-killed": "killed and resumed"}
INTRO = """
Made from `benchmarks/gpu.csv`, which `benchmarks/gpu.sh` writes. {cards}. Models have the shapes of SmolLM2-135M, Llama
3.2 1B and Llama 3.1 8B and random weights; documents of up to 2,048 tokens, rank 16 on all linear layers, nothing
recomputed. Shares are of the rate of an 8192³ product on the same card and day. `deltaw train` is the command itself,
by its defaults, with everything that lies between its steps.
"""


def read(root: Path) -> list[Row]:
    """The rows; none where there is no file."""
    file = root / "benchmarks" / "gpu.csv"
    return read_rows(file) if file.is_file() else []


@dataclass(frozen=True)
class Rate:
    """Tokens per second; `share` of the product's rate, where it is known."""

    tokens_per_s: float
    share: float | None


Rates = Mapping[tuple[str, str, int], Rate]  # by arm, model and tokens a step


def section(rows: Sequence[Row]) -> str:
    """Of docs/performance.md; empty without rows."""
    if not rows:
        return ""
    found = _rates(rows)
    sizes = sorted({key[1:] for key in found}, key=lambda size: (list(MODELS).index(size[0]), size[1]))
    arms = [arm for arm in ARMS if any(key[0] == arm for key in found)]
    lines = [
        [f"{MODELS[model]}, {tokens:,} a step", *(_cell(found.get((arm, model, tokens))) for arm in arms)]
        for model, tokens in sizes
    ]
    cards = "; ".join(dict.fromkeys(f"{row['date']}, {row['gpu']}, torch {row['torch']}" for row in rows))
    names = ARMS | BESIDE
    said = [
        f"- {names[row['arm']]}, {MODELS[row['model']]}{', ' * bool(row['tokens'])}{row['tokens']}: {row['note']}"
        for row in rows
        if row["arm"] in names and row["model"] in MODELS and (not row["tokens_per_s"] or "DIFFERS" in row["note"])
    ]
    parts = [
        "## On a GPU",
        INTRO.strip().format(cards=cards),
        table(["figure", "target", "measured", "met", "short by"], map(shown, _targets(found))),
        "Tokens per second, and the share of the product's rate:",
        table(["", *(ARMS[arm] for arm in arms)], lines),
        "\n".join(said),
    ]
    return "\n\n".join(parts) + "\n"


def _rates(rows: Sequence[Row]) -> Rates:
    """`deltaw train` writes no share: a token's FLOPs are those of another arm's row of the model that does."""
    products = {_day(row): float(row["note"].split()[0]) * 1e12 for row in rows if row["model"] == PRODUCT}
    flops: dict[str, float] = {}
    for row in rows:
        if row["share_of_gemm"]:
            spent = float(row["share_of_gemm"]) * products[_day(row)]
            flops.setdefault(row["model"], spent / float(row["tokens_per_s"]))
    found = {}
    for row in rows:
        if row["arm"] in ARMS and row["model"] in MODELS and row["tokens_per_s"]:
            rate = float(row["tokens_per_s"])
            share = rate * flops[row["model"]] / products[_day(row)] if row["model"] in flops else None
            found[row["arm"], row["model"], int(row["tokens"])] = Rate(rate, share)
    return found


def _day(row: Row) -> tuple[str, str]:
    return row["date"], row["gpu"]


def _cell(rate: Rate | None) -> str:
    if rate is None:
        return ""
    return f"{rate.tokens_per_s:,.0f}" + ("" if rate.share is None else f" ({rate.share:.1%})")


def _targets(found: Rates) -> list[Target]:
    def best(arms: Sequence[str], model: str, tokens: int) -> Rate | None:
        rates = [found[arm, model, tokens] for arm in arms if (arm, model, tokens) in found]
        return max(rates, key=lambda rate: rate.tokens_per_s, default=None)

    listed = []
    for model, tokens, bound in WANTED:
        ours = best(OURS, model, tokens)
        name = f"{MODELS[model]}, {tokens:,} a step, of the product's rate"
        listed.append(Target(name, bound, ours.share if ours else None, unit="%"))
    for model, tokens, bound in AHEAD:
        ours, peer = best(OURS, model, tokens), best(PEERS, model, tokens)
        ratio = ours.tokens_per_s / peer.tokens_per_s if ours and peer else None
        listed.append(Target(f"{MODELS[model]}, {tokens:,} a step, against the fastest peer", bound, ratio))
    return listed
