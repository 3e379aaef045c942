"""What a GPU's batches are filled up with: tokens and head rows that count for nothing, and how many sizes are met.

    python -m benchmarks.filler            a table; no GPU is needed, since sizes follow from the batches alone

The real loader's batches of 100 steps, a step in one batch, of recipes whose data is at hand; and of documents of up to
2,048 tokens (gpu_models.py) all trained, or a third of each. "Filler": tokens of the sizes beyond the batches' own;
"rows": of the head beyond the labels, as a share of these.
"""

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import deltaw
from benchmarks.gpu_models import LONGEST, SHAPES, reference
from benchmarks.tables import table
from deltaw.base.filled import Size
from deltaw.show.progress import Display
from deltaw.training.checkpoint import TrainState
from deltaw.training.opening import open_run

STEPS = 100
RECIPES = (("recipes/demo.yaml", 4096), ("recipes/text.yaml", 8192), ("recipes/chat-classification.yaml", 4096))
Counts = tuple[int, int, int]  # tokens, documents, labels of a batch


def of_recipe(recipe: str, tokens: int) -> tuple[list[Counts], int]:
    """(the batches, the longest row)."""
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"output={Path(folder) / 'run'}",
            f"train.tokens_per_step={tokens}",
            f"train.tokens_per_batch={tokens}",
        ]
        opened = open_run(deltaw.load_config(recipe, given), Display(quiet=True))
        steps = itertools.islice(opened.loader(TrainState()), STEPS)
        found = [(len(b.tokens_T), len(b.starts) - 1, b.supervised) for batches, _ in steps for b in batches]
    return found, opened.longest


def of_documents(tokens: int, trained: tuple[float, float]) -> list[Counts]:
    """Documents in a random order, as many as fit; the share that is trained of each step is drawn from the two."""
    draw = random.Random(1)
    lengths = [len(text) for text in reference(SHAPES["135m"]["vocabulary"], LONGEST)]
    draw.shuffle(lengths)

    def steps() -> Iterator[list[int]]:
        part: list[int] = []
        for length in itertools.cycle(lengths):
            if sum(part) + length > tokens:
                yield part
                part = []
            part.append(length)

    some = itertools.islice(steps(), STEPS)
    return [(sum(part), len(part), int((sum(part) - len(part)) * draw.uniform(*trained))) for part in some]


def row(name: str, batches: list[Counts], capacity: int, longest: int) -> list[str]:
    sizes: list[Size] = []
    for counts in batches:
        sizes.append(Size.holding([counts], capacity, longest).among(sizes))
    tokens, labels = sum(t for t, _, _ in batches), sum(label for _, _, label in batches)
    filler, rows = sum(size.tokens for size in sizes) / tokens - 1, sum(size.labels for size in sizes) / labels - 1
    return [
        name,
        f"{capacity:,}",
        f"{tokens / len(batches):,.0f}",
        f"{filler:.1%}",
        f"{rows:.1%}",
        str(len(set(sizes))),
    ]


def main() -> None:
    lines: list[list[str]] = []
    for recipe, tokens in RECIPES:
        batches, longest = of_recipe(recipe, tokens)
        lines.append(row(recipe, batches, tokens, longest))
    for name, trained in (("documents, all trained", (1.0, 1.0)), ("documents, a third trained", (0.2, 0.4))):
        lines.append(row(name, of_documents(8192, trained), 8192, LONGEST))
    print(table(["data", "a step's tokens", "its batch has", "filler", "rows", "sizes"], lines))


if __name__ == "__main__":
    main()
