"""Memory and network of a step for 1B, 8B and 70B shapes on 1 to 64 GPUs: writes the table of docs/scale.md.

    python -m benchmarks.scale

Measured: tokens/s of one H100 in passes of 8,192 tokens (70B: of 2,048, four a step, since what 8,192 keep is more than
a card has), and its memory (benchmarks/gpu.csv, 1B and 8B). 70B's are 8B's,
in proportion to the parameters that a token meets, and to layers · width for what is kept. Assumed: the bandwidths.

    compute    = 8,192 tokens per GPU / (tokens/s)
    all-reduce = 2 (N − 1) / N · 4 r Σ (in + out) / bandwidth        the adapter's gradient, float32, after the backward
    gather     = 2 (N − 1) / N · bytes of the base / bandwidth       FSDP: forward and backward of each pass, hidden
    step       = max(compute, gather) + all-reduce
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_page
from benchmarks.tables import table

ROOT = Path(__file__).parents[1]
PAGE, MARK = ROOT / "docs" / "scale.md", "<!-- made by python -m benchmarks.scale -->"
RANK, TOKENS, GIB, CARD, NODE = 16, 8192, 2**30, 79.2, 8
NVLINK, BETWEEN = 300e9, {"InfiniBand": 40e9, "Ethernet": 1.25e9}  # bytes/s per GPU: assumed
BYTES = {"bf16": 2.0, "nf4": 0.53}  # of a weight in a block; NF4 with double quantisation. Embeddings stay bf16


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    width: int
    inner: int
    kv: int
    words: int
    tied: bool
    passes: int = 1  # per step

    @property
    def linears(self) -> list[tuple[int, int]]:
        w, i, k = self.width, self.inner, self.kv
        return [(w, w), (w, k), (w, k), (w, w), (w, i), (w, i), (i, w)]

    @property
    def blocks(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def embeddings(self) -> int:
        return self.words * self.width * (1 if self.tied else 2)

    @property
    def adapter(self) -> int:
        return 4 * RANK * self.layers * sum(a + b for a, b in self.linears)

    def base(self, kind: str) -> float:
        return BYTES[kind] * self.blocks + 2.0 * self.embeddings


SHAPES = [
    Shape("1B", 16, 2048, 8192, 512, 128256, True),
    Shape("8B", 32, 4096, 14336, 1024, 128256, False),
    Shape("70B", 80, 8192, 28672, 1024, 128256, False, 4),
]


def measured(name: str, tokens: int) -> tuple[float, float]:
    """(tokens/s, bytes beside the base) of one H100; of 70B from 8B's."""
    shape = next(shape for shape in SHAPES if shape.name == name)
    rows = [row for row in gpu_page.read(ROOT) if (row["arm"], row["tokens"]) == ("deltaw", str(tokens))]
    known = {row["model"]: row for row in rows}
    if row := known.get(name.lower()):
        return float(row["tokens_per_s"]), float(row["allocated_gib"]) * GIB - shape.base("bf16")
    if name == "8B":
        raise LookupError(f"benchmarks/gpu.csv has no step of 8B at {tokens} tokens")
    rate, beside = measured("8B", tokens)
    eight = SHAPES[1]
    work = (shape.blocks + shape.embeddings / 2) / (eight.blocks + eight.embeddings / 2)
    return rate / work, beside * shape.layers * shape.width / (eight.layers * eight.width)


def row(shape: Shape, kind: str, gpus: int, sharded: bool, network: str) -> list[str]:
    rate, beside = measured(shape.name, TOKENS // shape.passes)
    bandwidth = NVLINK if gpus <= NODE else BETWEEN[network]
    share = 2 * (gpus - 1) / gpus / bandwidth
    compute, reduce = TOKENS / rate, share * shape.adapter
    gather = shape.passes * share * shape.base(kind) if sharded else 0.0
    memory = (shape.base(kind) / (gpus if sharded else 1) + beside) / GIB
    step = max(compute, gather) + reduce
    limits = {"computing": compute, "gathering the base": gather, "the adapter's sum": reduce}
    first = "memory" if memory > CARD else max(limits, key=lambda name: limits[name])
    wire = "NVLink" if gpus <= NODE else network
    share_of_step = "-" if memory > CARD else f"{compute / step:.0%}"
    return [
        shape.name, kind, str(gpus), "sharded" if sharded else "whole", wire,
        f"{memory:.1f}", f"{1000 * compute:.0f}", f"{1000 * reduce:.1f}", f"{1000 * gather:.0f}",
        "-" if memory > CARD else f"{gpus * TOKENS / step:,.0f}", share_of_step, first,
    ]  # fmt: skip


HEADS = ("base", "held in", "GPUs", "base is", "network", "GiB per GPU", "compute ms", "all-reduce ms", "gather ms",
         "tokens/s", "computing", "first bottleneck")  # fmt: skip


def lines() -> str:
    cells = []
    for shape in SHAPES:
        for kind in BYTES:
            for gpus in (1, 8, 16, 64):
                for network in BETWEEN if gpus > NODE else ("InfiniBand",):
                    for sharded in (False, True) if gpus > 1 else (False,):
                        cells.append(row(shape, kind, gpus, sharded, network))
    return table(HEADS, cells)


def main() -> None:
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{head}{MARK}\n\n{lines()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
