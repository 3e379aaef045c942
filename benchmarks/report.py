"""benchmarks/results.csv, gpu.csv, algebra.csv and figures.csv -> docs/performance.md and docs/performance.svg.

    python -m benchmarks.report [--out FOLDER]      (make bench calls it; nothing is measured here)

Every number on the page is worked out from the rows; a target whose arms were not measured stays empty.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import algebra, gpu_page
from benchmarks.figures import FILE, read, sections
from benchmarks.results import PACKAGES, Figure, Key, Row, figures, read_rows, targets
from benchmarks.tables import shown, table

ROOT = Path(__file__).parents[1]
WORKLOADS = {
    "dense": "4 x 512 tokens per step, all supervised",
    "words": "45 words per step, about 768 tokens, half supervised",
    "chats": "16 chats of 42-78 tokens per step, two tokens of each supervised",
    "long": "texts of 512-2048 tokens, about 4096 per step, all supervised",
}
NAMES = {
    "peft": "PEFT, bare loop, eager",
    "peft-compile": "PEFT, bare loop, torch.compile",
    "peft-trainer": "PEFT + Trainer, as documented",
    "trl": "TRL SFTTrainer + PEFT",
    "trl-free": "TRL SFTTrainer + PEFT, padding-free",
    "deltaw": "deltaw",
}
ABLATIONS = """
deltaw with one technique replaced by its plain twin. The two take turns at every step in one process, and the share is
over those pairs. Peak memory is that of the first step.
"""
BAR = 0.18  # the width of a bar; a group is 1 wide
METHOD = """
SmolLM2-135M, rank 16 on all linear layers, AdamW, clip 1. Every arm starts from the same base bytes and the same
factors and sees the same rows in the same steps; rows of similar length share a step, which spares the padding arms
most of their padding. A row of a table pools the timed steps of its processes; the arms take turns, each in a fresh
process. Tokens are real ones, never padding. A process's first step doesn't count in its rate; "first step" is the time
from the start of the process to the end of that step, including imports, loading and any compiling. Peak memory is the
process's high-water mark. "Limit" is the rate at which this machine, in the same run, does the matrix products of a
step and nothing else: 4 (N_blocks + f N_head) FLOPs per token, where f is the supervised share. Before anything was
timed, deltaw's first loss and gradients were compared with PEFT's in float32 (`benchmarks/gates.py`);
`make bench-curves` checks 200 steps against the band of PEFT's seeds.
"""


def page(rows: Sequence[Row]) -> str:
    """docs/performance.md."""
    found, dtype = figures(rows), chosen(rows)
    first = next((row for row in rows if not row["error"]), rows[0])
    versions = ", ".join(f"{name} {first[name]}" for name in PACKAGES if first[name])
    parts = [
        "# Performance",
        "Made by `make bench` (`benchmarks/report.py`) from `benchmarks/results.csv`; don't edit it by hand.",
        f"{first['date']}, {first['machine']}, {first['threads']} threads, {versions}. Main dtype: {dtype}.",
        "![Tokens per second by arm and workload, with the limit of the matrix products](performance.svg)",
        "## Targets",
        table(["figure", "target", "measured", "met", "short by"], map(shown, targets(found, dtype))),
        "## Arms",
    ]
    for name, said in WORKLOADS.items():
        for number in (dtype, *({"bfloat16", "float32"} - {dtype})):
            lines = [_arm(key, figure, found) for key, figure in found.items() if _belongs(key, name, number)]
            if lines:
                parts.append(f"**{name}**, {number}: {said}.{_limit(found, name, number)}")
                heads = ["arm", "tokens/s (quartiles)", "supervised/s", "of the limit", "slowest steps (p95)"]
                parts.append(table([*heads, "peak memory", "first step", "first loss", "runs"], lines))
    if ablations := _ablations(found):
        parts += ["## What each technique brings", ABLATIONS.strip()]
        parts.append(table(["workload", "without", "tokens/s", "of deltaw's", "peak memory"], ablations))
    if errors := [
        f"- {row['arm']} on {row['workload']}, {row['dtype']}{_without(row)}: {row['error']}"
        for row in rows
        if row["error"]
    ]:
        parts += ["## Not measured", "\n".join(errors)]
    paths = {row["arm"]: row["path"] for row in rows if row["path"] and not row["without"] and row["dtype"] == dtype}
    ways = [f"- {NAMES[arm]}: {path}" for arm, path in paths.items() if arm in NAMES]
    parts += ["## How", METHOD.strip(), "Which path ran:", "\n".join(ways)]
    return "\n\n".join(parts) + "\n"


def _without(row: Row) -> str:
    return f" without {row['without']}" if row["without"] else ""


def chosen(rows: Sequence[Row]) -> str:
    """The dtype that the run was about: that of its first row."""
    return rows[0]["dtype"]


def _belongs(key: Key, workload: str, dtype: str) -> bool:
    return key.arm in NAMES and (key.workload, key.dtype, key.without) == (workload, dtype, "")


def _arm(key: Key, figure: Figure, found: Mapping[Key, Figure]) -> list[str]:
    limit = found.get(Key("gemm", key.workload, key.dtype))
    compiling = f" ({figure.compile:.0f} s of it compiling)" if figure.compile else ""
    return [
        NAMES[key.arm],
        f"{figure.middle:.0f} ({figure.low:.0f}-{figure.high:.0f})",
        f"{figure.supervised:.0f}",
        f"{figure.middle / limit.middle:.0%}" if limit else "",
        f"{figure.p95:.2f} s",
        f"{figure.peak / 1e9:.2f} GB",
        f"{figure.first_step:.1f} s{compiling}",
        f"{figure.loss:.4f}",
        str(figure.processes),
    ]


def _limit(found: Mapping[Key, Figure], workload: str, dtype: str) -> str:
    limit = found.get(Key("gemm", workload, dtype))
    return f" Limit: {limit.middle:.0f} tokens/s at {limit.gflops:.0f} GFLOP/s." if limit else ""


def _ablations(found: Mapping[Key, Figure]) -> list[list[str]]:
    lines = []
    for key, figure in found.items():
        if key.without:
            rate, share = f"{figure.middle:.0f}", f"{figure.of_whole:.0%}" if figure.of_whole else ""
            lines.append([key.workload, key.without, rate, share, f"{figure.peak / 1e9:.2f} GB"])
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of tokens/s, one group per workload, with the limit as a line over each group."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "deltaw"
    from matplotlib import pyplot

    found, dtype = figures(rows), chosen(rows)
    groups = [name for name in WORKLOADS if any(_belongs(key, name, dtype) for key in found)]
    there = [[arm for arm in NAMES if Key(arm, name, dtype) in found] for name in groups]
    figure, axes = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    for shade, arm in enumerate(NAMES):
        have = [number for number, arms in enumerate(there) if arm in arms]
        if not have:
            continue
        rates = [found[Key(arm, groups[number], dtype)] for number in have]
        bars = axes.bar(
            [number + BAR * (there[number].index(arm) - (len(there[number]) - 1) / 2) for number in have],
            [rate.middle for rate in rates],
            BAR,
            yerr=[[rate.middle - rate.low for rate in rates], [rate.high - rate.middle for rate in rates]],
            color="#c2410c" if arm == "deltaw" else pyplot.get_cmap("Blues")(0.35 + 0.12 * shade),
            ecolor="#555555",
            label=NAMES[arm],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    limits = [(number, found[key]) for number, name in enumerate(groups) if (key := Key("gemm", name, dtype)) in found]
    for place, (number, limit) in enumerate(limits):
        label = "matrix products alone" if place == 0 else "_"
        axes.hlines(limit.middle, number - 0.42, number + 0.42, colors="#111111", linestyles="dashed", label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("tokens per second, padding not counted")
    axes.set_title(f"{rows[0]['machine']}, {rows[0]['threads']} threads, {dtype}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(rows: Sequence[Row], root: Path = ROOT) -> None:
    """Page and picture under `root`/docs."""
    (root / "docs").mkdir(parents=True, exist_ok=True)
    single = sections(read(root / "benchmarks" / FILE.name))
    more = [gpu_page.section(gpu_page.read(root)), algebra.section(algebra.read(root)), single]
    text = "\n".join([page(rows), *filter(None, more)])
    (root / "docs" / "performance.md").write_text(text, encoding="utf-8")
    draw(rows, root / "docs" / "performance.svg")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="The page from the rows.")
    parser.add_argument("--out", type=Path, default=ROOT, help="a folder with benchmarks/results.csv; docs/ goes there")
    out = parser.parse_args().out
    write(read_rows(out / "benchmarks" / "results.csv"), out)


if __name__ == "__main__":
    main()
