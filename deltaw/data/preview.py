"""What a run will train on, for the eye: some examples with their trained tokens marked, and the counts.

Wrong masks and templates are seen in a second here, and else only after the run. Trained text is coloured;
where colour is off (a pipe, `NO_COLOR`) it stands in ⟦brackets⟧, since without either the preview would
show nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from deltaw.data.dataset import DataReport, Dataset
from deltaw.data.example import Example

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult

LONGEST = 2000  # characters shown of one stretch


def preview(dataset: Dataset, tokenizer: Any, n: int) -> "Group":
    """A rich renderable: the first `n` training examples, then counts and warnings."""
    from rich.console import Group
    from rich.text import Text

    lines: list[Any] = [Marked(example, tokenizer) for example in dataset.train[:n]]
    lines += [Text(line) for line in summary(dataset.report)]
    lines += [Text(f"warning: {warning}", style="yellow") for warning in dataset.report.warnings]
    return Group(*lines)


def summary(report: DataReport) -> list[str]:
    """The counts, a line each."""
    return [
        f"{report.source}: {report.form}",
        f"{report.rows_read:,} rows read, {report.train_rows:,} to train on, {report.eval_rows:,} held out",
        f"{report.tokens:,} tokens, {report.supervised_tokens:,} of them trained ({report.share:.1%}); "
        f"the longest row has {report.longest_row:,} ({report.longest_origin})",
    ]


def spans(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's text in stretches of (text, trained)."""
    stretches = []
    for trained, group in groupby(zip(example.tokens, example.loss_mask, strict=True), key=lambda pair: pair[1]):
        ids = [int(token) for token, _ in group]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stretches.append((_shortened(text), bool(trained)))
    return stretches


@dataclass(frozen=True)
class Marked:
    """One example: colour where the console has it, brackets where not."""

    example: Example
    tokenizer: Any

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        colour = console.color_system is not None and not console.no_color
        counts = f"{len(self.example.tokens)} tokens, {int(self.example.loss_mask.sum())} trained"
        text = Text().append(f"{self.example.origin} ({counts})\n", style="bold")
        text.append_text(_marked(spans(self.example, self.tokenizer), colour))
        yield text
        yield Text("")


def _marked(stretches: Sequence[tuple[str, bool]], colour: bool) -> Any:
    from rich.text import Text

    text = Text()
    for stretch, trained in stretches:
        if trained:
            text.append(stretch if colour else f"⟦{stretch}⟧", style="bold green underline")
        else:
            text.append(stretch)
    return text


def _shortened(text: str) -> str:
    """The text with control characters made visible, cut in the middle when it is long."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
