"""benchmarks/gpu.csv -> the section of docs/performance.md on GPUs (benchmarks/report.py writes it).

A row's share is of the rate that the same card gave an 8192³ product on the same day: tokens/s of one day are never set
against the product of another. Of an arm on a model at a size the newest day's rows count, of these the last.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Row, Target, read_rows
from benchmarks.tables import shown, table

ARMS = {
    "peft": "PEFT",
    "peft-liger": "PEFT + Liger",
    "unsloth": "Unsloth",
    "deltaw-uncaptured": "deltaw's passes, nothing recorded",
    "deltaw": "deltaw's steps, recorded",
    "loop": "the same, on the batches of `deltaw train`",
    "train": "`deltaw train`",
    "train-uncaptured": "`deltaw train`, nothing recorded",
    "gemm": "products alone",
}
MODELS = {"135m": "135M", "1b": "1B", "8b": "8B", "8b-4k": "8B, documents of 4,096"}
PRODUCT = "8192^3"
WANTED = (("8b", 8192, 0.70), ("8b", 2048, 0.65), ("1b", 8192, 0.65), ("1b", 2048, 0.45), ("135m", 8192, 0.25))
AHEAD = (("1b", 8192, 1.5), ("1b", 2048, 4.0), ("135m", 8192, 5.0))  # of Unsloth
ALL_OF_IT = (("135m", 8192, 0.9), ("1b", 8192, 0.9))  # of the loop alone
PUBLISHED, FASTER = 12_473, 1.4  # tokens/s: NeMo AutoModel, LoRA of Llama 3 8B on one H100, sequences of 4,096
MOST = 43.5  # GiB, of tensors: 8B at 8,192 tokens a step
BESIDE = {"profile": "profile", "train-exact": "recorded against not", "train-killed": "killed and resumed"}
INTRO = """
Made from `benchmarks/gpu.csv`, which `benchmarks/gpu.sh` writes. {cards}. Models have the shapes of SmolLM2-135M, Llama
3.2 1B and Llama 3.1 8B and random weights; documents of up to 2,048 tokens, rank 16 on all linear layers, nothing
recomputed. Shares are of the rate of an 8192³ product on the same card and day. `deltaw train` is the command itself,
by its defaults, with everything that lies between its steps. Unsloth's figures are its own loader's model in the bare
loop of the other arms; NeMo AutoModel's is the published one.
"""
BESIDES = "FlashAttention-4"  # which PyTorch doesn't bring


def read(root: Path) -> list[Row]:
    """The rows; none where there is no file."""
    file = root / "benchmarks" / "gpu.csv"
    return read_rows(file) if file.is_file() else []


@dataclass(frozen=True)
class Rate:
    """Tokens per second; `share` of the product's rate and `gib` of tensors, where they are known."""

    tokens_per_s: float
    share: float | None = None
    gib: float | None = None


Rates = Mapping[tuple[str, str, int], Rate]  # by arm, model and tokens a step


def section(rows: Sequence[Row]) -> str:
    """Of docs/performance.md; empty without rows."""
    if not rows:
        return ""
    rows = newest(rows)
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
    with_it = any(row["arm"] == "deltaw" and f"attention by {BESIDES}" in row["note"] for row in rows)
    more = f" In deltaw's recorded steps attention is by {BESIDES}, for which `flash-attn-4` was installed." * with_it
    parts = [
        "## On a GPU",
        INTRO.strip().format(cards=cards) + more,
        table(["figure", "target", "measured", "met", "short by"], map(shown, _targets(found))),
        "Tokens per second, and the share of the product's rate:",
        table(["", *(ARMS[arm] for arm in arms)], lines),
        "\n".join(said),
    ]
    return "\n\n".join(parts) + "\n"


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of each arm on a model at a size those of its newest day; the products of all days, which shares are of."""
    days: dict[tuple[str, str, str], str] = {}
    for row in rows:
        key = row["arm"], row["model"], row["tokens"]
        days[key] = max(days.get(key, ""), row["date"])
    return [
        row for row in rows if row["model"] == PRODUCT or days[row["arm"], row["model"], row["tokens"]] == row["date"]
    ]


def _rates(rows: Sequence[Row]) -> Rates:
    """`deltaw train` writes no share: a token's FLOPs are those of another arm's row of the model that does, of the
    largest share, which has the most digits."""
    flops: dict[str, float] = {}
    with_product = list(_with_product(rows))
    for row, product in sorted(with_product, key=lambda pair: -float(pair[0]["share_of_gemm"] or 0)):
        if row["share_of_gemm"] and product:
            flops.setdefault(row["model"], float(row["share_of_gemm"]) * product / float(row["tokens_per_s"]))
    found = {}
    for row, product in with_product:
        if row["arm"] in ARMS and row["model"] in MODELS and row["tokens_per_s"]:
            rate = float(row["tokens_per_s"])
            share = rate * flops[row["model"]] / product if row["model"] in flops and product else None
            gib = float(row["allocated_gib"]) if row.get("allocated_gib") else None
            found[row["arm"], row["model"], int(row["tokens"])] = Rate(rate, share, gib)
    return found


def _with_product(rows: Sequence[Row]) -> Iterator[tuple[Row, float | None]]:
    """Each with the rate, FLOP/s, that the product before it had on its card and day, since a run begins with that; of
    the day's first, where none stands before it."""
    rates = [(_day(row), float(row["note"].split()[0]) * 1e12) for row in rows if row["model"] == PRODUCT]
    products, left = dict(reversed(rates)), iter(rates)
    for row in rows:
        if row["model"] == PRODUCT:
            day, rate = next(left)
            products[day] = rate
        yield row, products.get(_day(row))


def _day(row: Row) -> tuple[str, str]:
    return row["date"], row["gpu"]


def _cell(rate: Rate | None) -> str:
    if rate is None:
        return ""
    return f"{rate.tokens_per_s:,.0f}" + ("" if rate.share is None else f" ({rate.share:.1%})")


def _targets(found: Rates) -> list[Target]:
    """Those of issue 16. They are of `deltaw`, the steps that `deltaw train` takes."""

    def ratio(arm: str, other: str, model: str, tokens: int) -> float | None:
        one, two = (found.get((name, model, tokens)) for name in (arm, other))
        return one.tokens_per_s / two.tokens_per_s if one and two else None

    listed = []
    for model, tokens, bound in WANTED:
        ours = found.get(("deltaw", model, tokens))
        name = f"{MODELS[model]}, {tokens:,} a step, of the product's rate"
        listed.append(Target(name, bound, ours.share if ours else None, unit="%"))
    for model, tokens, bound in AHEAD:
        name = f"{MODELS[model]}, {tokens:,} a step, against Unsloth"
        listed.append(Target(name, bound, ratio("deltaw", "unsloth", model, tokens)))
    for model, tokens, bound in ALL_OF_IT:
        name = f"{MODELS[model]}, {tokens:,} a step, `deltaw train` against its steps alone"
        listed.append(Target(name, bound, ratio("train", "loop", model, tokens)))
    long, large = found.get(("deltaw", "8b-4k", 8192)), found.get(("deltaw", "8b", 8192))
    name = f"8B, documents of 4,096 tokens, against NeMo AutoModel's {PUBLISHED:,} tokens/s"
    listed.append(Target(name, FASTER, long.tokens_per_s / PUBLISHED if long else None))
    listed.append(Target("8B, 8,192 a step, memory", MOST, large.gib if large else None, at_most=True, unit="GiB"))
    return listed
